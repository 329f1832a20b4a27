"""The decoders that run natively, as one definition over :class:`~gossamer.native.recorder.Recorder`.

The architectures of :mod:`gossamer.native.architectures` are the same blocks: what one of them lacks is ``None``.
:func:`pack_decoder` finds the parts in a model of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UnsupportedModelError
from gossamer.models.lora import Adapter
from gossamer.native.adapters import AdaptedPacker
from gossamer.native.architectures import NATIVE_ARCHITECTURES, Architecture
from gossamer.native.recorder import Recorder
from gossamer.native.sparse_timing import SparsePacker
from gossamer.native.weights import (
    PackedLinear,
    check_linear,
    decomposition_of,
    pack_embedding,
    refer_to,
    some_outputs,
)
from gossamer.nn import StoredEmbedding

_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
Norm = tuple[Tensor, float]  # gain and epsilon


@dataclass
class Layer:
    """A block: attention, then a gated MLP; ``after`` norms are applied to what a half computes, before it is added."""

    before_attention: Norm | None
    qkv: PackedLinear
    query_norm: Norm | None
    key_norm: Norm | None
    rotated_first: bool
    scale: float
    window: int | None
    table: int | None
    output: PackedLinear
    after_attention: Norm | None
    before_mlp: Norm | None
    gate_up: PackedLinear
    gate: str
    down: PackedLinear
    after_mlp: Norm | None


@dataclass
class Decoder:
    """A model, packed. ``tables`` are (inverse frequencies, scaling) of the rotary embeddings."""

    embedding: PackedLinear
    embedding_factor: float
    half_factor: float  # of what a half of a layer computes, before it is added
    layers: list[Layer]
    norm: Norm
    head: PackedLinear
    tables: list[tuple[Tensor, float]]

    def weights(self) -> Iterator[PackedLinear]:
        """Those of all layers, and of the output layer."""
        for layer in self.layers:
            yield from (layer.qkv, layer.output, layer.gate_up, layer.down)
        yield self.head


def record(p: Recorder, model: Decoder) -> None:
    """The forward pass of a decoder."""
    x = p.embed(model.embedding, model.embedding_factor, into="residual")
    for index, layer in enumerate(model.layers):
        h = x if layer.before_attention is None else p.rms_norm(x, *layer.before_attention)
        qkv = p.linear(h, layer.qkv, into="qkv")
        attended = p.attention(
            qkv,
            index,
            table=None if layer.table is None else (layer.table, 2 * len(model.tables[layer.table][0])),
            scale=layer.scale,
            window=layer.window,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
            rotated_first=layer.rotated_first,
        )
        if layer.after_attention is None:
            p.linear_add(p.scaled(attended, model.half_factor), layer.output, x)
        else:
            p.add_rms_norm(p.linear(attended, layer.output, into="half"), *layer.after_attention, x)
        h = x if layer.before_mlp is None else p.rms_norm(x, *layer.before_mlp)
        inner = p.linear(h, layer.gate_up, into="inner", gate=layer.gate)
        if layer.after_mlp is None:
            p.linear_add(p.scaled(inner, model.half_factor), layer.down, x)
        else:
            p.add_rms_norm(p.linear(inner, layer.down, into="half"), *layer.after_mlp, x)
    p.logits(p.rms_norm(x, *model.norm), model.head)


def unsupported(config: Any) -> str:
    """Why a model of this configuration cannot run natively; an empty string if it can."""
    kind = config.model_type
    if kind not in NATIVE_ARCHITECTURES:
        return f"{kind} is not among {', '.join(NATIVE_ARCHITECTURES)}"
    gate = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", None)
    if gate not in _GATES:
        return f"its activation is {gate}"
    if getattr(config, "attn_logit_softcapping", None) or getattr(config, "final_logit_softcapping", None):
        return "it caps its scores or logits"
    return ""


def pack_decoder(
    network: Any,
    pack: SparsePacker,
    attention: list[tuple[float, int | None]],
    adapters: Sequence[Adapter] = (),
) -> Decoder:
    """Pack a model of transformers. Its layers lose their tensors on the way, so that nothing is held twice.

    Args:
        network: a causal language model whose configuration is supported.
        pack: packs its linear layers.
        attention: scale and window of each layer.
        adapters: that rows of a step may have.

    Raises:
        UnsupportedModelError: a layer is of a kind that the kernels do not know.
    """
    config = network.config.get_text_config()
    architecture = NATIVE_ARCHITECTURES[config.model_type]
    body = network.model
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(body.layers)
    tables, table_of = _tables(body.rotary_emb, kinds)
    gate = _GATES[getattr(config, "hidden_activation", None) or config.hidden_act]
    half_factor, rotated = float(getattr(config, "residual_multiplier", 1.0)), 2 * len(tables[0][0])
    for block in body.layers:  # before any of them loses its tensors
        _check_layer(block, architecture, rotated, half_factor)
    layers = []
    packer = AdaptedPacker(pack, network, adapters)
    for index, block in enumerate(body.layers):
        table = table_of[kinds[index]] if _rotates(block.self_attn, config) else None
        layers.append(_pack_layer(block, architecture, packer, rotated, *attention[index], table, gate))
        block.to("meta")
    head = network.lm_head
    tied = head.weight is body.embed_tokens.weight
    if isinstance(body.embed_tokens, StoredEmbedding) and not tied:
        embedding = refer_to(body.embed_tokens.stored, pack.isa)
    else:
        embedding = pack_embedding(body.embed_tokens, pack.isa, pack.float_type)
    factor = float(getattr(body.embed_tokens, "multiplier", getattr(body.embed_tokens, "scalar_embed_scale", 1.0)))
    factor *= float(getattr(config, "embedding_multiplier", 1.0))
    if not tied or head.bias is not None:
        packed_head = pack([head])
    else:
        packed_head = replace(embedding, decomposition=decomposition_of(head))
    norm = _norm(body.norm)
    assert norm is not None
    norm = norm[0] / float(getattr(config, "logits_scaling", 1.0)), norm[1]
    network.to("meta")
    return Decoder(embedding, factor, half_factor, layers, norm, packed_head, tables)


def _check_layer(block: Any, architecture: Architecture, rotated: int, half_factor: float) -> None:
    attention, mlp = block.self_attn, block.mlp
    check_linear(_qkv(attention, architecture, rotated))
    check_linear([attention.o_proj])
    check_linear(_gate_up(mlp))
    check_linear([mlp.down_proj])
    if half_factor != 1 and (attention.o_proj.bias is not None or mlp.down_proj.bias is not None):
        raise UnsupportedModelError("what its layers compute is scaled, biases included")
    for name in (architecture.before_attention, architecture.before_mlp):
        if name:
            _norm(getattr(block, name))


def _pack_layer(
    block: Any,
    architecture: Architecture,
    pack: AdaptedPacker,
    rotated: int,
    scale: float,
    window: int | None,
    table: int | None,
    gate: str,
) -> Layer:
    attention, mlp = block.self_attn, block.mlp

    def norm(name: str) -> Norm | None:
        return _norm(getattr(block, name)) if name else None

    return Layer(
        before_attention=norm(architecture.before_attention),
        qkv=pack(_qkv(attention, architecture, rotated)),
        query_norm=_norm(getattr(attention, architecture.query_norm, None)),
        key_norm=_norm(getattr(attention, architecture.key_norm, None)),
        rotated_first=architecture.rotated_first,
        scale=scale,
        window=window,
        table=table,
        output=pack([attention.o_proj]),
        after_attention=norm(architecture.after_attention),
        before_mlp=norm(architecture.before_mlp),
        gate_up=pack(_gate_up(mlp), gated=True),
        gate=gate,
        down=pack([mlp.down_proj]),
        after_mlp=norm(architecture.after_mlp),
    )


def _qkv(attention: Any, architecture: Architecture, rotated: int) -> list[Any]:
    """The layers of queries, keys and values, with the pairs among ``rotated`` entries of a head in two halves."""
    if hasattr(attention, "qkv_proj"):
        return [attention.qkv_proj]
    query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
    if architecture.neighbours:
        dim = attention.head_dim
        order = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, dim)])
        query, key = (
            some_outputs(each, (torch.arange(0, each.out_features, dim)[:, None] + order).flatten())
            for each in (query, key)
        )
    return [query, key, value]


def _gate_up(mlp: Any) -> list[Any]:
    """The gate and the other factor."""
    if not hasattr(mlp, "gate_up_proj"):
        return [mlp.gate_proj, mlp.up_proj]
    half = mlp.gate_up_proj.out_features // 2
    return [some_outputs(mlp.gate_up_proj, torch.arange(first, first + half)) for first in (0, half)]


def _rotates(attention: Any, config: Any) -> bool:
    """Whether a layer rotates its queries and keys; some layers of some models do not."""
    if config.model_type == "exaone4":
        return attention.sliding_window is None or bool(attention.is_sliding)
    return bool(getattr(attention, "use_rope", True))


def _norm(module: Any) -> Norm | None:
    """Gain and epsilon of an RMSNorm."""
    if module is None:
        return None
    gain: Tensor = module.weight.detach().float().clone()
    name = type(module).__name__
    if name == "Gemma3RMSNorm":
        return gain + 1.0, float(module.eps)
    if name.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return gain, float(module.variance_epsilon)
    raise UnsupportedModelError(f"a {name} is not a norm that the native kernels know")


def _tables(rotary: Any, kinds: list[str]) -> tuple[list[tuple[Tensor, float]], dict[str, int]]:
    """The rotary tables, and which of them a kind of layer uses."""
    if hasattr(rotary, "inv_freq"):
        return [(rotary.inv_freq.detach().clone(), float(rotary.attention_scaling))], dict.fromkeys(kinds, 0)
    names = sorted(set(kinds))
    tables = [
        (getattr(rotary, f"{name}_inv_freq").detach().clone(), float(getattr(rotary, f"{name}_attention_scaling")))
        for name in names
    ]
    if any(not isinstance(frequencies, torch.Tensor) for frequencies, _ in tables):
        raise UnsupportedModelError("its rotary embedding is of a kind that the native kernels do not know")
    return tables, {name: index for index, name in enumerate(names)}
