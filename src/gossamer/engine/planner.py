"""Turns the scheduler's work into the plan of a step."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from itertools import groupby, pairwise, zip_longest
from operator import itemgetter

import numpy as np
import torch

from gossamer.engine.plan import AdapterRun, Chunk, Group, Rows, Segment, StateRun, StepPlan
from gossamer.engine.sampling import SamplingState
from gossamer.engine.scheduler import Work
from gossamer.engine.sequence import Sequence
from gossamer.engine.slots import Bucket, Slot
from gossamer.engine.tree import Node, PrefixTree


@dataclass(slots=True)
class Burst:
    """A sequence's rows among the drawn ones, from ``first`` on: of its next token, and behind each drafted one."""

    work: Work
    first: int

    @property
    def sequence(self) -> Sequence:
        """Whose rows they are."""
        return self.work.sequence

    def emitted(self, chosen: Many[int]) -> list[int]:
        """The tokens that come, of those ``chosen`` in all rows: as long as the drafted one is chosen, one more."""
        tokens = []
        for drafted, token in zip_longest(self.work.draft, chosen[self.first : self.first + len(self.work.draft) + 1]):
            tokens.append(token)
            if token != drafted:
                break
        return tokens


@dataclass(slots=True)
class PlannedRows:
    """Which logits of a plan belong to whom.

    Attributes:
        sampled: the sequence of each row in which a token is chosen, in the order of their logits, which come first.
        scored: (sequence, first target index, number of targets), whose logits follow in this order.
        drawn: of the sampled, the rows whose token the sampler chooses, with their ``states``.
        bursts: the sequences that these are of.
        branching: the others, hypotheses of beam searches, as (row, sequence).
    """

    sampled: list[Sequence] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    states: list[SamplingState] = field(default_factory=list)
    bursts: list[Burst] = field(default_factory=list)
    branching: list[tuple[int, Sequence]] = field(default_factory=list)
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


class Planner:
    """Plans step after step. Most steps only go on where the last one ended, and reuse its plan.

    Args:
        tree: where the shared keys are.
        per_row: sequences attend to shared nodes one by one (the mode that shares storage only).
    """

    def __init__(self, tree: PrefixTree, *, per_row: bool) -> None:
        self.tree = tree
        self.per_row = per_row
        self._key: object = None
        self._start = 0  # position of the first row
        self._last: tuple[StepPlan, PlannedRows, KeyCount] | None = None

    def plan(self, works: list[Work]) -> tuple[StepPlan, PlannedRows, KeyCount]:
        """Lay the work out in rows, and find who attends to what. A node is in ``works`` at most once."""
        if any(work.draft for work in works):  # the next step goes on from what is right of it
            self._key = self._last = None
            return self._build(works)
        # A slot moves within its bucket when another one is given back, so its index is part of the key.
        places = [work.target.index if isinstance(work.target, Slot) else -1 for work in works]
        key = (self.tree.version, [(work.sequence, work.target) for work in works], places)
        if self._last is not None and key == self._key:
            plan, rows, count = self._last
            if works[0].start > self._start:  # otherwise the last step did not succeed, and is tried again
                plan.go_on([sequence.tokens[-1] for sequence in rows.sampled])
                count.keys_read += len(works)
                count.keys_unshared += len(works)
                self._start = works[0].start
            return self._last
        plan, rows, count = self._build(works)
        # Reusable if every row is a sequence with one new token that gets another one.
        goes_on = not plan.chunks and len(rows.sampled) == len(works) and not rows.scored
        self._key, self._start, self._last = key, works[0].start, (plan, rows, count) if goes_on else None
        return plan, rows, count

    def _build(self, works: list[Work]) -> tuple[StepPlan, PlannedRows, KeyCount]:
        layout = self.tree.layout
        return build_plan(works, per_row=self.per_row, device=layout.device, with_states=layout.state_bytes > 0)


