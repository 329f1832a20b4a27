"""The decoders that run natively, as one definition over :class:`~gossamer.native.recorder.Recorder`.

The architectures of :mod:`gossamer.native.architectures` are the same blocks: what one of them lacks is ``None``.
:func:`gossamer.native.packing.pack_decoder` finds the parts in a model of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from gossamer.native.layer_inputs import LayerInput, LayerInputs
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
class Apart:
    """Norms of experts beside an MLP: what the router reads, what they read, and what comes out of MLP and experts."""

    router: Norm
    before: Norm
    after_mlp: Norm
    after: Norm


@dataclass
class Experts:
    """Some of many MLPs for each row, as a router chooses them. An MLP for all rows is times ``shared_gate``."""

    router: PackedLinear
    layers: ExpertLayers
    gate: str
    shared_gate: PackedLinear | None
    apart: Apart | None


@dataclass
class Attention:
    """Of one layer; ``gated``: its results times the sigmoid of columns behind queries, keys and values.

    A gate is for so many entries of a result; for 0, there is none. Keys and values are the ``cache``-th of the model,
    which it stores, or an earlier layer did.
    """

    qkv: PackedLinear
    cache: int
    stores: bool
    query_norm: Norm | None
    key_norm: Norm | None
    value_norm: bool
    rotated_first: bool
    scale: float
    window: int | None
    table: int | None
    sinks: Tensor | None
    gated: int
    output: PackedLinear


@dataclass
class Layer:
    """A block: a mixer, then MLP, experts or both; ``after`` norms apply to what a half adds."""

    before_mixer: Norm | None
    mixer: Attention | ShortConvolution | LinearAttention
    parallel: bool  # the MLP reads what the mixer does not add to yet
    after_mixer: Norm | None
    before_mlp: Norm | None
    mlp: Mlp | None
    experts: Experts | None
    after_mlp: Norm | None
    input: LayerInput | None
    factor: float  # of what goes to the next layer


@dataclass
class Decoder:
    """A model, packed."""

    embedding: PackedLinear
    embedding_factor: float
    positions: PackedLinear | None
    inputs: LayerInputs | None
    half_factor: float  # of what a half of a layer computes, before it is added
    layers: list[Layer]
    norm: Norm
    head: PackedLinear
    tables: list[Rotary]
    query_table: int | None  # that of queries, if it is not that of keys
    score_cap: float
    logit_cap: float
    wanted_from: int  # the layer from which on rows are of no use whose logits nobody needs
    state_size: int  # numbers of a text's state; 0: no layer is recurrent

    def weights(self) -> Iterator[PackedLinear]:
        """Those of all layers, and of the output layer."""
        for layer in self.layers:
            mixer = layer.mixer
            yield from (mixer.qkv if isinstance(mixer, Attention) else mixer.inputs, mixer.output)
            if layer.experts is not None:
                yield from (*layer.experts.layers.gate_up, *layer.experts.layers.down)
            if layer.mlp is not None:
                yield from (layer.mlp.up, layer.mlp.down)
            if layer.input is not None:
                yield from (layer.input.gate, layer.input.projection)
        yield self.head


def record(p: Recorder, model: Decoder) -> None:
    """The forward pass of a decoder."""
    x = p.embed(model.embedding, model.embedding_factor, into="residual")
    if model.positions is not None:
        p.embed_positions(model.positions, x)
    inputs = None if model.inputs is None else model.inputs.record(p, x)
    for index, layer in enumerate(model.layers):
        if index == model.wanted_from:
            x, *others = p.only_wanted(x, *(() if inputs is None else (inputs,)))
            inputs = others[0] if others else None
        h = x if layer.before_mixer is None else p.norm(x, layer.before_mixer)
        if isinstance(layer.mixer, Attention):
            mixed = record_attention(p, h, layer.mixer, model)
        else:
            mixed = record_recurrent(p, h, layer.mixer)
        inner = record_inner(p, x, layer) if layer.parallel else None
        if layer.after_mixer is None:
            p.linear_add(p.scaled(mixed, model.half_factor), layer.mixer.output, x)
        else:
            p.add_rms_norm(p.linear(mixed, layer.mixer.output, into="half"), layer.after_mixer, x)
        if layer.experts is None:
            record_mlp(p, x, layer, inner or record_inner(p, x, layer), model.half_factor)
        elif layer.experts.apart is None:
            record_experts(p, x, layer, layer.experts, model.half_factor)
        else:
            record_experts_apart(p, x, layer, layer.experts, layer.experts.apart)
        if layer.input is not None and inputs is not None:
            layer.input.record(p, inputs, x, layer.factor)
    p.logits(p.norm(x, model.norm), model.head, model.logit_cap)


def record_attention(p: Recorder, h: Recorded, attention: Attention, model: Decoder) -> Recorded:
    """What attention makes of h."""
    qkv = p.linear(h, attention.qkv, into="qkv")
    table = attention.table
    attended = p.attention(
        qkv,
        attention.cache,
        stores=attention.stores,
        table=None if table is None else (table, 2 * len(model.tables[table].frequencies)),
        scale=attention.scale,
        window=attention.window,
        query_norm=attention.query_norm,
        key_norm=attention.key_norm,
        value_norm=attention.value_norm,
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


def record_mlp(p: Recorder, x: Recorded, layer: Layer, inner: Recorded, factor: float) -> None:
    """Add what an MLP makes of ``inner`` to x, times ``factor``."""
    assert layer.mlp is not None
    if layer.after_mlp is None:
        p.linear_add(p.scaled(inner, factor), layer.mlp.down, x)
    else:
        passed_on = layer.factor if layer.input is None else 1.0
        p.add_rms_norm(p.linear(inner, layer.mlp.down, into="half"), layer.after_mlp, x, passed_on)


def record_inner(p: Recorder, x: Recorded, layer: Layer) -> Recorded:
    """What the second half of an MLP reads."""
    assert layer.mlp is not None
    h = x if layer.before_mlp is None else p.norm(x, layer.before_mlp)
    return _inner(p, h, layer.mlp, "inner")


def _inner(p: Recorder, h: Recorded, mlp: Mlp, into: str) -> Recorded:
    if not mlp.gated:
        return p.activate(p.linear(h, mlp.up, into=into), mlp.activation)
    if mlp.activation in COMMON_GATES:
        return p.linear(h, mlp.up, into=into, gate=mlp.activation)
    return p.glu(p.linear(h, mlp.up, into=into), mlp.activation)


def record_experts(p: Recorder, x: Recorded, layer: Layer, experts: Experts, factor: float) -> None:
    """Add what experts compute to x, times ``factor``: nothing is added before all have read it."""
    h = x if layer.before_mlp is None else p.norm(x, layer.before_mlp)
    shared, gate = layer.mlp, None
    inner = None if shared is None else _inner(p, h, shared, "shared inner")
    if experts.shared_gate is not None:
        gate = p.linear(h, experts.shared_gate, into="shared gate")
    p.experts(h, experts.router, experts.layers, gate=experts.gate, factor=factor, total=x)
    if shared is None or inner is None:
        return
    if gate is None:
        p.linear_add(p.scaled(inner, factor), shared.down, x)
    else:
        p.add_gated(p.linear(inner, shared.down, into="half"), gate, factor, x)


def record_experts_apart(p: Recorder, x: Recorded, layer: Layer, experts: Experts, apart: Apart) -> None:
    """Add what an MLP and experts compute side by side to x, each normalized, and so is their sum."""
    assert layer.mlp is not None
    assert layer.after_mlp is not None
    both = p.zeros(x.width, into="both")
    p.add_rms_norm(p.linear(record_inner(p, x, layer), layer.mlp.down, into="half"), apart.after_mlp, both)
    of_experts = p.zeros(x.width, into="of all experts")
    routed = p.norm(x, apart.router)
    h = p.norm(x, apart.before)
    p.experts(h, experts.router, experts.layers, gate=experts.gate, factor=1.0, total=of_experts, routed=routed)
    p.add_rms_norm(of_experts, apart.after, both)
    p.add_rms_norm(both, layer.after_mlp, x, layer.factor if layer.input is None else 1.0)
