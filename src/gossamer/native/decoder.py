"""The decoders that run natively, as one definition over :class:`~gossamer.native.recorder.Recorder`.

The architectures of :mod:`gossamer.native.architectures` are the same blocks: what one of them lacks is ``None``.
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
from gossamer.native.architectures import NATIVE_ARCHITECTURES
from gossamer.native.recorder import Recorder
from gossamer.native.sparse_timing import SparsePacker
from gossamer.native.weights import PackedLinear, check_linear, decomposition_of, pack_embedding, refer_to
from gossamer.nn import StoredEmbedding

_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
Norm = tuple[Tensor, float]  # gain and epsilon


@dataclass
class Layer:
    """A block: attention, then a gated MLP; ``after`` norms are applied to what a half computes, before it is added."""

    before_attention: Norm
    qkv: PackedLinear
    query_norm: Norm | None
    key_norm: Norm | None
    scale: float
    window: int | None
    table: int
    output: PackedLinear
    after_attention: Norm | None
    before_mlp: Norm
    gate_up: PackedLinear
    gate: str
    down: PackedLinear
    after_mlp: Norm | None


@dataclass
class Decoder:
    """A model, packed. ``tables`` are (inverse frequencies, scaling) of the rotary embeddings."""

    embedding: PackedLinear
    embedding_factor: float
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
        h = p.rms_norm(x, *layer.before_attention)
        qkv = p.linear(h, layer.qkv, into="qkv")
        attended = p.attention(
            qkv,
            index,
            table=layer.table,
            scale=layer.scale,
            window=layer.window,
            query_norm=layer.query_norm,
            key_norm=layer.key_norm,
        )
        if layer.after_attention is None:
            p.linear_add(attended, layer.output, x)
        else:
            p.add_rms_norm(p.linear(attended, layer.output, into="half"), *layer.after_attention, x)
        h = p.rms_norm(x, *layer.before_mlp)
        inner = p.linear(h, layer.gate_up, into="inner", gate=layer.gate)
        if layer.after_mlp is None:
            p.linear_add(inner, layer.down, x)
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
    body = network.model
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(body.layers)
    tables, table_of = _tables(body.rotary_emb, kinds)
    gate = _GATES[getattr(config, "hidden_activation", None) or config.hidden_act]
    for block in body.layers:  # before any of them loses its tensors
        _check_layer(block)
    layers = []
    packer = AdaptedPacker(pack, network, adapters)
    for index, block in enumerate(body.layers):
        layers.append(_pack_layer(block, packer, *attention[index], table_of[kinds[index]], gate))
        block.to("meta")
    head = network.lm_head
    tied = head.weight is body.embed_tokens.weight
    if isinstance(body.embed_tokens, StoredEmbedding) and not tied:
        embedding = refer_to(body.embed_tokens.stored, pack.isa)
    else:
        embedding = pack_embedding(body.embed_tokens, pack.isa, pack.float_type)
    factor = float(getattr(body.embed_tokens, "multiplier", getattr(body.embed_tokens, "scalar_embed_scale", 1.0)))
    if not tied or head.bias is not None:
        packed_head = pack([head])
    else:
        packed_head = replace(embedding, decomposition=decomposition_of(head))
    norm = _norm(body.norm)
    assert norm is not None
    network.to("meta")
    return Decoder(embedding, factor, layers, norm, packed_head, tables)


def _check_layer(block: Any) -> None:
    attention, mlp = block.self_attn, block.mlp
    check_linear([attention.q_proj, attention.k_proj, attention.v_proj])
    check_linear([attention.o_proj])
    check_linear([mlp.gate_proj, mlp.up_proj])
    check_linear([mlp.down_proj])
    _norm(block.input_layernorm)


def _pack_layer(block: Any, pack: AdaptedPacker, scale: float, window: int | None, table: int, gate: str) -> Layer:
    attention, mlp = block.self_attn, block.mlp
    gemma = hasattr(block, "pre_feedforward_layernorm")
    before_attention = _norm(block.input_layernorm)
    before_mlp = _norm(block.pre_feedforward_layernorm if gemma else block.post_attention_layernorm)
    assert before_attention is not None and before_mlp is not None
    return Layer(
        before_attention=before_attention,
        qkv=pack([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_norm=_norm(getattr(attention, "q_norm", None)),
        key_norm=_norm(getattr(attention, "k_norm", None)),
        scale=scale,
        window=window,
        table=table,
        output=pack([attention.o_proj]),
        after_attention=_norm(block.post_attention_layernorm) if gemma else None,
        before_mlp=before_mlp,
        gate_up=pack([mlp.gate_proj, mlp.up_proj], gated=True),
        gate=gate,
        down=pack([mlp.down_proj]),
        after_mlp=_norm(block.post_feedforward_layernorm) if gemma else None,
    )


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
