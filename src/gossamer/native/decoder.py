"""The decoders that run natively, as one definition over :class:`~gossamer.native.recorder.Recorder`.

The architectures of :mod:`gossamer.native.architectures` are the same blocks: what one of them lacks is ``None``.
:func:`gossamer.native.packing.pack_decoder` finds the parts in a model of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gossamer.native.recorder import COMMON_GATES, ExpertLayers, Norm, Recorded, Recorder, Rotary
from gossamer.native.recurrent import LinearAttention, ShortConvolution
from gossamer.native.weights import PackedLinear


@dataclass
class Mlp:
    """``down(gate(x G^T) * (x U^T))``; without a gate ``down(activation(x U^T))``."""

    up: PackedLinear  # of both factors, if there is a gate
    activation: str
    down: PackedLinear
    gated: bool


@dataclass
class Experts:
    """Some of many MLPs for each row, as a router chooses them, and perhaps one for all, times a gate of its own."""

    router: PackedLinear
    layers: ExpertLayers
    gate: str
    shared: Mlp | None
    shared_gate: PackedLinear | None


@dataclass
class Attention:
    """Of one layer; ``gated``: its results times the sigmoid of columns behind queries, keys and values.

    A gate is for so many entries of a result; for 0, there is none.
    """

    qkv: PackedLinear
    query_norm: Norm | None
    key_norm: Norm | None
    rotated_first: bool
    scale: float
    window: int | None
    table: int | None
    sinks: Tensor | None
    gated: int
    output: PackedLinear


@dataclass
class Layer:
    """A block: a mixer, then MLP or experts; ``after`` norms apply to what a half computes, before it is added."""

    before_mixer: Norm | None
    mixer: Attention | ShortConvolution | LinearAttention
    parallel: bool  # the MLP reads what the mixer does not add to yet
    after_mixer: Norm | None
    before_mlp: Norm | None
    mlp: Mlp | Experts
    after_mlp: Norm | None


@dataclass
class Decoder:
    """A model, packed."""

    embedding: PackedLinear
    embedding_factor: float
    positions: PackedLinear | None
    half_factor: float  # of what a half of a layer computes, before it is added
    layers: list[Layer]
    norm: Norm
    head: PackedLinear
    tables: list[Rotary]
    query_table: int | None  # that of queries, if it is not that of keys
    score_cap: float
    logit_cap: float
    state_size: int  # numbers of a text's state; 0: no layer is recurrent

    def weights(self) -> Iterator[PackedLinear]:
        """Those of all layers, and of the output layer."""
        for layer in self.layers:
            mixer = layer.mixer
            yield from (mixer.qkv if isinstance(mixer, Attention) else mixer.inputs, mixer.output)
            if isinstance(layer.mlp, Experts):
                yield from (*layer.mlp.layers.gate_up, *layer.mlp.layers.down)
            if (mlp := layer.mlp.shared if isinstance(layer.mlp, Experts) else layer.mlp) is not None:
                yield from (mlp.up, mlp.down)
        yield self.head


def record(p: Recorder, model: Decoder) -> None:
    """The forward pass of a decoder."""
    x = p.embed(model.embedding, model.embedding_factor, into="residual")
    if model.positions is not None:
        p.embed_positions(model.positions, x)
    attentions = 0
    for layer in model.layers:
        h = x if layer.before_mixer is None else p.norm(x, layer.before_mixer)
        if isinstance(layer.mixer, Attention):
            mixed = record_attention(p, h, layer.mixer, model, attentions)
            attentions += 1
        else:
            mixed = record_recurrent(p, h, layer.mixer)
        inner = record_inner(p, x, layer) if layer.parallel else None
        if layer.after_mixer is None:
            p.linear_add(p.scaled(mixed, model.half_factor), layer.mixer.output, x)
        else:
            p.add_rms_norm(p.linear(mixed, layer.mixer.output, into="half"), layer.after_mixer, x)
        if isinstance(layer.mlp, Experts):
            h = x if layer.before_mlp is None else p.norm(x, layer.before_mlp)
            record_experts(p, h, layer.mlp, model.half_factor, x)
            continue
        inner = inner or record_inner(p, x, layer)
        if layer.after_mlp is None:
            p.linear_add(p.scaled(inner, model.half_factor), layer.mlp.down, x)
        else:
            p.add_rms_norm(p.linear(inner, layer.mlp.down, into="half"), layer.after_mlp, x)
    p.logits(p.norm(x, model.norm), model.head, model.logit_cap)


def record_attention(p: Recorder, h: Recorded, attention: Attention, model: Decoder, number: int) -> Recorded:
    """What attention, the ``number``-th of the model, makes of h."""
    qkv = p.linear(h, attention.qkv, into="qkv")
    table = attention.table
    attended = p.attention(
        qkv,
        number,
        table=None if table is None else (table, 2 * len(model.tables[table].frequencies)),
        scale=attention.scale,
        window=attention.window,
        query_norm=attention.query_norm,
        key_norm=attention.key_norm,
        rotated_first=attention.rotated_first,
        query_table=model.query_table,
        cap=model.score_cap,
        sinks=attention.sinks,
    )
    return p.gated(attended, qkv, attention.gated) if attention.gated else attended


def record_recurrent(p: Recorder, h: Recorded, mixer: ShortConvolution | LinearAttention) -> Recorded:
    """What a recurrent layer makes of h."""
    inputs = p.linear(h, mixer.inputs, into="inputs")
    if isinstance(mixer, ShortConvolution):
        return p.convolve(inputs, mixer.weight, mixer.bias, gated=True, silu=False, state=mixer.state, into="convolved")
    rates = p.linear(h, mixer.rates, into="rates")
    qkv = p.convolve(inputs, mixer.weight, mixer.bias, gated=False, silu=True, state=mixer.state, into="convolved")
    state = mixer.state + (mixer.weight.shape[0] - 1) * mixer.weight.shape[1]
    mixed = p.recurrence(qkv, rates, mixer.rule, state=state, into="mixed")
    return p.norm_gated(mixed, inputs, qkv.width, mixer.norm, groups=mixer.groups, gate_first=mixer.gate_first)


def record_inner(p: Recorder, x: Recorded, layer: Layer) -> Recorded:
    """What the second half of an MLP reads."""
    assert isinstance(layer.mlp, Mlp)
    h = x if layer.before_mlp is None else p.norm(x, layer.before_mlp)
    return _inner(p, h, layer.mlp, "inner")


def _inner(p: Recorder, h: Recorded, mlp: Mlp, into: str) -> Recorded:
    if not mlp.gated:
        return p.activate(p.linear(h, mlp.up, into=into), mlp.activation)
    if mlp.activation in COMMON_GATES:
        return p.linear(h, mlp.up, into=into, gate=mlp.activation)
    return p.glu(p.linear(h, mlp.up, into=into), mlp.activation)


def record_experts(p: Recorder, h: Recorded, experts: Experts, factor: float, total: Recorded) -> None:
    """Add what experts compute of h to ``total``, which h is read from: nothing is added before all have read it."""
    inner = gate = None
    if experts.shared is not None:
        inner = _inner(p, h, experts.shared, "shared inner")
    if experts.shared_gate is not None:
        gate = p.linear(h, experts.shared_gate, into="shared gate")
    p.experts(h, experts.router, experts.layers, gate=experts.gate, factor=factor, total=total)
    if experts.shared is None or inner is None:
        return
    if gate is None:
        p.linear_add(p.scaled(inner, factor), experts.shared.down, total)
    else:
        p.add_gated(p.linear(inner, experts.shared.down, into="half"), gate, factor, total)
