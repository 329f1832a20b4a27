"""Attention states against the definition in fp64, and the algebra that makes sharing exact."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_definition import TOLERANCE, assert_states_equal, definition, problems, seeds
from gossamer.errors import ConfigurationError
from gossamer.ops import attention
from gossamer.ops.attention import (
    AttentionState,
    attend,
    attend_prefix,
    empty_state,
    merge_states,
    sink_state,
)


def random_state(generator: torch.Generator, *shape: int, value_dim: int = 3) -> AttentionState:
    """A state of widely different normalizers, every fifth row empty."""
    out = torch.randn(*shape, value_dim, generator=generator, dtype=torch.float64)
    lse = torch.randn(*shape, generator=generator, dtype=torch.float64) * 30
    empty = torch.rand(shape, generator=generator) < 0.2
    return AttentionState(out.masked_fill(empty[..., None], 0.0), lse.masked_fill(empty, -math.inf))


# --- attend ----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(problems())
def test_attend_is_softmax_over_the_masked_scores(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
    (query, key, value), options = problem
    state = attend(query, key, value, **options)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    assert state.out.dtype == state.lse.dtype == wide
    assert_states_equal(state, definition(query, key, value, **options), TOLERANCE[query.dtype])


@settings(max_examples=60, deadline=None)
@given(problems())
def test_attend_is_the_same_without_the_flash_kernel(problem: tuple[list[Tensor], dict[str, Any]]) -> None:
    tensors, options = problem
    fast = attend(*tensors, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "flash_works", lambda: False)
        assert_states_equal(attend(*tensors, **options), fast)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(1, 2000))
def test_blocks_of_keys_change_nothing(problem: tuple[list[Tensor], dict[str, Any]], score_bytes: int) -> None:
    tensors, options = problem
    whole = attend(*tensors, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "flash_works", lambda: False)
        patch.setattr(attention, "SCORE_BYTES", score_bytes)
        assert_states_equal(attend(*tensors, **options), whole)


@settings(max_examples=60, deadline=None)
@given(problems(), st.sampled_from(["batch", "heads", "rows"]))
def test_expanded_tensors_are_read_as_if_copied(problem: tuple[list[Tensor], dict[str, Any]], along: str) -> None:
    tensors, options = problem
    axis = {"batch": 0, "heads": 1, "rows": 2}[along]
    expanded = [x.narrow(axis, 0, min(1, x.shape[axis])).expand_as(x) for x in tensors]
    assert_states_equal(attend(*expanded, **options), attend(*[x.clone() for x in expanded], **options))


def test_long_segments_of_every_head_dimension() -> None:
    """Longer than the kernel's own blocks of queries (32) and keys (512)."""
    for dim, dtype in itertools.product((8, 64, 128, 256), (torch.float32, torch.bfloat16)):
        generator = torch.Generator().manual_seed(dim)
        query = torch.randn(1, 2, 3, dim, generator=generator).to(dtype)
        key, value = (torch.randn(1, 1, 1100, dim, generator=generator).to(dtype) for _ in range(2))
        assert_states_equal(attend(query, key, value), definition(query, key, value))
        assert_states_equal(
            attend(query, key, value, causal=True, window=700), definition(query, key, value, causal=True, window=700)
        )


@settings(max_examples=40, deadline=None)
@given(seeds, st.floats(10.0, 80.0))
def test_large_scores_neither_overflow_nor_lose_the_answer(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(1, 2, 6, 16, generator=generator) * s for s in (size, size, 1.0))
    state = attend(query, key, value, causal=True)
    expected = definition(query, key, value, causal=True)
    assert torch.isfinite(state.out).all()
    torch.testing.assert_close(state.lse.double(), expected.lse, rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(state.out.double(), expected.out, rtol=0, atol=2e-2)  # scores of 1e4 have ulps of 1e-3


def test_causal_alignment_is_by_the_last_row_and_pytorchs_by_the_first() -> None:
    query, key, value = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 5, 8), torch.randn(1, 1, 5, 8)
    ours = attend(query, key, value, causal=True).out
    theirs = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(theirs, attend(query, key, value, causal=True, query_start=0).out)
    torch.testing.assert_close(theirs[:, :, 0], value[:, :, 0])  # their first query sees the first key alone
    torch.testing.assert_close(ours[:, :, 1], attend(query[:, :, 1:], key, value).out[:, :, 0])  # our last sees all
    assert not torch.allclose(ours, theirs, atol=1e-3)


def test_rows_that_see_nothing_are_minus_infinity_though_the_kernel_says_zero() -> None:
    query, key, value = torch.randn(1, 1, 3, 8), torch.randn(1, 1, 4, 8), torch.randn(1, 1, 4, 8)
    mask = torch.zeros(1, 1, 3, 4)
    mask[:, :, 1] = -math.inf
    _, kernel_lse = attention._flash(query, key, value, mask, False, 1.0)
    assert kernel_lse[0, 0, 1] == 0.0
    state = attend(query, key, value, causal=True, query_start=-2)
    assert state.lse[0, 0, :2].tolist() == [-math.inf] * 2
    assert state.out[0, 0, :2].abs().max() == 0.0
    assert torch.isfinite(state.lse[0, 0, 2])


