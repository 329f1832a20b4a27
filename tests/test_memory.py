"""Sizes as users write them, and the budget that all keys and values share."""

from __future__ import annotations

import contextlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.large_pages import LARGE, zeros
from gossamer.engine.memory import GROUP_BYTES, KVLayout, LayerShape, MemoryBudget
from gossamer.errors import ConfigurationError
from gossamer.sizes import parse_bytes

UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


@given(st.integers(1, 10**6), st.sampled_from(list(UNITS)), st.booleans(), st.sampled_from(["", " "]), st.booleans())
def test_a_size_is_its_number_times_its_unit(number: int, unit: str, b: bool, space: str, upper: bool) -> None:
    text = f"{number}{space}{unit}{'B' if b else ''}"
    assert parse_bytes(text.upper() if upper else text) == number * UNITS[unit]


@pytest.mark.parametrize(
    "size,expected",
    [
        (4096, 4096),
        ("1.5GiB", 3 << 29),
        (".5 k", 500),
        ("0.1GB", 10**8),
        (" 7 ", 7),
        ("1B", 1),
        (2**63 + 1, 2**63 + 1),
        ("9" * 400, int("9" * 400)),
    ],
    ids=lambda x: str(x)[:8],
)
def test_sizes_are_exact(size: str | int, expected: int) -> None:
    assert parse_bytes(size) == expected


@pytest.mark.parametrize(
    "size",
    ["", " ", "GB", "-1GB", "0", 0, -5, "0.4", "4 PB", "4GBs", "1e9", "4,5GB", "nan", "inf", "1.2.3G", "1 2", "4Gib i"],
)
def test_what_is_not_a_size_is_refused_by_name(size: str | int) -> None:
    with pytest.raises(ConfigurationError, match=r"'4GB'.*got"):
        parse_bytes(size)


@given(st.text(max_size=8) | st.integers() | st.from_regex(r"[0-9]{1,400}", fullmatch=True))
def test_any_other_input_is_a_size_or_a_configuration_error(size: str | int) -> None:
    with contextlib.suppress(ConfigurationError):
        assert parse_bytes(size) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layout_allocates_the_bytes_it_announces(dtype: torch.dtype) -> None:
    layout = KVLayout((LayerShape(2, 8, 4), LayerShape(1, 5, 5)), dtype, torch.device("cpu"))
    keys, values = layout.allocate(3, length=7)
    assert [k.shape for k in keys] == [(3, 2, 7, 8), (3, 1, 7, 5)]
    assert [v.shape for v in values] == [(3, 2, 7, 4), (3, 1, 7, 5)]
    assert sum(x.nbytes for x in keys + values) == 3 * 7 * layout.bytes_per_token
    assert all(not x.any() for x in keys + values)


@given(st.integers(0, 100), st.lists(st.integers(0, 60), max_size=20))
def test_a_budget_is_never_exceeded_and_a_refusal_takes_nothing(total: int, sizes: list[int]) -> None:
    budget = MemoryBudget(total)
    taken: list[int] = []
    for size in sizes:
        before = budget.used
        if budget.reserve(size):
            taken.append(size)
        else:
            assert budget.used == before and before + size > total
        assert budget.used == sum(taken) <= total and budget.peak == budget.used and budget.free == total - budget.used
    for size in taken:
        budget.release(size)
    assert budget.used == 0 and budget.peak == sum(taken)


def test_eviction_is_asked_for_exactly_what_is_missing() -> None:
    budget = MemoryBudget(10)
    assert budget.reserve(8)
    asked = []

    def evict(wanted: int) -> int:
        asked.append(wanted)
        budget.release(4)
        return 4

    budget.evict = evict
    assert budget.reserve(2) and asked == []
    assert budget.reserve(3) and asked == [3]
    assert budget.used == 9


def test_large_caches_stand_at_the_start_of_large_pages_and_hold_zeros() -> None:
    small, large = (LARGE // 8,), (3, LARGE // 4 + 5)
    first, second = zeros([large, small], torch.float32, torch.device("cpu"))
    assert first.data_ptr() % LARGE == 0 and second.data_ptr() == first.data_ptr() + first.nbytes
    assert first.shape == large and second.shape == small
    assert not first.any() and not second.any()
    del first
    second[-1] = 1.0  # the memory is there as long as any of them is
    assert second.sum() == 1.0


def test_layers_share_memory_group_by_group() -> None:
    layout = KVLayout((LayerShape(2, 8, 8),) * 5, torch.float32, torch.device("cpu"))
    length = 2 * GROUP_BYTES // (5 * 128)
    assert layout.groups(length=length) == [range(3), range(3, 5)]
    keys, values = layout.allocate(length=length)
    assert len({t.untyped_storage().data_ptr() for t in (*keys, *values)}) == 2
    assert [t.shape for t in (*keys, *values)] == [(2, length, 8)] * 10