def build_plan(
    works: list[Work], *, per_row: bool, device: torch.device, with_states: bool = False
) -> tuple[StepPlan, PlannedRows, KeyCount]:
    """Lay the work out in rows, and find who attends to what.

    Args:
        works: what to compute; a node at most once.
        per_row: sequences attend to shared nodes one by one (the mode that shares storage only).
        with_states: whether the model has recurrent layers.
    """
    layout = _Layout(works)
    plan = StepPlan(
        layout.tokens,
        torch.from_numpy(layout.positions).to(device),
        device,
        logit_rows=torch.empty(0, dtype=torch.long),
    )
    levels = _Levels(len(layout.tokens))
    count = _add_node_segments(plan, layout, levels, per_row=per_row)
    _add_chunks(plan, layout, levels, count)
    _add_groups(plan, layout, levels, count, device)
    plan.num_levels = levels.count
    plan.adapters = _adapter_runs(layout)
    if with_states:
        plan.state_runs = _state_runs(layout)
    rows = PlannedRows()
    plan.logit_rows = torch.tensor(_logit_rows(layout, rows), dtype=torch.long, device=device)
    return plan, rows, count


@dataclass(slots=True)
class _Block:
    """Consecutive rows of ``readers`` sequences, all of which see the nodes from the root down to ``node``."""

    node: Node
    rows: slice
    readers: int
    single: bool  # one row per sequence
    certain: int  # rows that are no drafts


class _Layout:
    """The rows of the packed batch: first the sequences with one new token, then the chunks.

    Sequences with the same adapter stand next to each other; among them those below the same node, so that a node's
    rows are a slice; and among those in the order of their slots, so that a bucket is read without a gather if all its
    sequences are there.
    """

    def __init__(self, works: list[Work]) -> None:
        single: list[tuple[Node, int, Work, Slot]] = []
        self.longer: list[Work] = []
        for work in works:
            if work.rows == 1 and isinstance(work.target, Slot):
                single.append((_node_above(work), work.target.index, work, work.target))
            else:
                self.longer.append(work)
        order = {node: [each.serial for each in node.path()] for node in map(_node_above, works)}
        self.longer.sort(key=lambda work: (work.sequence.request.adapter or "", order[_node_above(work)]))
        single.sort(key=lambda item: (item[2].sequence.request.adapter or "", order[item[0]], item[1]))
        self.single = [(work, slot) for _, _, work, slot in single]
        self.tokens: list[int] = [work.sequence.tokens[work.start] for work, _ in self.single]
        positions = [np.array([work.start for work, _ in self.single], dtype=np.int64)]
        self.blocks: list[_Block] = []
        for node, members in groupby(single, key=itemgetter(0)):
            first = self.blocks[-1].rows.stop if self.blocks else 0
            count = sum(1 for _ in members)
            self.blocks.append(_Block(node, slice(first, first + count), count, single=True, certain=count))
        self.chunk_rows: list[slice] = []
        for work in self.longer:
            rows = slice(len(self.tokens), len(self.tokens) + work.rows)
            self.tokens.extend(work.sequence.tokens[work.start : work.start + work.count])
            self.tokens.extend(work.draft)
            positions.append(np.arange(work.start, work.start + work.rows))
            self.chunk_rows.append(rows)
            self.blocks.append(_Block(_node_above(work), rows, 1, single=False, certain=work.count))
        self.positions = np.concatenate(positions)


def _node_above(work: Work) -> Node:
    """The deepest node whose keys all of the work's rows see."""
    node = work.target.parent if isinstance(work.target, Node) else work.sequence.node
    assert node is not None
    return node


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


def _add_node_segments(plan: StepPlan, layout: _Layout, levels: _Levels, *, per_row: bool) -> KeyCount:
    readers: dict[Node, list[_Block]] = {}
    for block in layout.blocks:
        for node in block.node.path():
            readers.setdefault(node, []).append(block)
    count = KeyCount()
    for node in sorted(readers, key=lambda n: (n.start, n.serial)):
        blocks = readers[node]
        sequences = sum(block.readers for block in blocks)
        count.keys_unshared += sequences * len(node)
        if per_row:
            count.keys_read += sequences * len(node)
            parts = [(_join([block.rows]), block.single, block.certain) for block in blocks]
        else:
            count.keys_read += len(node)
            count.segments += sequences > 1
            certain = sum(block.certain for block in blocks)
            parts = [(_join([block.rows for block in blocks]), False, certain)]
        for part, separately, certain in parts:
            rows = _to_index(part, plan.device)
            plan.segments.append(Segment(rows, node, len(node), node.start, levels.take(part), separately, certain))
    return count


