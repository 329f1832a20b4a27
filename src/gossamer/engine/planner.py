"""Turns the scheduler's work into the plan of a step."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch

from gossamer.engine.plan import Chunk, Group, Rows, Segment, StepPlan
from gossamer.engine.scheduler import Work
from gossamer.engine.sequence import Sequence
from gossamer.engine.slots import Bucket, Slot
from gossamer.engine.tree import Node


@dataclass(slots=True)
class PlannedRows:
    """Which logits of a plan belong to whom.

    Attributes:
        sampled: sequences that get a token, in the order of their logits, which come first.
        scored: (sequence, first target index, number of targets), whose logits follow in this order.
    """

    sampled: list[Sequence] = field(default_factory=list)
    scored: list[tuple[Sequence, int, int]] = field(default_factory=list)


@dataclass(slots=True)
class KeyCount:
    """What sharing did in one step, counted in keys per layer.

    Attributes:
        keys_read: keys that this step's attention walks through.
        keys_unshared: keys it would walk through if every sequence attended on its own.
        segments: nodes that two sequences or more attended to together.
    """

    keys_read: int = 0
    keys_unshared: int = 0
    segments: int = 0


def build_plan(works: list[Work], *, per_row: bool, device: torch.device) -> tuple[StepPlan, PlannedRows, KeyCount]:
    """Lay the work out in rows, and find who attends to what.

    Args:
        works: what to compute; a node at most once.
        per_row: sequences attend to shared nodes one by one (the mode that shares storage only).
    """
    single = [w for w in works if w.count == 1 and isinstance(w.target, Slot)]
    # Sequences under the same node stand next to each other, so that a node's rows are a slice.
    single.sort(key=lambda w: [node.serial for node in w.sequence.node.path()] if w.sequence.node else [])
    longer = [w for w in works if not (w.count == 1 and isinstance(w.target, Slot))]
    layout = _Layout(single, longer)
    plan = StepPlan(
        tokens=torch.tensor(layout.tokens, device=device),
        positions=torch.from_numpy(layout.positions).to(device),
        logit_rows=torch.empty(0, dtype=torch.long),
    )
    levels = _Levels(len(layout.tokens))
    count = _add_node_segments(plan, layout, levels, per_row=per_row)
    _add_chunks(plan, layout, levels, count)
    _add_groups(plan, layout, levels, count, device)
    plan.num_levels = levels.count
    rows = PlannedRows()
    plan.logit_rows = torch.tensor(_logit_rows(layout, rows), dtype=torch.long, device=device)
    return plan, rows, count


class _Layout:
    """The rows of the packed batch: first the sequences with one new token, then the chunks."""

    def __init__(self, single: list[Work], longer: list[Work]) -> None:
        self.single = single
        self.longer = longer
        self.tokens: list[int] = [w.sequence.tokens[w.start] for w in single]
        positions = [np.array([w.start for w in single], dtype=np.int64)]
        self.first_rows: list[int] = []
        for work in longer:
            self.first_rows.append(len(self.tokens))
            self.tokens.extend(work.sequence.tokens[work.start : work.start + work.count])
            positions.append(np.arange(work.start, work.start + work.count))
        self.positions = np.concatenate(positions)


class _Levels:
    """Gives every partial result a level that is still free in all of its rows."""

    def __init__(self, rows: int) -> None:
        self._next = np.zeros(rows, dtype=np.int64)
        self.count = 1

    def take(self, rows: slice | np.ndarray) -> int:
        level = int(self._next[rows].max())
        self._next[rows] = level + 1
        self.count = max(self.count, level + 1)
        return level


def _ancestors(work: Work) -> list[Node]:
    """The nodes whose keys all of the work's rows see."""
    if isinstance(work.target, Node):
        return work.target.path()[:-1]
    return work.sequence.node.path() if work.sequence.node else []