def test_the_flash_kernel_is_what_these_tests_run() -> None:
    assert attention.flash_works()


# --- the algebra of states -------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(seeds, st.integers(2, 5))
def test_merge_is_associative_commutative_and_has_a_neutral_element(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    states = [random_state(generator, 2, 3, 4) for _ in range(count)]
    merged = merge_states(states)
    left, right = states[0], states[-1]
    for state in states[1:]:
        left = merge_states([left, state])
    for state in states[-2::-1]:
        right = merge_states([state, right])
    shuffled = [states[i] for i in torch.randperm(count, generator=generator).tolist()]
    neutral = empty_state(torch.empty(2, 3, 4, 1, dtype=torch.float64), 3)
    for other in (left, right, merge_states(shuffled), merge_states([neutral, *states, neutral])):
        assert_states_equal(other, merged, 1e-12)


def test_merge_of_nothing_but_empty_states_is_empty() -> None:
    empty = empty_state(torch.randn(2, 3, 4, 8), 5)
    merged = merge_states([empty] * 3)
    assert torch.equal(merged.out, torch.zeros(2, 3, 4, 5))
    assert torch.equal(merged.lse, torch.full((2, 3, 4), -math.inf))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_merge_holds_at_the_ends_of_the_number_range(dtype: torch.dtype) -> None:
    out = torch.tensor([1.0, 3.0], dtype=dtype)[:, None, None, None, None]
    for lse in (-1e30, -1e4, 0.0, 1e4, 1e30):
        states = [AttentionState(o, torch.full((1, 1, 1), lse, dtype=dtype)) for o in out]
        merged = merge_states(states)
        assert merged.out.item() == 2.0
        assert merged.lse.item() == pytest.approx(lse + math.log(2))


@settings(max_examples=60, deadline=None)
@given(problems(), st.lists(st.integers(0, 40), max_size=4))
def test_attention_to_parts_merges_to_attention_to_the_whole(
    problem: tuple[list[Tensor], dict[str, Any]], cuts: list[int]
) -> None:
    (query, key, value), options = problem
    columns = key.shape[2]
    edges = [0, *sorted(min(c, columns) for c in cuts), columns]
    start = options.pop("query_start")
    start = columns - query.shape[2] if start is None else start
    lengths = options.pop("key_lengths", None)
    parts = []
    for begin, end in itertools.pairwise(edges):
        own = None if lengths is None else (lengths - begin).clamp_min(0)
        key_part, value_part = key[:, :, begin:end], value[:, :, begin:end]
        parts.append(attend(query, key_part, value_part, query_start=start - begin, key_lengths=own, **options))
    whole = attend(query, key, value, query_start=start, key_lengths=lengths, **options)
    assert_states_equal(merge_states(parts), whole)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_sinks_are_an_extra_column_of_the_softmax(softcap: float | None) -> None:
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    sinks = torch.tensor([-2.0, 0.0, 1.5, 30.0])
    merged = merge_states([attend(query, key, value, softcap=softcap), sink_state(sinks, query, 8)])
    s = query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 8**-0.5
    s = s if softcap is None else softcap * torch.tanh(s / softcap)
    s = torch.cat([s, sinks[None, :, None, None].expand(2, 4, 3, 1)], -1)
    torch.testing.assert_close(merged.out, s.softmax(-1)[..., :-1] @ value.repeat_interleave(2, 1))
    torch.testing.assert_close(merged.lse, s.logsumexp(-1))


def test_merge_refuses_nothing_and_unequal_shapes() -> None:
    with pytest.raises(ConfigurationError, match="at least one"):
        merge_states([])
    one, other = random_state(torch.Generator(), 1, 2, 3), random_state(torch.Generator(), 1, 2, 4)
    with pytest.raises(ConfigurationError, match=r"\(1, 2, 3, 3\).*\(1, 2, 4, 3\)"):
        merge_states([one, other])


# --- autograd and compilers ------------------------------------------------------------------------------------

DIFFERENTIATED: list[dict[str, Any]] = [
    {},
    {"causal": True},
    {"causal": True, "query_start": 0},
    {"causal": True, "query_start": -2},  # the first two rows see nothing
    {"causal": True, "window": 2},
    {"softcap": 2.0},
    {"softcap": 2.0, "causal": True, "query_start": -2, "scale": 0.7},
    {"key_lengths": torch.tensor([0, 3])},
]


@pytest.mark.parametrize("options", DIFFERENTIATED, ids=str)
@pytest.mark.parametrize("columns", [4, 6])
def test_gradients_are_those_of_finite_differences(options: dict[str, Any], columns: int) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, 2, 4, 2), (2, 1, columns, 2), (2, 1, columns, 2)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]
    more = [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes[1:]]

    def alone(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        state = attend(query, key, value, **options)
        return state.out, state.lse.clamp_min(-50.0)  # finite differences of -inf are NaN

    def merged(query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, Tensor]:
        state = merge_states([attend(query, key, value, **options), attend(query, *others), empty_state(query, 2)])
        return state.out, state.lse

    assert torch.autograd.gradcheck(alone, tensors)
    assert torch.autograd.gradcheck(merged, (*tensors, *more))


@pytest.mark.parametrize("field", ["out", "lse"])
def test_one_half_of_a_state_can_be_differentiated(field: str) -> None:
    tensors = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda q, k, v: getattr(attend(q, k, v, causal=True), field), tensors)


