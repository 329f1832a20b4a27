"""Private keys and values: what a sequence shares with nobody, laid out so that all sequences are attended in one call.

Every sequence that is being decoded owns a slot. Slots of equal capacity form a bucket: one tensor per layer whose
first ``n`` rows are the ``n`` slots in use, without gaps, so that a step reads them as one view.
A sequence that outgrows its slot moves to a larger bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gossamer.engine.memory import KVLayout, MemoryBudget
from gossamer.engine.states import State

SMALLEST = 64


def capacity_for(length: int) -> int:
    """Slot sizes are multiples of 64, and of an eighth of the next lower power of two: at most 12.5 % is wasted.

    >>> [capacity_for(n) for n in (1, 64, 65, 600, 2100)]
    [64, 64, 128, 640, 2304]
    """
    step = max(SMALLEST, 1 << max((length - 1).bit_length() - 4, 0))
    return -(-length // step) * step


@dataclass(eq=False)
class Slot:
    """One sequence's place: row ``index`` of ``bucket``; ``length`` tokens of it are filled.

    ``state`` is what recurrent layers keep of the whole text up to there, ``None`` at its beginning.
    """

    bucket: Bucket
    index: int
    length: int = 0
    state: State | None = None


class Bucket:
    """All slots of one capacity. ``keys[layer]`` and ``values[layer]`` are (rows, Hkv, capacity, dim).

    ``addresses`` is where they are, as a runner notes it; it is forgotten when they move.
    """

    def __init__(self, layout: KVLayout, budget: MemoryBudget, capacity: int) -> None:
        self.layout = layout
        self.budget = budget
        self.capacity = capacity
        self.slots: list[Slot] = []
        self.rows = 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.addresses: Any = None

    @property
    def slot_bytes(self) -> int:
        return self.layout.size(self.capacity)

    def take(self) -> Slot | None:
        """A free slot, or ``None`` if the budget has no room for one."""
        # Growing by a quarter copies n slots O(n) times in all; when memory is short, one must do.
        if len(self.slots) == self.rows and not (self.grow(max(1, self.rows // 4)) or self.grow(1)):
            return None
        slot = Slot(self, len(self.slots))
        self.slots.append(slot)
        return slot

    def grow(self, extra: int) -> bool:
        """Room for ``extra`` more slots. False, and nothing changed, if the budget has none."""
        if not self.budget.reserve(extra * self.slot_bytes):
            return False
        self._resize(self.rows + extra)
        return True

    def trim(self) -> int:
        """Give back the memory of rows that no slot uses. Returns their number."""
        spare = self.rows - len(self.slots)
        if spare:
            self._resize(len(self.slots))
            self.budget.release(spare * self.slot_bytes)
        return spare

    def _resize(self, rows: int) -> None:
        used = len(self.slots)
        if rows == 0:
            self.keys, self.values = [], []
        elif self.rows == 0:
            self.keys, self.values = self.layout.allocate(rows, length=self.capacity)
        else:
            for layers in self.layout.groups(self.rows, length=self.capacity):
                larger = self.layout.allocate(rows, length=self.capacity, layers=layers)
                for tensors, made in zip((self.keys, self.values), larger, strict=True):
                    for layer, new in zip(layers, made, strict=True):
                        new[:used].copy_(tensors[layer][:used])
                        tensors[layer] = new
        self.rows = rows
        self.addresses = None

    def release(self, slot: Slot) -> None:
        """Give a slot back; the last one moves into its place. An empty bucket gives its memory back."""
        last = self.slots.pop()
        if last is not slot:
            for tensors in (self.keys, self.values):
                for tensor in tensors:
                    tensor[slot.index, :, : last.length].copy_(tensor[last.index, :, : last.length])
            last.index = slot.index
            self.slots[last.index] = last
        if not self.slots:
            self.trim()


class SlotPool:
    """Buckets of slots by capacity."""

    def __init__(self, layout: KVLayout, budget: MemoryBudget) -> None:
        self.layout = layout
        self.budget = budget
        self.buckets: dict[int, Bucket] = {}

    @property
    def num_bytes(self) -> int:
        return sum(bucket.rows * bucket.slot_bytes for bucket in self.buckets.values())

    def _bucket(self, capacity: int) -> Bucket:
        if capacity not in self.buckets:
            self.buckets[capacity] = Bucket(self.layout, self.budget, capacity)
        return self.buckets[capacity]

    def reserve(self, capacity: int, count: int) -> None:
        """Let a bucket grow once for ``count`` sequences that are about to start, if there is memory for all."""
        bucket = self._bucket(capacity)
        missing = count - (bucket.rows - len(bucket.slots))
        if missing > 0:
            bucket.grow(missing)

    def take(self, length: int) -> Slot | None:
        """A slot with room for ``length`` tokens, or ``None`` if the budget has none."""
        return self._bucket(capacity_for(max(length, 1))).take()

    def release(self, slot: Slot) -> None:
        slot.bucket.release(slot)

    def trim(self) -> bool:
        """Give back all memory that no slot uses. Returns whether there was any."""
        return sum(bucket.trim() for bucket in self.buckets.values()) > 0

    def fork(self, slot: Slot) -> Slot | None:
        """A second slot with the same contents (a beam that splits), or ``None`` if the budget has no room."""
        copy = self.take(slot.bucket.capacity)
        if copy is not None:
            _copy(slot, copy)
        return copy

    def ensure(self, slot: Slot, length: int) -> Slot | None:
        """``slot``, or a larger one with its contents if ``length`` tokens do not fit; ``None`` if there is no room."""
        if length <= slot.bucket.capacity:
            return slot
        larger = self.take(length)
        if larger is not None:
            _copy(slot, larger)
            self.release(slot)
        return larger


def _copy(source: Slot, target: Slot) -> None:
    for own, other in ((source.bucket.keys, target.bucket.keys), (source.bucket.values, target.bucket.values)):
        for mine, theirs in zip(own, other, strict=True):
            theirs[target.index, :, : source.length].copy_(mine[source.index, :, : source.length])
    target.length, target.state = source.length, source.state
