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
from gossamer.native.recorder import ExpertLayers, Recorded, Recorder
from gossamer.native.sparse_timing import SparsePacker
from gossamer.native.weights import (
    PackedLinear,
    check_linear,
    decomposition_of,
    linear_of,
    pack_embedding,
    pack_linear,
    refer_to,
    some_outputs,
)
from gossamer.nn import Int8Linear, StoredEmbedding
from gossamer.nn.int8_linear import Decomposition

_GATES = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
Norm = tuple[Tensor, float]  # gain and epsilon


@dataclass
class Mlp:
    """``down(gate(x G^T) * (x U^T))``."""

    gate_up: PackedLinear
    gate: str
    down: PackedLinear


@dataclass
class Experts:
    """Some of many MLPs for each row, as a router chooses them, and perhaps one for all, times a gate of its own."""

    router: PackedLinear
    layers: ExpertLayers
    gate: str
    shared: Mlp | None
    shared_gate: PackedLinear | None


@dataclass
class Layer:
    """A block: attention, then MLP or experts; ``after`` norms apply to what a half computes, before it is added."""

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
    mlp: Mlp | Experts
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
            yield from (layer.qkv, layer.output)
            if isinstance(layer.mlp, Experts):
                yield from (*layer.mlp.layers.gate_up, *layer.mlp.layers.down)
            if (mlp := layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp) is not None:
                yield from (mlp.gate_up, mlp.down)
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
        if isinstance(layer.mlp, Experts):
            record_experts(p, h, layer.mlp, model.half_factor, x)
            continue
        inner = p.linear(h, layer.mlp.gate_up, into="inner", gate=layer.mlp.gate)
        if layer.after_mlp is None:
            p.linear_add(p.scaled(inner, model.half_factor), layer.mlp.down, x)
        else:
            p.add_rms_norm(p.linear(inner, layer.mlp.down, into="half"), *layer.after_mlp, x)
    p.logits(p.rms_norm(x, *model.norm), model.head)


def record_experts(p: Recorder, h: Recorded, experts: Experts, factor: float, total: Recorded) -> None:
    """Add what experts compute of h to ``total``, which h is read from: nothing is added before all have read it."""
    shared = None
    if experts.shared is not None and experts.shared_gate is not None:
        inner = p.linear(h, experts.shared.gate_up, into="shared inner", gate=experts.shared.gate)
        shared = p.linear(inner, experts.shared.down, into="half"), p.linear(h, experts.shared_gate, into="shared gate")
    p.experts(h, experts.router, experts.layers, gate=experts.gate, factor=factor, total=total)
    if shared is not None:
        p.add_gated(*shared, factor, total)


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
    if getattr(config, "clip_qkv", None):
        return "it clips its queries, keys and values"
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
    int8 = _decomposition_of_experts(network)
    half_factor, rotated = float(getattr(config, "residual_multiplier", 1.0)), 2 * len(tables[0][0])
    for block in body.layers:  # before any of them loses its tensors
        _check_layer(block, architecture, rotated, half_factor)
    layers = []
    packer = AdaptedPacker(pack, network, adapters)
    for index, block in enumerate(body.layers):
        table = table_of[kinds[index]] if _rotates(block.self_attn, config) else None
        layers.append(_pack_layer(block, architecture, packer, rotated, *attention[index], table, gate, int8))
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
    attention, mlp = block.self_attn, getattr(block, architecture.mlp)
    check_linear(_qkv(attention, architecture, rotated))
    check_linear([attention.o_proj])
    added = [attention.o_proj]
    if hasattr(mlp, "experts"):
        _check_experts(mlp, architecture)
        mlp = getattr(mlp, "shared_expert", None)
    if mlp is not None:
        check_linear(_gate_up(mlp))
        check_linear([mlp.down_proj])
        added.append(mlp.down_proj)
    if half_factor != 1 and any(layer.bias is not None for layer in added):
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
    int8: Decomposition | None,
) -> Layer:
    attention, mlp = block.self_attn, getattr(block, architecture.mlp)

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
        mlp=_pack_mlp(mlp, pack, gate)
        if not hasattr(mlp, "experts")
        else _pack_experts(mlp, architecture, pack, gate, int8),
        after_mlp=norm(architecture.after_mlp),
    )


def _pack_mlp(mlp: Any, pack: AdaptedPacker, gate: str) -> Mlp:
    return Mlp(pack(_gate_up(mlp), gated=True), gate, pack([mlp.down_proj]))


def _check_experts(mlp: Any, architecture: Architecture) -> None:
    """Raises for routers and experts that are computed in another way than :class:`Experts` says."""
    router: Any = getattr(mlp, architecture.router, None)
    experts = mlp.experts
    known = {"gate", "router", "experts", "shared_expert", "shared_expert_gate"}
    others = [name for name, _ in mlp.named_children() if name not in known]
    if others or not isinstance(getattr(router, "top_k", None), int):
        raise UnsupportedModelError(f"a {type(mlp).__name__} chooses its experts in a way that the kernels do not know")
    names = {name for name, _ in (*experts.named_parameters(), *router.named_parameters(), *experts.named_buffers())}
    if names != {"gate_up_proj", "down_proj", "weight"}:
        raise UnsupportedModelError(f"a {type(experts).__name__} has weights that the native kernels do not know")
    count, double, width = experts.gate_up_proj.shape
    shapes = experts.down_proj.shape == (count, width, double // 2) and router.weight.shape == (count, width)
    if not shapes or not 0 < router.top_k <= count:
        raise UnsupportedModelError(
            f"{count} experts of {tuple(experts.gate_up_proj.shape[1:])} and {tuple(experts.down_proj.shape)} weights, "
            f"and a router of {tuple(router.weight.shape)} that chooses {router.top_k}, do not fit together"
        )


def _decomposition_of_experts(network: Any) -> Decomposition | None:
    """With what experts become int8 as they are packed: that of the model's int8 layers, ``None`` if it has none.

    Their weights are one tensor in transformers, which loading leaves in floating point.
    """
    rule = next((layer.decomposition for layer in network.modules() if isinstance(layer, Int8Linear)), None)
    if rule is None or rule.outliers == "token":
        return rule
    return replace(rule, outliers=None if rule.outliers is None else "token")


def _pack_experts(
    mlp: Any, architecture: Architecture, pack: AdaptedPacker, gate: str, int8: Decomposition | None
) -> Experts:
    router, experts = getattr(mlp, architecture.router), mlp.experts
    half = experts.gate_up_proj.shape[1] // 2

    def layer(weight: Tensor) -> Any:
        return linear_of(weight) if int8 is None else Int8Linear.from_linear(linear_of(weight), decomposition=int8)

    gate_up, down = [], []
    for both, last in zip(experts.gate_up_proj.detach(), experts.down_proj.detach(), strict=True):
        gate_up.append(pack([layer(both[:half]), layer(both[half:])], gated=True))
        down.append(pack([layer(last)]))
    shared, shared_gate = getattr(mlp, "shared_expert", None), getattr(mlp, "shared_expert_gate", None)
    return Experts(
        router=pack_linear([linear_of(router.weight.detach())], pack.isa, "float32"),
        layers=ExpertLayers(router.top_k, bool(getattr(router, "norm_topk_prob", True)), gate_up, down),
        gate=gate,
        shared=None if shared is None else _pack_mlp(shared, pack, gate),
        shared_gate=None if shared_gate is None else pack_linear([shared_gate], pack.isa, "float32"),
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