def test_rows_that_see_nothing_have_gradients_of_zero() -> None:
    tensors = [torch.randn(1, 1, 3, 4, requires_grad=True) for _ in range(3)]
    state = merge_states([attend(*tensors, causal=True, query_start=-3), attend(*tensors, causal=True, query_start=-2)])
    state.out.sum().backward()
    query = tensors[0].grad
    assert query is not None and all(x.grad is not None and torch.isfinite(x.grad).all() for x in tensors)
    assert query[0, 0, :2].abs().max() == 0.0


@pytest.mark.parametrize(
    "dtype,masked,causal,softcap",
    [(torch.float32, False, True, None), (torch.bfloat16, True, False, None), (torch.float32, True, False, 4.0)],
)
def test_the_operator_obeys_the_dispatcher(
    dtype: torch.dtype, masked: bool, causal: bool, softcap: float | None
) -> None:
    query, key, value = (torch.randn(2, h, 5, 8).to(dtype).requires_grad_() for h in (4, 2, 2))
    seen = torch.ones(5, 5, dtype=torch.bool).triu()[None, None] if masked else None
    torch.library.opcheck(torch.ops.gossamer.attend, (query, key, value, seen, causal, 0.3, softcap))


@pytest.mark.parametrize("differentiable", [False, True])
def test_a_compiled_function_answers_like_the_eager_one(differentiable: bool) -> None:
    def function(query: Tensor, key: Tensor, value: Tensor, prefix: Tensor) -> Tensor:
        shared = attend_prefix(query, prefix, prefix, softcap=4.0)
        return merge_states([shared, attend(query, key, value, causal=True, window=3)]).out

    tensors = [torch.randn(s) for s in ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8), (2, 9, 8))]
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    answers = []
    for run in (function, compiled):
        inputs = [x.clone().requires_grad_(differentiable) for x in tensors]
        answer = run(*inputs)
        if differentiable:
            answer.square().sum().backward()
        answers.append([answer.detach(), *(x.grad for x in inputs if x.grad is not None)])
    assert len(answers[0]) == len(answers[1]) == (5 if differentiable else 1)
    for eager, other in zip(*answers, strict=True):
        torch.testing.assert_close(other, eager)


# --- errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query,key,value",
    [
        ((2, 4, 8), (2, 4, 3, 8), (2, 4, 3, 8)),
        ((2, 4, 1, 8), (3, 4, 3, 8), (3, 4, 3, 8)),
        ((2, 4, 1, 8), (2, 3, 3, 8), (2, 3, 3, 8)),
        ((2, 4, 1, 8), (2, 0, 3, 8), (2, 0, 3, 8)),
        ((2, 4, 1, 8), (2, 4, 3, 9), (2, 4, 3, 9)),
        ((2, 4, 1, 8), (2, 4, 3, 8), (2, 4, 5, 8)),
        ((2, 4, 1, 8), (2, 4, 3, 8), (2, 2, 3, 8)),
    ],
)
def test_shapes_that_do_not_fit_are_named(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]) -> None:
    with pytest.raises(ConfigurationError) as error:
        attend(torch.zeros(query), torch.zeros(key), torch.zeros(value))
    assert all(str(shape) in str(error.value) for shape in (query, key, value))


@pytest.mark.parametrize(
    "query,key,value",
    [
        ((2, 4, 8), (4, 3, 8), (4, 3, 8)),
        ((2, 4, 1, 8), (2, 4, 3, 8), (2, 4, 3, 8)),
        ((2, 4, 1, 8), (3, 3, 8), (3, 3, 8)),
        ((2, 4, 1, 8), (4, 3, 8), (4, 2, 8)),
    ],
)
def test_prefixes_that_do_not_fit_are_named(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigurationError) as error:
        attend_prefix(torch.zeros(query), torch.zeros(key), torch.zeros(value))
    assert all(str(shape)[1:-1] in str(error.value) for shape in (key, value))


@pytest.mark.parametrize("options", [{"window": 0}, {"window": -1}, {"softcap": 0.0}, {"softcap": -1.0}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=f"{next(iter(options))}.*{next(iter(options.values()))}"):
        attend(torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), torch.zeros(1, 1, 2, 8), **options)


def test_key_lengths_of_another_batch_are_refused() -> None:
    tensor = torch.zeros(2, 1, 3, 8)
    with pytest.raises(ConfigurationError, match=r"key_lengths.*\(3,\)"):
        attend(tensor, tensor, tensor, key_lengths=torch.tensor([1, 2, 3]))