def _add_node_segments(plan: StepPlan, layout: _Layout, levels: _Levels, *, per_row: bool) -> KeyCount:
    singles: dict[Node, list[int]] = {}
    chunks: dict[Node, list[slice]] = {}
    for row, work in enumerate(layout.single):
        for node in _ancestors(work):
            singles.setdefault(node, []).append(row)
    for first, work in zip(layout.first_rows, layout.longer, strict=True):
        for node in _ancestors(work):
            chunks.setdefault(node, []).append(slice(first, first + work.count))
    count = KeyCount()
    for node in sorted(singles.keys() | chunks.keys(), key=lambda n: (n.start, n.serial)):
        own, ranges = singles.get(node, []), chunks.get(node, [])
        readers = len(own) + len(ranges)
        count.keys_unshared += readers * len(node)
        if per_row:
            count.keys_read += readers * len(node)
            parts: list[tuple[slice | np.ndarray, bool]] = [(_as_rows(own), True)] if own else []
            parts += [(rows, False) for rows in ranges]
        else:
            count.keys_read += len(node)
            count.segments += readers > 1
            parts = [(_as_rows(own + [row for rows in ranges for row in range(rows.start, rows.stop)]), False)]
        for part, separately in parts:
            level = levels.take(part)
            plan.segments.append(Segment(_to_index(part, plan.tokens.device), node, len(node), node.start, level, separately))
    return count


def _add_chunks(plan: StepPlan, layout: _Layout, levels: _Levels, count: KeyCount) -> None:
    for first, work in zip(layout.first_rows, layout.longer, strict=True):
        rows = slice(first, first + work.count)
        if work.offset:
            start = work.start - work.offset
            plan.segments.append(Segment(rows, work.target, work.offset, start, levels.take(rows)))
        plan.chunks.append(Chunk(rows, work.target, work.offset, work.start, levels.take(rows)))
        count.keys_read += work.offset + work.count
        count.keys_unshared += work.offset + work.count


def _add_groups(plan: StepPlan, layout: _Layout, levels: _Levels, count: KeyCount, device: torch.device) -> None:
    members: dict[Bucket, list[tuple[int, int, int]]] = {}
    for row, work in enumerate(layout.single):
        assert isinstance(work.target, Slot)
        members.setdefault(work.target.bucket, []).append((work.target.index, work.offset, row))
    for bucket, entries in members.items():
        entries.sort()  # the bucket's own order: its slots are then read without a gather
        slots = [index for index, _, _ in entries]
        offsets = [offset for _, offset, _ in entries]
        rows = _as_rows([row for _, _, row in entries])
        plan.groups.append(
            Group(
                rows=_to_index(rows, device),
                bucket=bucket,
                slots=torch.tensor(slots, device=device),
                offsets=torch.tensor(offsets, device=device),
                longest=max(offsets) + 1,
                level=levels.take(rows),
            )
        )
        count.keys_read += sum(offsets) + len(offsets)
        count.keys_unshared += sum(offsets) + len(offsets)


def _as_rows(rows: Many[int]) -> slice | np.ndarray:
    """A slice if the rows are consecutive, else an index array."""
    if rows[-1] - rows[0] == len(rows) - 1 and all(b == a + 1 for a, b in pairwise(rows)):
        return slice(rows[0], rows[-1] + 1)
    return np.array(rows)


def _to_index(rows: slice | np.ndarray, device: torch.device) -> Rows:
    return rows if isinstance(rows, slice) else torch.from_numpy(rows).to(device)


def _logit_rows(layout: _Layout, planned: PlannedRows) -> list[int]:
    sampled: list[int] = []
    scored: list[int] = []
    entries = [*enumerate(layout.single), *zip(layout.first_rows, layout.longer, strict=True)]
    for first, work in entries:
        sequence = work.sequence
        if isinstance(work.target, Node):
            continue
        end = work.start + work.count
        if sequence.generate and end == len(sequence.tokens):
            sampled.append(first + work.count - 1)
            planned.sampled.append(sequence)
        if sequence.score_from is not None:
            # the row of token t - 1 predicts token t
            target = max(work.start + 1, sequence.score_from + len(sequence.scores))
            stop = min(end + 1, sequence.score_until)
            if target < stop:
                scored.extend(range(first + target - 1 - work.start, first + stop - 1 - work.start))
                planned.scored.append((sequence, target, stop - target))
    return sampled + scored
