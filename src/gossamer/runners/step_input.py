"""What a native program reads of a step; see ``StepInput`` in csrc/runtime/program.h."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gossamer.engine.memory import KVLayout
from gossamer.engine.plan import Rows, StepPlan
from gossamer.engine.slots import Bucket, Slot
from gossamer.engine.tree import Node
from gossamer.native.recorder import step_input
from gossamer.runners.tolerance import REPORT, NodeMeans, PrefixTolerance


class StepArrays:
    """A plan as the arrays that the program reads, which go on with it; see ``StepInput`` in csrc/runtime/program.h.

    Attributes:
        tokens, positions: (rows).
        place: (rows, 3) target of each row's key and value, and slot and token of it where they go.
        targets: (n, 2 layers + 1) addresses of keys, of values, and the tokens from one head to the next.
        items: (m, 7) target, slot, first token, number of keys, position of the first, first of ``item_rows``, their
            number.
        item_rows: the rows that attend to each item, one item after the other.
        logit_rows: the rows whose logits are needed.
        runs: (n, 3) adapter or -1, its first row, and the row behind its last; none if no row has an adapter.
        last_position: the highest of the step.
        input: the ``StepInput`` with the addresses of all of these, and their lengths.
    """

    def __init__(self, plan: StepPlan, layout: KVLayout, adapters: Sequence[str] = ()) -> None:
        self.plan, self._reached = plan, plan.ahead
        self.tokens = np.array(plan.token_ids, np.int64)
        self.positions = plan.positions.numpy().copy()
        self.logit_rows = plan.logit_rows.contiguous()
        index = {name: number for number, name in enumerate(adapters)} | {None: -1}
        self.runs = np.array([(index[run.adapter], run.first, run.stop) for run in plan.adapters], np.int64)
        self.last_position = int(self.positions.max())
        self._width = layout.width(layout.layers[0].key_dim)  # of the layer that tells how far heads are apart
        self._index: dict[Node | Bucket, int] = {}
        self._owners: list[Node | Bucket] = []
        items: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        filled = made_items = 0
        self.place = np.zeros((len(self.tokens), 3), np.int64)

        def add(fields: Any, members: np.ndarray, each: bool = False) -> None:
            """One item for all members, or one for each."""
            nonlocal filled, made_items
            made = np.zeros((len(members) if each else 1, 7), np.int64)
            for column, value in enumerate(fields):
                made[:, column] = value
            made[:, 5] = filled + np.arange(len(made)) * each
            made[:, 6] = 1 if each else len(members)
            items.append(made)
            rows.append(members)
            filled += len(members)
            made_items += len(made)

        self.segment_items: list[int] = []  # the first item of each
        for segment in plan.segments:
            self.segment_items.append(made_items)
            target, slot = self._locate(segment.source)
            add((target, slot, 0, segment.length, segment.start), _numbers(segment.rows), segment.per_row)
        for chunk in plan.chunks:
            target, slot = self._locate(chunk.target)
            members = _numbers(chunk.rows)
            self.place[members, 0], self.place[members, 1] = target, slot
            self.place[members, 2] = chunk.offset + np.arange(len(members))
            add((target, slot, chunk.offset, len(members), chunk.position), members)
        computed = made_items
        for group in plan.groups:
            target = self._target(group.bucket)
            members, offsets, slots = _numbers(group.rows), group.offsets.numpy(), group.slots.numpy()
            self.place[members, 0] = target
            self.place[members, 1], self.place[members, 2] = slots, offsets
            add((target, slots, 0, offsets + 1, self.positions[members] - offsets), members, each=True)
        self.items = np.concatenate(items)
        self.item_rows = np.concatenate(rows).astype(np.int32)
        self._growing = self.items[computed:, 3]  # keys of the groups: one more with every step
        self._tables: list[object] = [None] * len(self._owners)
        self.targets = np.zeros((len(self._owners), 2 * len(layout.layers) + 1), np.int64)
        self.input = step_input(
            rows=len(self.tokens),
            items=len(self.items),
            logit_rows=len(self.logit_rows),
            tokens=self.tokens.ctypes.data,
            positions=self.positions.ctypes.data,
            place=self.place.ctypes.data,
            target=self.targets.ctypes.data,
            item=self.items.ctypes.data,
            item_rows=self.item_rows.ctypes.data,
            logit_row=self.logit_rows.data_ptr(),
            runs=len(self.runs),
            run=self.runs.ctypes.data,
        )

    def catch_up(self) -> None:
        """To how far the plan is ahead now, and to where its keys and values are."""
        if steps := self.plan.ahead - self._reached:
            self._reached = self.plan.ahead
            self.tokens[:] = self.plan.token_ids
            self.positions += steps
            self.last_position += steps
            self._growing += steps
            self.place[:, 2] += steps
        for index, owner in enumerate(self._owners):
            if owner.addresses is None:
                assert owner.keys is not None and owner.values is not None
                tensors = (*owner.keys, *owner.values)
                owner.addresses = [*(t.data_ptr() for t in tensors), owner.keys[0].stride(-3) // self._width]
            if self._tables[index] is not owner.addresses:
                self._tables[index] = owner.addresses
                self.targets[index] = owner.addresses

    def _locate(self, source: Node | Slot) -> tuple[int, int]:
        """Target, and slot of it."""
        if isinstance(source, Slot):
            return self._target(source.bucket), source.index
        return self._target(source), 0

    def _target(self, owner: Node | Bucket) -> int:
        if owner not in self._index:
            self._index[owner] = len(self._owners)
            self._owners.append(owner)
        return self._index[owner]


class WithinTolerance:
    """Attention within a tolerance as the program reads it; see ``StepInput`` in csrc/runtime/program.h."""

    def __init__(self, nodes: list[Node | None], tolerance: PrefixTolerance, arrays: StepArrays) -> None:
        self.means: list[NodeMeans] = []
        self._item = np.full(len(arrays.items), -1, np.int64)
        for item, node in zip(arrays.segment_items, nodes, strict=True):
            if node is not None:
                self._item[item] = len(self.means)
                self.means.append(tolerance.means_of(node))
        self._summary = np.array([means.address for means in self.means], np.int64)
        self._report = np.zeros((len(self.means), *self.means[0].control.shape[:2], REPORT))
        step = arrays.input
        step.within, step.summaries, step.summary = self._item.ctypes.data, len(self.means), self._summary.ctypes.data
        step.check = tolerance.steps if any(means.checked for means in self.means) else -1
        step.report = self._report.ctypes.data

    def learn(self) -> None:
        """From what the step reported."""
        for means, report in zip(self.means, self._report, strict=True):
            means.learn(report)


def _numbers(rows: Rows) -> np.ndarray:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
