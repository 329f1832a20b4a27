"""Rounding by second order: its algebra, and that it costs less than rounding each entry for itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.compress.block_types import GGUF_TYPES
from gossamer.compress.pack_quantized import w4a16
from gossamer.compress.second_order import factor, round_second_order
from gossamer.errors import ConfigurationError

KINDS = [GGUF_TYPES[name] for name in ("Q4_0", "Q5_0", "Q4_K", "Q6_K")] + [w4a16(32, torch.bfloat16)]


def inputs(columns: int, seed: int = 0, tokens: int = 400) -> Tensor:
    """Correlated, with a few columns that are much larger than the others."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    size = torch.exp(torch.randn(columns, generator=generator))
    return torch.randn(tokens, columns, generator=generator) @ (0.3 * torch.eye(columns) + mixing) * size


def moments(x: Tensor) -> Tensor:
    return x.T @ x / len(x)


def output_error(values: Tensor, weight: Tensor, x: Tensor) -> float:
    return float(((values - weight) @ x.T).square().sum())


@given(columns=st.integers(1, 40), seed=st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_factor_is_that_of_the_inverse_in_falling_order(columns, seed):
    matrix = moments(inputs(columns, seed))
    found = factor(matrix, 0.01)
    ordered = matrix.double()[found.order][:, found.order]
    ordered.diagonal().add_(0.01 * float(matrix.diagonal().mean()))
    upper = found.upper.double()
    torch.testing.assert_close(upper.T @ upper @ ordered, torch.eye(columns).double(), atol=1e-3, rtol=0)
    assert torch.equal(upper, upper.triu()) and (matrix.diagonal()[found.order].diff() <= 0).all()
    torch.testing.assert_close(found.importance[found.order], found.upper.diagonal() ** -2)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_outputs_change_less_than_with_nearest_points(kind):
    x = inputs(512)
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(1))
    grid, codes = round_second_order(weight, kind, factor(moments(x), 0.01))
    nearest = kind.fit(weight, moments(x).diagonal())
    others = (grid.values(grid.codes(weight)), nearest.values(nearest.codes(weight)))
    least = min(output_error(values, weight, x) for values in others)
    assert output_error(grid.values(codes), weight, x) < 0.6 * least


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_other_inputs_of_the_kind_gain_too(kind):
    x = inputs(256, tokens=4000)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(1))
    grid, codes = round_second_order(weight, kind, factor(moments(x[:2000]), 0.01))
    fresh = x[2000:]
    nearest = output_error(grid.values(grid.codes(weight)), weight, fresh)
    assert output_error(grid.values(codes), weight, fresh) < 0.7 * nearest


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_without_correlations_each_entry_goes_to_its_nearest_point(kind):
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(1))
    grid, codes = round_second_order(weight, kind, factor(torch.diag(torch.rand(256) + 0.5), 0.01))
    assert torch.equal(codes, grid.codes(weight))


def test_what_lies_on_the_grid_stays():
    kind = GGUF_TYPES["Q4_0"]
    codes = torch.randint(-8, 8, (16, 64), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    codes[:, ::32] = -8
    weight = codes * 0.25
    grid, found = round_second_order(weight, kind, factor(moments(inputs(64)), 0.01))
    assert torch.equal(grid.values(found), weight)


@pytest.mark.parametrize("kind", [KINDS[0], KINDS[-1]], ids=lambda kind: kind.name)
def test_zeros_of_pruning_stay_and_are_made_up_for(kind):
    x = inputs(256)
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    keep = torch.rand(32, 256, generator=torch.Generator().manual_seed(2)) < 0.5
    grid, codes = round_second_order(weight * keep, kind, factor(moments(x), 0.01))
    assert not (grid.values(codes) * ~keep).any()
    nearest = grid.values(grid.codes(weight * keep))
    assert output_error(grid.values(codes), weight * keep, x) < 0.7 * output_error(nearest, weight * keep, x)


def test_rows_do_not_depend_on_each_other():
    kind = GGUF_TYPES["Q4_K"]
    weight = torch.randn(2100, 256, generator=torch.Generator().manual_seed(1))
    inverse = factor(moments(inputs(256)), 0.01)
    _, codes = round_second_order(weight, kind, inverse)
    for rows in (slice(0, 40), slice(2040, 2100)):
        _, alone = round_second_order(weight[rows], kind, inverse)
        assert (alone != codes[rows]).float().mean() < 0.01  # products of other shapes round otherwise


def test_columns_that_saw_nothing_are_no_trouble():
    x = inputs(64)
    x[:, 5:20] = 0
    weight = torch.randn(8, 64)
    grid, codes = round_second_order(weight, GGUF_TYPES["Q4_0"], factor(moments(x), 0.01))
    assert grid.values(codes).isfinite().all()


def test_a_single_input_is_enough():
    x = inputs(64, tokens=1)
    weight = torch.randn(8, 64)
    grid, codes = round_second_order(weight, GGUF_TYPES["Q4_0"], factor(moments(x), 1e-9))  # more is taken
    assert grid.values(codes).isfinite().all()


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_inputs_that_say_nothing_are_refused(value):
    with pytest.raises(ConfigurationError, match="all zero or not finite"):
        factor(torch.full((4, 4), value), 0.01)
