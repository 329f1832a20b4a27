"""Records a native program. A model's definition (:mod:`gossamer.native.decoder`) calls these methods once; each adds
ops that every step then runs, over buffers with one row per token of the step.

Buffers have names, and layers of the same widths use the same ones: the next overwrites what the last one left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.library import core
from gossamer.native.weights import PackedAdapters, PackedLinear

_TO_BASE_2 = 1.4426950408889634  # the kernels' exponentials have base 2
COMMON_GATES = ("silu", "gelu_tanh")  # which products of weights that are packed in turns end with
LOGITS = 0  # the buffer that the caller provides


@dataclass(frozen=True)
class Recorded:
    """Rows of a buffer, (tokens, width) fp32, perhaps to be normalized when they are read.

    ``gain`` (width) fp32 and ``epsilon`` make it ``x / sqrt(mean(x^2) + epsilon) * gain`` (RMSNorm, arXiv 1910.07467);
    without a gain it is ``x * factor``.
    """

    buffer: int
    width: int
    gain: Tensor | None = None
    epsilon: float = 0.0
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Norm:
    """``x / sqrt(mean(x^2) + epsilon) * gain`` (RMSNorm), or LayerNorm (arXiv 1607.06450) if it is ``centered``.

    Attributes:
        gain: (width) fp32, contiguous.
        epsilon: is added to the mean square, or to the variance.
        centered: the mean is taken off first.
        bias: (width) fp32, contiguous; is added to what is centered.
    """

    gain: Tensor
    epsilon: float
    centered: bool = False
    bias: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Recurrence:
    """Heads of a linear attention with a decay; ``rate``, ``bias`` and ``skip`` (value_heads) fp32, contiguous.

    A gated delta rule, or, with a ``skip``, a state space as in Mamba 2; see csrc/kernels/kernels.h.
    """

    key_heads: int
    value_heads: int
    dk: int
    dv: int
    rate: Tensor
    bias: Tensor
    skip: Tensor | None = None


@dataclass(frozen=True)
class ExpertLayers:
    """The weights of experts, all of one shape.

    Attributes:
        chosen: how many are chosen for a row.
        renormalize: whether the shares of the chosen ones sum up to 1; otherwise those of all do.
        margin: unless 0, the share of each is among those not chosen before it whose logits are as close as that,
            relative to the larger one (Phi-3.5-MoE, arXiv 2409.12136).
        preference: (experts) fp32, is added to the shares of all where some are chosen.
        factors: (experts) fp32, of the shares.
        gate_up, down: of each expert.
    """

    chosen: int
    renormalize: bool
    margin: float
    preference: Tensor | None
    factors: Tensor | None
    gate_up: list[PackedLinear]
    down: list[PackedLinear]


# As a buffer, see csrc/runtime/program.h:
ATTENTION = -1  # the merged result of the last attention
READY = -2  # minus the number of rows that are made ready in fp32: these
_PANEL = 32  # columns of a packed panel
# As Rows there: which rows of a step an op takes.
ALL, WANTED, GATHERED, CHOSEN = range(4)


class Recorder:
    """See the module's documentation.

    Args:
        isa: instruction set.
        heads: query heads of each layer.
        layers: key and value heads, and entries of a head, of each layer that has keys and values.
        kv: type of keys and values, ``"bfloat16"``, ``"float32"`` or ``"int8"``.
        max_rows: most tokens of a step.
        invariant: a token's results are the same, to the bit, whatever other tokens the step has.
    """

    def __init__(
        self,
        isa: str,
        *,
        heads: int,
        layers: Sequence[tuple[int, int]],
        kv: str,
        max_rows: int,
        invariant: bool = False,
    ) -> None:
        library = core()
        assert library is not None
        self.native = library.Program(isa, heads, list(layers), kv, max_rows, invariant)
        self.heads, self.layers = heads, list(layers)
        self._buffers: dict[tuple[str, int], Recorded] = {}
        self._prepared: dict[tuple[str, int, int, str], int] = {}

    def _buffer(self, name: str, width: int, times: int = 1) -> Recorded:
        if (name, width) not in self._buffers:
            self._buffers[name, width] = Recorded(self.native.buffer(width, times), width)
        return self._buffers[name, width]

    def embed(self, table: PackedLinear, factor: float = 1.0, *, into: str) -> Recorded:
        """Rows of the table, times ``factor``."""
        out = self._buffer(into, table.inputs)
        self.native.embed(table.handle, factor, out.buffer)
        return out

    def embed_positions(self, table: PackedLinear, total: Recorded) -> None:
        """``total += `` the rows of the table of the tokens' positions."""
        self.native.embed_positions(table.handle, total.buffer)

    def norm(self, x: Recorded, norm: Norm) -> Recorded:
        """x, normalized. RMSNorm costs nothing here: whoever reads the result computes it."""
        if not norm.centered:
            return Recorded(x.buffer, x.width, norm.gain, norm.epsilon)
        out = self._buffer("normed", x.width)
        bias = 0 if norm.bias is None else norm.bias.data_ptr()
        self.native.layer_norm(x.buffer, norm.gain.data_ptr(), bias, norm.epsilon, x.width, out.buffer)
        return out

    def glu(self, x: Recorded, gate: str, *, sorted_rows: bool = False) -> Recorded:
        """The first half of x, gated, times the second: in the place of the first."""
        half = x.width // 2
        self.native.glu(x.buffer, half, gate, sorted_rows)
        return Recorded(x.buffer, half)

    def activate(self, x: Recorded, by: str) -> Recorded:
        """An activation of x, in its place."""
        self.native.activate(x.buffer, x.width, by)
        return x

    def scaled(self, x: Recorded, factor: float) -> Recorded:
        """x times ``factor``, which whoever reads it computes."""
        return x if factor == 1 else Recorded(x.buffer, x.width, factor=factor)

    def linear(self, x: Recorded, weight: PackedLinear, *, into: str, gate: str = "") -> Recorded:
        """``x W^T + b``; for a gated weight ``gate(x G^T) * (x U^T)``."""
        out = self._buffer(into, weight.outputs)
        self._linear(x, weight, out.buffer, add=False, gate=gate)
        return out

    def linear_add(self, x: Recorded, weight: PackedLinear, total: Recorded) -> None:
        """``total += x W^T + b``."""
        self._linear(x, weight, total.buffer, add=True)

    def add_rms_norm(self, x: Recorded, norm: Norm, total: Recorded, factor: float = 1.0) -> None:
        """``total = factor (total + rms_norm(x))``, of all columns, or of as many together as the norm has gains."""
        size = len(norm.gain)
        groups = x.width // size
        self.native.add_normed(x.buffer, norm.gain.data_ptr(), norm.epsilon, size, groups, factor, total.buffer)

    def multiply(self, x: Recorded, by: Recorded, first: int) -> Recorded:
        """x times the columns of ``by`` from ``first`` on, in the place of x."""
        self.native.multiply(x.buffer, by.buffer, first, x.width)
        return x

    def only_wanted(self, *kept: Recorded) -> tuple[Recorded, ...]:
        """From here on, rows are those alone whose logits are needed; nothing may be stored any more.

        Args:
            kept: what is read from here on.

        Returns:
            Their rows.
        """
        taken = tuple(self._buffer(f"wanted {place}", each.width) for place, each in enumerate(kept))
        for each, out in zip(kept, taken, strict=True):
            self.native.take_wanted(each.buffer, each.width, out.buffer)
        self.native.only_wanted()
        return taken

    def zeros(self, width: int, *, into: str) -> Recorded:
        """Rows of zeros, to be added to."""
        out = self._buffer(into, width)
        self.native.clear(out.buffer)
        return out

    def experts(
        self,
        x: Recorded,
        router: PackedLinear,
        experts: ExpertLayers,
        *,
        gate: str,
        factor: float,
        total: Recorded,
        routed: Recorded | None = None,
    ) -> None:
        """``total += factor sum_e s_e down_e(gate(x G_e^T) * (x U_e^T))`` over the experts that the router chooses.

        Args:
            x: what router and experts read, the former unless it reads ``routed``.
            router: the experts' logits.
            experts: how many are chosen for a row, and their weights.
            gate: the activation.
            factor: of the sum.
            total: is added to.
        """
        up, down, times = experts.gate_up[0], experts.down[0], experts.chosen
        logits = self.linear(routed or x, router, into="router")
        preference, factors = (0 if each is None else each.data_ptr() for each in (experts.preference, experts.factors))
        count, margin = len(experts.gate_up), experts.margin
        self.native.route(logits.buffer, count, times, experts.renormalize, margin, preference, factors)
        ready = self._ready(up.type, x.width, times=times)
        self._prepare(x, ready, 0, up.outlier_rule(), GATHERED)
        inner = self._buffer("of experts", up.outputs, times)
        in_product = gate in COMMON_GATES
        self.native.experts([each.handle for each in experts.gate_up], ready, inner.buffer, gate if in_product else "")
        if not in_product:
            inner = self.glu(inner, gate, sorted_rows=True)
        ready = self._ready(down.type, inner.width, times=times)
        self._prepare(inner, ready, 0, down.outlier_rule(), CHOSEN)
        out = self._buffer("from experts", down.outputs, times)
        self.native.experts([each.handle for each in experts.down], ready, out.buffer, "")
        self.native.combine(out.buffer, out.width, factor, total.buffer)

    def add_gated(self, x: Recorded, gate: Recorded, factor: float, total: Recorded) -> None:
        """``total += factor sigmoid(gate) x``, for a gate of one entry."""
        self.native.add_gated(x.buffer, gate.buffer, x.width, factor, total.buffer)

    def attention(
        self,
        qkv: Recorded,
        layer: int,
        *,
        table: tuple[int, int] | None,
        scale: float,
        window: int | None,
        stores: bool = True,
        query_norm: Norm | None = None,
        key_norm: Norm | None = None,
        value_norm: bool = False,
        rotated_first: bool = False,
        query_table: int | None = None,
        cap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> Recorded:
        """Rotate queries and keys, store keys and values, attend to what the step's plan says.

        Args:
            qkv: queries, keys and values of the token, one after the other; queries alone if it does not store.
            layer: whose keys and values.
            stores: whether it has keys and values of its own; otherwise those of an earlier layer are there already.
            table: index of the rotary table, and how many entries of a head it rotates; ``None``: none are rotated.
            scale: of the scores.
            window: a token sees so many keys at most, its own included.
            query_norm, key_norm: RMSNorm of queries and keys, of every head (D) or of all together (heads D).
            value_norm: whether each head's values are normalized like keys, without gains.
            rotated_first: they are rotated before that, not after it.
            query_table: index of the table of queries, if they have one of their own.
            cap: scores become ``cap tanh(score / cap)``; 0: they stay.
            sinks: (heads) fp32 scores of a key whose value is 0, and which all tokens see.
        """
        index, rotated = table or (0, 0)
        norms = [norm for norm in (query_norm, key_norm) if norm is not None]
        addresses = [0 if norm is None else norm.gain.data_ptr() for norm in (query_norm, key_norm)]
        epsilon = norms[0].epsilon if norms else 0.0
        dim = self.layers[layer][1]
        whole = bool(norms) and len(norms[0].gain) != dim
        queries, scale = index if query_table is None else query_table, scale * _TO_BASE_2
        how = value_norm, whole, rotated_first, epsilon, scale, queries
        self.native.rotate_and_store(qkv.buffer, layer, stores, index, rotated, *addresses, *how)
        sinks = None if sinks is None else (sinks * _TO_BASE_2).contiguous()
        self.native.attend(layer, window or 0, cap * _TO_BASE_2, 0 if sinks is None else sinks.data_ptr())
        return Recorded(ATTENTION, self.heads * dim)

    def convolve(
        self, x: Recorded, weight: Tensor, bias: Tensor | None, *, gated: bool, silu: bool, state: int, into: str
    ) -> Recorded:
        """A causal convolution of each channel of each text, ``y_r = bias + sum_t w_t z_{r - taps + 1 + t}``.

        Args:
            x: the channels are its first columns; if it is ``gated``, two columns more for each: of the output, and of
                the input (z is their product).
            weight: (taps, channels) fp32.
            bias: (channels) fp32.
            gated: as in LFM2: ``gate * conv(factor * x)`` with the columns (factor, gate, x).
            silu: of the output.
            state: where its part of a text's state begins.
            into: the buffer.
        """
        taps, channels = weight.shape
        out = self._buffer(into, channels)
        factor, gate = (2 * channels, channels) if gated else (-1, -1)
        address = 0 if bias is None else bias.data_ptr()
        self.native.convolve(
            x.buffer, channels, taps, factor, gate, weight.data_ptr(), address, silu, state, out.buffer
        )
        return out

    def recurrence(self, qkv: Recorded, rates: Recorded, rule: Recurrence, *, state: int, into: str) -> Recorded:
        """A linear attention over the rows of each text: (heads dv) columns.

        Args:
            qkv: queries, keys and values of the delta rule; values, keys and queries of a state space.
            rates: logits of the delta rule's beta and of its steps; those of a state space's steps.
            rule: see :class:`Recurrence`.
            state: where its part of a text's state begins.
            into: the buffer.
        """
        out = self._buffer(into, rule.value_heads * rule.dv)
        self.native.recurrence(
            qkv.buffer,
            rates.buffer,
            rule.key_heads,
            rule.value_heads,
            rule.dk,
            rule.dv,
            rule.rate.data_ptr(),
            rule.bias.data_ptr(),
            0 if rule.skip is None else rule.skip.data_ptr(),
            state,
            out.buffer,
        )
        return out

    def norm_gated(
        self, x: Recorded, gates: Recorded, first: int, norm: Norm, *, groups: int, gate_first: bool
    ) -> Recorded:
        """In place, the RMSNorm of each of ``groups`` parts, and silu of the gates in columns from ``first`` on.

        ``rms_norm(x silu(gate))`` if the gate comes first, otherwise ``rms_norm(x) silu(gate)``.
        """
        gain = norm.gain.data_ptr()
        self.native.norm_gated(x.buffer, gates.buffer, first, groups, gain, norm.epsilon, x.width, gate_first)
        return x

    def gated(self, x: Recorded, gates: Recorded, each: int) -> Recorded:
        """``x sigmoid(gate)``, with a gate for ``each`` columns of x, in the last columns of ``gates``."""
        rows = self._ready("float32", x.width)
        self._prepare(x, rows, 0, ("none", False, 0.0, 0))
        self.native.gate_ready(rows, gates.buffer, gates.width - x.width // each, each)
        return Recorded(READY - rows, x.width)

    def attention_alone(self, layer: int) -> None:
        """Attention of queries that are 0, and the merging of its partial results: to be timed."""
        self.native.attend(layer, 0, 0.0, 0)
        width = self.heads * self.layers[layer][1]
        self._prepare(Recorded(ATTENTION, width), self._ready("float32", width), 0, ("none", False, 0.0, 0))

    def logits(self, x: Recorded, head: PackedLinear, cap: float = 0.0) -> None:
        """The output layer, for the rows whose logits are needed; and the largest of each.

        Args:
            x: what the output layer reads.
            head: the output layer.
            cap: logits become ``cap tanh(logit / cap)``; 0: they stay.
        """
        self._linear(x, head, LOGITS, add=False, last=True)
        if cap:
            self.native.cap_logits(head.outputs, cap)
        self.native.argmax(head.outputs)

    def _linear(
        self, x: Recorded, weight: PackedLinear, to: int, *, add: bool, gate: str = "", last: bool = False
    ) -> None:
        addend = -1
        if weight.adapters is not None:
            rows = self._ready("float32", x.width)
            self._prepare(x, rows, 0, ("none", False, 0.0, 0))
            addend = self._low_rank(rows, weight.adapters)
            x = Recorded(READY - rows, x.width)  # what attention has left is merged once
        order = 0 if weight.input_order is None else weight.input_order.data_ptr()
        ready = self._ready(weight.type, x.width)
        if x.buffer != READY - ready:
            self._prepare(x, ready, order, weight.outlier_rule(), WANTED if last else ALL)
        self.native.linear(weight.handle, ready, to, add, gate, last, addend)

    def _ready(self, type_: str, width: int, of: str = "inputs", times: int = 1) -> int:
        """The number of rows made ready in this type."""
        key = (type_, width, times, of)
        if key not in self._prepared:
            self._prepared[key] = self.native.prepared(type_, width, times)
        return self._prepared[key]

    def _prepare(
        self, x: Recorded, ready: int, order: int, rule: tuple[str, bool, float, int], which: int = ALL
    ) -> None:
        gain, number = (0, x.factor) if x.gain is None else (x.gain.data_ptr(), x.epsilon)
        self.native.prepare(x.buffer, gain, number, x.width, order, ready, *rule, which)

    def _low_rank(self, rows: int, adapters: PackedAdapters) -> int:
        """The buffer with what adapters add to the product of these rows."""
        between = self._ready("float32", -(-adapters.rank // _PANEL) * _PANEL, "adapters")
        out = self._buffer(f"adapters {adapters.outputs}", adapters.outputs).buffer
        self.native.low_rank(adapters.downs, adapters.ups, rows, between, out)
        return out


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding (arXiv 2104.09864).

    Attributes:
        frequencies: (D / 2) inverse frequencies.
        scaling: of what is rotated.
        growth: (beta, length): it is scaled by ``1 + beta log(1 + floor(position / length))`` too.
    """

    frequencies: Tensor
    scaling: float
    growth: tuple[float, float] | None = None

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, (length, D / 2) fp32 each, of ``position * frequency``, scaled."""
        positions = torch.arange(length).float()[:, None]
        scaling = torch.full_like(positions, self.scaling)
        if self.growth is not None:
            beta, often = self.growth
            scaling *= 1 + beta * torch.log(1 + torch.floor(positions / often))
        angles = positions * self.frequencies.float()
        return (angles.cos() * scaling).contiguous(), (angles.sin() * scaling).contiguous()


def step_input(**fields: int) -> Any:
    """A ``StepInput`` (csrc/runtime/program.h) with these fields set: addresses and numbers."""
    library = core()
    assert library is not None
    step = library.StepInput()
    for name, value in fields.items():
        setattr(step, name, value)
    return step
