"""Slots keep what is written to them, wherever their buckets move it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gossamer.engine.memory import KVLayout, LayerShape, MemoryBudget
from gossamer.engine.slots import SMALLEST, Bucket, Slot, SlotPool, capacity_for

LAYOUT = KVLayout((LayerShape(2, 2, 3), LayerShape(1, 2, 1)), torch.float32, torch.device("cpu"))
lengths = st.integers(0, 5 * SMALLEST)


def write(slot: Slot, tokens: list[int]) -> None:
    """Append keys and values that tell layer, head and token."""
    end = slot.length + len(tokens)
    for layer, shape in enumerate(LAYOUT.layers):
        for tensors, sign in ((slot.bucket.keys, 1), (slot.bucket.values, -1)):
            for head in range(shape.num_kv_heads):
                numbers = torch.tensor(tokens, dtype=torch.float32) + 1000 * head + 10_000 * layer
                tensors[layer][slot.index, head, slot.length : end] = sign * numbers[:, None]
    slot.length = end


def read(slot: Slot) -> list[int]:
    """The tokens a slot holds; fails if layers, heads or values disagree."""
    tokens = slot.bucket.keys[0][slot.index, 0, : slot.length, 0]
    for layer, shape in enumerate(LAYOUT.layers):
        for tensors, sign in ((slot.bucket.keys, 1), (slot.bucket.values, -1)):
            for head in range(shape.num_kv_heads):
                stored = tensors[layer][slot.index, head, : slot.length]
                assert torch.equal(stored, (sign * (tokens + 1000 * head + 10_000 * layer))[:, None].expand_as(stored))
    return [int(token) for token in tokens]


@given(st.integers(1, 10**6))
def test_capacities_waste_little_and_are_their_own_capacity(length: int) -> None:
    capacity = capacity_for(length)
    assert capacity >= length and capacity % SMALLEST == 0
    assert capacity - length < max(SMALLEST, length / 8)
    assert capacity_for(capacity) == capacity


@given(st.integers(1, 10**6), st.integers(0, 10**5))
def test_longer_sequences_never_get_smaller_slots(length: int, more: int) -> None:
    assert capacity_for(length) <= capacity_for(length + more)


class Slots(RuleBasedStateMachine):
    """Random use of a pool, against the list of tokens that every slot should hold."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = MemoryBudget(30 * SMALLEST * LAYOUT.bytes_per_token)
        self.pool = SlotPool(LAYOUT, self.budget)
        self.held: list[tuple[Slot, list[int]]] = []
        self.serial = 0

    def draw(self, data: st.DataObject) -> tuple[int, Slot, list[int]]:
        place = data.draw(st.integers(0, len(self.held) - 1))
        return place, *self.held[place]

    def enough_for(self, length: int) -> bool:
        return self.budget.free >= capacity_for(max(length, 1)) * LAYOUT.bytes_per_token

    @rule(length=lengths)
    def take(self, length: int) -> None:
        before, possible = self.budget.used, self.enough_for(length)
        slot = self.pool.take(length)
        if slot is None:
            assert not possible and self.budget.used == before
        else:
            assert slot.length == 0 and slot.bucket.capacity >= length
            self.held.append((slot, []))

    @rule(capacity=lengths.filter(bool).map(capacity_for), count=st.integers(0, 5))
    def reserve(self, capacity: int, count: int) -> None:
        self.pool.reserve(capacity, count)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), count=st.integers(1, 40))
    def append(self, data: st.DataObject, count: int) -> None:
        _, slot, tokens = self.draw(data)
        count = min(count, slot.bucket.capacity - slot.length)
        new = list(range(self.serial, self.serial + count))
        self.serial = (self.serial + count) % 900
        write(slot, new)
        tokens += new

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        place, slot, _ = self.draw(data)
        self.pool.release(slot)
        del self.held[place]

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        _, slot, tokens = self.draw(data)
        copy = self.pool.fork(slot)
        if copy is not None:
            assert copy is not slot and copy.bucket is slot.bucket
            self.held.append((copy, list(tokens)))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), length=lengths)
    def ensure(self, data: st.DataObject, length: int) -> None:
        place, slot, tokens = self.draw(data)
        possible = length <= slot.bucket.capacity or self.enough_for(length)
        larger = self.pool.ensure(slot, length)
        assert larger is not None or not possible
        if larger is not None:
            assert larger.bucket.capacity >= length
            assert (larger is slot) == (length <= slot.bucket.capacity)
            self.held[place] = (larger, tokens)

    @rule()
    def trim(self) -> None:
        self.pool.trim()
        assert self.pool.num_bytes == sum(slot.bucket.slot_bytes for slot, _ in self.held)

    @invariant()
    def contents_are_kept(self) -> None:
        for slot, tokens in self.held:
            assert read(slot) == tokens if tokens else slot.length == 0

    @invariant()
    def slots_in_use_are_the_first_rows(self) -> None:
        for bucket in self.pool.buckets.values():
            mine = [slot for slot, _ in self.held if slot.bucket is bucket]
            assert sorted(slot.index for slot in mine) == list(range(len(mine)))
            assert all(bucket.slots[slot.index] is slot for slot in mine) and len(bucket.slots) == len(mine)
            assert len(mine) <= bucket.rows

    @invariant()
    def budget_is_exact(self) -> None:
        stored = [x for b in self.pool.buckets.values() for x in (*b.keys, *b.values)]
        assert self.budget.used == self.pool.num_bytes == sum(x.nbytes for x in stored) <= self.budget.total

    @invariant()
    def padding_is_finite(self) -> None:
        assert all(x.isfinite().all() for b in self.pool.buckets.values() for x in (*b.keys, *b.values))

    def teardown(self) -> None:
        for slot, _ in self.held:
            self.pool.release(slot)
        reserved_only = [b for b in self.pool.buckets.values() if b.rows and not b.slots]
        for bucket in reserved_only:
            bucket.trim()
        assert self.budget.used == 0


TestSlots = Slots.TestCase
TestSlots.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_an_empty_bucket_gives_its_memory_back() -> None:
    budget = MemoryBudget(100 * SMALLEST * LAYOUT.bytes_per_token)
    pool = SlotPool(LAYOUT, budget)
    slots = [pool.take(10) for _ in range(9)]
    for slot in slots:
        assert slot is not None and budget.used > 0
        pool.release(slot)
    assert budget.used == pool.num_bytes == 0


def test_a_bucket_that_may_not_grow_is_left_as_it_was() -> None:
    budget = MemoryBudget(3 * SMALLEST * LAYOUT.bytes_per_token)
    bucket = Bucket(LAYOUT, budget, SMALLEST)
    slots = [bucket.take() for _ in range(3)]
    assert all(slot is not None for slot in slots)
    write(bucket.slots[1], [4, 5])
    tensors = [*bucket.keys, *bucket.values]
    assert bucket.take() is None and not bucket.grow(1)
    assert bucket.rows == 3 and budget.used == budget.total
    assert all(a is b for a, b in zip([*bucket.keys, *bucket.values], tensors, strict=True))
    assert read(bucket.slots[1]) == [4, 5]


def test_one_slot_is_found_where_a_quarter_more_does_not_fit() -> None:
    budget = MemoryBudget(9 * SMALLEST * LAYOUT.bytes_per_token)
    pool = SlotPool(LAYOUT, budget)
    assert sum(pool.take(1) is not None for _ in range(20)) == 9
