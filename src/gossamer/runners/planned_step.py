"""Attention of one step, by its plan, in PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gossamer.engine.plan import Rows, StepPlan
from gossamer.engine.slots import Slot
from gossamer.engine.tree import Node
from gossamer.ops.attention import AttentionState, attend, attend_prefix, attend_ragged


@dataclass(frozen=True, slots=True)
class AttentionSettings:
    """What a layer asks for, beside its queries, keys and values."""

    scale: float | None
    window: int | None
    softcap: float | None
    sinks: Tensor | None


class Step(Protocol):
    """What the hook delegates to: query (1, Hq, T, D), key (1, Hkv, T, D), value (1, Hkv, T, Dv) -> (1, T, Hq, Dv)."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor: ...


@dataclass
class PlannedStep:
    """Attention by a :class:`StepPlan`: writes the new keys, attends to every part, merges.

    Keys and values of a layer stand where it comes among the calls: a module that several layers share has no index.
    """

    plan: StepPlan
    _calls: int = 0
    _out: Tensor | None = None
    _lse: Tensor | None = None

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        layer = self._calls
        self._calls += 1
        self._write(layer, key[0], value[0])
        out, lse = self._buffers(query, value.shape[-1])
        scale, window, softcap = settings.scale, settings.window, settings.softcap
        for part in self.plan.segments_within(window):
            segment = part.segment
            keys, values = _stored(segment.source, layer, part.first, segment.length)
            q = _take(query, segment.rows)
            if segment.per_row:
                state = _attend_per_row(q, keys, values, part.seen, scale, softcap)
            else:
                state = attend_prefix(q, keys, values, scale=scale, softcap=softcap, seen=part.seen)
            _put(out, lse, segment.level, segment.rows, state)
        for chunk in self.plan.chunks:
            q, k, v = query[:, :, chunk.rows], key[:, :, chunk.rows], value[:, :, chunk.rows]
            state = attend(q, k, v, scale=scale, causal=True, window=window, softcap=softcap)
            _put(out, lse, chunk.level, chunk.rows, state)
        for index, group in enumerate(self.plan.groups):
            n = len(group.bucket.slots)
            keys = group.bucket.keys[layer][:n, :, : group.longest]
            values = group.bucket.values[layer][:n, :, : group.longest]
            q = _take(query, group.rows)[0].transpose(0, 1)[:, :, None]
            if len(group.slots) < n:  # some of the bucket's sequences take no part in this step
                keys, values = keys[group.slots], values[group.slots]
            state = attend_ragged(q, keys, values, self.plan.bias(index, window), scale=scale, softcap=softcap)
            state = AttentionState(state.out.transpose(0, 2), state.lse.transpose(0, 2))  # (1, Hq, n, ...)
            _put(out, lse, group.level, group.rows, state)
        return self._merge(query, out, lse, settings.sinks)

    def _write(self, layer: int, key: Tensor, value: Tensor) -> None:
        for chunk in self.plan.chunks:
            end = chunk.offset + chunk.rows.stop - chunk.rows.start
            keys, values = _stored(chunk.target, layer, chunk.offset, end)
            keys.copy_(key[:, chunk.rows])
            values.copy_(value[:, chunk.rows])
        for group in self.plan.groups:
            where = (group.slots, slice(None), group.offsets)
            group.bucket.keys[layer][where] = _take(key[None], group.rows)[0].transpose(0, 1)
            group.bucket.values[layer][where] = _take(value[None], group.rows)[0].transpose(0, 1)

    def _buffers(self, query: Tensor, value_dim: int) -> tuple[Tensor, Tensor]:
        """Partial results by level, (levels, T, Hq, Dv) and (levels, T, Hq): what a row does not have keeps -inf."""
        shape = (self.plan.num_levels, query.shape[2], query.shape[1], value_dim)
        if self._out is None or self._lse is None or self._out.shape != shape:
            wide = torch.promote_types(query.dtype, torch.float32)
            self._out = query.new_zeros(shape, dtype=wide)
            self._lse = query.new_full(shape[:-1], -torch.inf, dtype=wide)
        elif shape[0] > 1:
            self._lse.fill_(-torch.inf)
        return self._out, self._lse

    def _merge(self, query: Tensor, out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
        """:func:`~gossamer.ops.attention.merge_states` over the levels; a softmax of their lse is its weights.

        Every row sees itself, so no row is empty in all levels. A sink takes weight and adds nothing.
        """
        if sinks is not None:
            lse = torch.cat([lse, sinks.to(lse.dtype).expand(1, *lse.shape[1:])])
        elif len(out) == 1:  # nothing to merge; the buffer is used again, and the model may work in place
            return out[0].to(query.dtype, copy=True)[None]
        weights = lse.softmax(0)[: len(out), ..., None]
        return (out * weights).sum(0).to(query.dtype)[None]


def _stored(source: Node | Slot, layer: int, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values (Hkv, end - first, dim) of a node or a slot, as views."""
    if isinstance(source, Slot):
        bucket = source.bucket
        return bucket.keys[layer][source.index, :, first:end], bucket.values[layer][source.index, :, first:end]
    assert source.keys is not None and source.values is not None
    return source.keys[layer][:, first:end], source.values[layer][:, first:end]


def _take(x: Tensor, rows: Rows) -> Tensor:
    """Rows of (1, H, T, D)."""
    return x[:, :, rows] if isinstance(rows, slice) else x.index_select(2, rows)


def _put(out: Tensor, lse: Tensor, level: int, rows: Rows, state: AttentionState) -> None:
    """Store a partial result (1, Hq, R, Dv), (1, Hq, R) at its level and rows."""
    out[level, rows] = state.out[0].transpose(0, 1)
    lse[level, rows] = state.lse[0].transpose(0, 1)


def _attend_per_row(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float | None, softcap: float | None
) -> AttentionState:
    """Every row walks the shared keys by itself, as engines do that share storage only. query (1, Hq, R, D)."""
    rows = query.shape[2]
    q = query[0].transpose(0, 1)[:, :, None]
    k, v = key.expand(rows, *key.shape), value.expand(rows, *value.shape)
    if seen is None:
        state = attend(q, k, v, scale=scale, softcap=softcap)
    else:
        bias = torch.zeros(seen.shape[1:], device=seen.device).masked_fill_(~seen[0], -torch.inf)
        state = attend_ragged(q, k, v, bias, scale=scale, softcap=softcap)
    return AttentionState(state.out.transpose(0, 2), state.lse.transpose(0, 2))
