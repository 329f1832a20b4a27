"""Attention to shared prefixes and to ragged rows is attention to copies."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_definition import TOLERANCE, assert_states_equal, definition, problems
from gossamer.ops.attention import (
    AttentionState,
    attend,
    attend_prefix,
    attend_ragged,
    merge_states,
)

TREES = [[[1], [10]], [[3], [6, 7]], [[7, 7], [9, 10, 11, 4], [129, 2, 3, 4, 5, 6, 7, 128]]]  # arXiv 2402.05099's tests


# --- shared prefixes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tree", TREES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 8])
@pytest.mark.parametrize("fan_out", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_hierarchical_attention_is_flat_attention(
    tree: list[list[int]], kv_heads: int, fan_out: int, dtype: torch.dtype
) -> None:
    """Every vertex is attended to once, by all sequences below it; the last tokens are the sequences' own."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    count, own, dim = len(tree[-1]) * fan_out, 2, 128
    query = random(count, 8, own, dim)
    private = random(count, kv_heads, own, dim), random(count, kv_heads, own, dim)
    partial: list[list[AttentionState]] = [[] for _ in range(count)]
    stored: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(count)]
    for level in tree:
        for vertex, length in enumerate(level):
            below = range(vertex * count // len(level), (vertex + 1) * count // len(level))
            key, value = random(kv_heads, length, dim), random(kv_heads, length, dim)
            state = attend_prefix(query[below.start : below.stop], key, value)
            for row, sequence in enumerate(below):
                stored[sequence].append((key, value))
                partial[sequence].append(AttentionState(state.out[row : row + 1], state.lse[row : row + 1]))
    last = attend(query, *private, causal=True)
    for i in range(count):
        merged = merge_states([*partial[i], AttentionState(last.out[i : i + 1], last.lse[i : i + 1])])
        key, value = (torch.cat([*(kv[n] for kv in stored[i]), private[n][i]], 1)[None] for n in (0, 1))
        flat = definition(query[i : i + 1], key, value, causal=True)
        assert_states_equal(merged, flat, TOLERANCE[dtype])


@settings(max_examples=80, deadline=None)
@given(problems(), st.booleans())
def test_a_prefix_is_attended_to_as_if_every_sequence_had_a_copy(
    problem: tuple[list[Tensor], dict[str, Any]], restricted: bool
) -> None:
    (query, key, value), options = problem
    batch, rows, columns = query.shape[0], query.shape[2], key.shape[2]
    if batch == 0:
        key, value = key.new_zeros(1, *key.shape[1:]), value.new_zeros(1, *value.shape[1:])
    seen = torch.rand(batch, rows, columns, generator=torch.Generator().manual_seed(rows)) < 0.5 if restricted else None
    some = {name: options[name] for name in ("scale", "softcap")}
    state = attend_prefix(query, key[0], value[0], seen=seen, **some)
    if seen is None:
        expected = definition(query, key[:1].expand(batch, -1, -1, -1), value[:1].expand(batch, -1, -1, -1), **some)
        assert_states_equal(state, expected, TOLERANCE[query.dtype])
    else:
        assert state.out.shape == (*query.shape[:3], value.shape[-1])
        for b, i in itertools.product(range(batch), range(rows)):
            visible = seen[b, i].nonzero()[:, 0]
            row = definition(query[b : b + 1, :, i : i + 1], key[:1, :, visible], value[:1, :, visible], **some)
            mine = AttentionState(state.out[b : b + 1, :, i : i + 1], state.lse[b : b + 1, :, i : i + 1])
            assert_states_equal(mine, row, TOLERANCE[query.dtype])


@settings(max_examples=80, deadline=None)
@given(problems(dtypes=(torch.float32, torch.float64)))
def test_ragged_rows_are_attended_to_on_their_own(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
    (query, key, value), options = problem
    batch, columns = query.shape[0], key.shape[2]
    query = query[:, :, :1] if query.shape[2] else query.new_ones(*query.shape[:2], 1, query.shape[3])
    generator = torch.Generator().manual_seed(columns)
    seen = torch.rand(batch, columns, generator=generator) < 0.4
    seen[:1] = False  # a sequence that sees nothing
    bias = torch.zeros(batch, columns).masked_fill_(~seen, -math.inf)
    some = {name: options[name] for name in ("scale", "softcap")}
    state = attend_ragged(query, key, value, bias, **some)
    assert state.out.shape == (*query.shape[:3], value.shape[-1])
    for b in range(batch):
        visible = seen[b].nonzero()[:, 0]
        row = definition(query[b : b + 1], key[b : b + 1, :, visible], value[b : b + 1, :, visible], **some)
        assert_states_equal(AttentionState(state.out[b : b + 1], state.lse[b : b + 1]), row, TOLERANCE[query.dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_ragged_rows_in_half_precision_stay_within_its_rounding(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(s, generator=generator).to(dtype) for s in ((8, 4, 1, 64), (8, 2, 50, 64), (8, 2, 50, 64))
    )
    state = attend_ragged(query, key, value, torch.zeros(8, 50))
    expected = definition(query, key, value)
    assert state.out.dtype == torch.float32
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(state.lse.double(), expected.lse, rtol=0, atol=4 * ulp)
    torch.testing.assert_close(state.out.double(), expected.out, rtol=0, atol=8 * ulp)