def _add_chunks(plan: StepPlan, layout: _Layout, levels: _Levels, count: KeyCount) -> None:
    for rows, work in zip(layout.chunk_rows, layout.longer, strict=True):
        if work.offset:
            start = work.start - work.offset
            plan.segments.append(Segment(rows, work.target, work.offset, start, levels.take(rows)))
        plan.chunks.append(Chunk(rows, work.target, work.offset, work.start, levels.take(rows)))
        count.keys_read += work.offset + work.rows
        count.keys_unshared += work.offset + work.rows


def _add_groups(plan: StepPlan, layout: _Layout, levels: _Levels, count: KeyCount, device: torch.device) -> None:
    members: dict[Bucket, list[tuple[int, int, int]]] = {}
    for row, (work, slot) in enumerate(layout.single):
        members.setdefault(slot.bucket, []).append((slot.index, work.offset, row))
    for bucket, entries in members.items():
        entries.sort()  # the bucket's own order: its slots are then read without a gather
        slots, offsets, places = np.array(entries).T.copy()
        rows = slice(int(places[0]), int(places[-1]) + 1) if (np.diff(places) == 1).all() else places
        plan.groups.append(
            Group(
                rows=_to_index(rows, device),
                bucket=bucket,
                slots=torch.from_numpy(slots).to(device),
                offsets=torch.from_numpy(offsets).to(device),
                longest=int(offsets.max()) + 1,
                level=levels.take(rows),
            )
        )
        keys = int(offsets.sum()) + len(offsets)
        count.keys_read += keys
        count.keys_unshared += keys


def _join(parts: list[slice]) -> slice | np.ndarray:
    """One slice if the parts follow each other without a gap, else the indices of all their rows."""
    if all(before.stop == after.start for before, after in pairwise(parts)):
        return slice(parts[0].start, parts[-1].stop)
    return np.concatenate([np.arange(part.start, part.stop) for part in parts])


def _adapter_runs(layout: _Layout) -> list[AdapterRun]:
    rows = [(work.sequence.request.adapter, 1) for work, _ in layout.single]
    rows += [(work.sequence.request.adapter, work.rows) for work in layout.longer]
    if all(adapter is None for adapter, _ in rows):
        return []
    runs: list[AdapterRun] = []
    for adapter, group in groupby(rows, key=itemgetter(0)):
        first = runs[-1].stop if runs else 0
        runs.append(AdapterRun(adapter, first, first + sum(count for _, count in group)))
    return runs


def _state_runs(layout: _Layout) -> list[StateRun]:
    runs = [StateRun(slice(row, row + 1), slot, work.offset, 1) for row, (work, slot) in enumerate(layout.single)]
    chunks = zip(layout.chunk_rows, layout.longer, strict=True)
    return runs + [StateRun(rows, work.target, work.offset, work.count) for rows, work in chunks]


def _to_index(rows: slice | np.ndarray, device: torch.device) -> Rows:
    return rows if isinstance(rows, slice) else torch.from_numpy(rows).to(device)


def _logit_rows(layout: _Layout, planned: PlannedRows) -> list[int]:
    sampled: list[int] = []
    scored: list[int] = []
    entries = [(row, work) for row, (work, _) in enumerate(layout.single)]
    entries += [(rows.start, work) for rows, work in zip(layout.chunk_rows, layout.longer, strict=True)]
    for first, work in entries:
        sequence = work.sequence
        if isinstance(work.target, Node):
            continue
        end = work.start + work.count
        if sequence.generate and end == len(sequence.tokens):
            if (state := sequence.sampling) is None:
                planned.branching.append((len(sampled), sequence))
            else:
                planned.bursts.append(Burst(work, len(planned.drawn)))
                planned.drawn.extend(range(len(sampled), len(sampled) + 1 + len(work.draft)))
                planned.states.append(state)
                planned.states.extend(state.behind(work.draft[:ahead]) for ahead in range(1, len(work.draft) + 1))
            sampled.extend(range(first + work.count - 1, first + work.rows))
            planned.sampled.extend([sequence] * (1 + len(work.draft)))
        if sequence.score_from is not None:
            # the row of token t - 1 predicts token t
            target = max(work.start + 1, sequence.score_from + len(sequence.scores))
            stop = min(end + 1, sequence.score_until)
            if target < stop:
                scored.extend(range(first + target - 1 - work.start, first + stop - 1 - work.start))
                planned.scored.append((sequence, target, stop - target))
    return sampled + scored
