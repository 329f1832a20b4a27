"""The paper's quantization schemes against their definitions, in exact integers and fp64."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from architectures import make_model
from gossamer.errors import ConfigurationError
from gossamer.ops.int8 import int8_linear, quantize_rowwise
from gossamer.papers.int8_variants import (
    Quantized,
    Scheme,
    integer_product,
    linear_variant,
    quantize_absmax,
    quantize_input,
    quantize_weight,
    quantize_zeropoint,
)

SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 9)


def random_matrix(seed: int, rows: int, columns: int) -> Tensor:
    """Rows of different size and centre, so that every scheme's scales and shifts differ."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(2 * torch.randn(rows, 1, generator=generator))
    return size * (torch.randn(rows, columns, generator=generator) + torch.randn(rows, 1, generator=generator))


def restored(q: Quantized) -> Tensor:
    """The numbers that integers stand for, in fp64."""
    shift = 0 if q.shift is None else q.shift[:, None]
    return (q.codes.double() + shift) * q.scale[:, None].double()


@given(seeds, sizes, st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_codes_are_the_nearest_ones(seed: int, rows: int, columns: int, per_row: bool) -> None:
    x = random_matrix(seed, rows, columns)
    for quantize in (quantize_absmax, quantize_zeropoint):
        q = quantize(x, per_row)
        assert q.codes.dtype == torch.int8 and q.codes.shape == x.shape and int(q.codes.min()) >= -127
        assert bool(((restored(q) - x).abs() <= 0.501 * q.scale[:, None]).all())
        if not per_row:
            assert len(q.scale.unique()) == 1


@given(seeds, sizes, st.integers(1, 40), st.booleans())
@settings(max_examples=60, deadline=None)
def test_zeropoint_uses_the_whole_range(seed: int, rows: int, columns: int, per_row: bool) -> None:
    """The paper's formula with the shift: nd = 254 / (max - min); both ends of the range become the last codes."""
    x = torch.cat([random_matrix(seed, rows, columns), torch.zeros(rows, 1)], dim=1)  # zero counts as part of the range
    q = quantize_zeropoint(x, per_row)
    assert q.shift is not None
    for block, codes, scale in zip(
        x if per_row else [x], q.codes if per_row else [q.codes], q.scale if per_row else q.scale[:1], strict=True
    ):
        assert float(scale) == pytest.approx(float(block.max() - block.min()) / 254, rel=1e-5)
        assert int(codes.min()) == -127 and int(codes.max()) >= 126
    # zero is exact
    assert bool((q.codes[:, -1].long() + q.shift == 0).all())


def test_one_sided_values_are_twice_as_fine_with_zeropoint() -> None:
    """The paper's example: after a ReLU, absmax leaves half of the codes unused."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).relu()
    absmax, zeropoint = (
        float((restored(q(x, True)) - x).square().mean()) for q in (quantize_absmax, quantize_zeropoint)
    )
    assert zeropoint < 0.3 * absmax


@given(seeds, sizes, sizes, st.integers(0, 40), st.sampled_from(SCHEMES))
@settings(max_examples=80, deadline=None)
def test_products_are_exact_and_scales_give_them_back(
    seed: int, rows: int, outputs: int, columns: int, scheme: Scheme
) -> None:
    x, weight = random_matrix(seed, rows, columns), random_matrix(seed + 1, outputs, columns)
    a, b = quantize_input(x, scheme), quantize_weight(weight, scheme)
    left, right = ((q.codes.long() + (0 if q.shift is None else q.shift[:, None])) for q in (a, b))
    assert torch.equal(integer_product(a, b), left @ right.T)
    expected = (restored(a) @ restored(b).T).float()
    # a sum that is exactly zero in codes is one of rounding errors in floating point
    rounding = 1e-12 * float((restored(a).abs() @ restored(b).abs().T).max()) if columns else 0.0
    torch.testing.assert_close(linear_variant(x, weight, None, scheme), expected, rtol=1e-5, atol=1e-30 + rounding)


def test_products_are_exact_at_the_ends_of_the_range() -> None:
    """4096 times 254 * 254 is more than a quarter of int32, and more than fp32 can count."""
    a = Quantized(torch.full((1, 4096), 127, dtype=torch.int8), torch.ones(1), torch.tensor([127]))
    b = Quantized(torch.full((1, 4096), 127, dtype=torch.int8), torch.ones(1), torch.tensor([126]))
    assert int(integer_product(a, b)) == 4096 * 254 * 253


@given(seeds, sizes, sizes, st.integers(2, 40), st.sampled_from(SCHEMES))
@settings(max_examples=80, deadline=None)
def test_decomposition_leaves_columns_to_the_original_weight(
    seed: int, rows: int, outputs: int, columns: int, scheme: Scheme
) -> None:
    """Equal to deleting these columns before anything is quantized, and adding their exact product."""
    x, weight = random_matrix(seed, rows, columns), random_matrix(seed + 1, outputs, columns)
    outliers = (x.abs() >= 3.0).any(0)
    whole = quantize_weight(weight, scheme)
    rest = whole._replace(codes=whole.codes[:, ~outliers])
    expected = x[:, outliers] @ weight[:, outliers].T
    expected += linear_variant(x[:, ~outliers], weight[:, ~outliers], None, scheme, quantized=rest)
    torch.testing.assert_close(linear_variant(x, weight, None, scheme, 3.0), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_vector_wise_is_what_the_op_computes(dtype: torch.dtype, tolerance: float) -> None:
    x, weight, bias = (random_matrix(seed, rows, 96).to(dtype) for seed, rows in ((0, 7), (1, 5), (2, 1)))
    bias = bias[0, :5]
    codes, scale = quantize_rowwise(weight)
    plain = int8_linear(x, codes, scale, bias, outliers=None)
    torch.testing.assert_close(linear_variant(x, weight, bias, "absmax vector-wise"), plain, rtol=tolerance, atol=1e-5)
    stored = int8_linear(
        x, codes, scale, bias, 6.0, "absolute", "batch", outlier_columns=torch.arange(96), outlier_weight=weight
    )
    assert not torch.equal(stored, plain)
    decomposed = linear_variant(x, weight, bias, "absmax vector-wise", 6.0)
    torch.testing.assert_close(decomposed, stored, rtol=tolerance, atol=tolerance)


def test_what_has_scales_of_its_own() -> None:
    """A large row of X, or of W, spoils the others where they share a scale with it, and only there."""
    x, weight = torch.randn(6, 64), torch.randn(5, 64)
    large_x, large_weight = x.clone(), weight.clone()
    large_x[0] *= 1000
    large_weight[0] *= 1000
    for scheme in SCHEMES:
        before = linear_variant(x, weight, None, scheme)[1:, 1:]
        own_rows = torch.equal(linear_variant(large_x, weight, None, scheme)[1:, 1:], before)
        own_outputs = torch.equal(linear_variant(x, large_weight, None, scheme)[1:, 1:], before)
        assert (own_rows, own_outputs) == (scheme.endswith("-wise"), scheme.endswith("vector-wise")), scheme


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leading_dimensions_and_a_real_layer(scheme: Scheme) -> None:
    layer = make_model("qwen2").model.layers[0].self_attn.q_proj
    x = torch.randn(2, 3, layer.in_features)
    y = linear_variant(x, layer.weight, layer.bias, scheme)
    assert torch.equal(y.flatten(0, 1), linear_variant(x.flatten(0, 1), layer.weight, layer.bias, scheme))
    exact = layer(x)
    assert float((y - exact).norm() / exact.norm()) < 0.03
    quantized = quantize_weight(layer.weight, scheme)
    assert torch.equal(y, linear_variant(x, layer.weight, layer.bias, scheme, quantized=quantized))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_zeros_nan_and_infinity(scheme: Scheme) -> None:
    weight, bias = torch.randn(3, 8), torch.randn(3)
    assert torch.equal(linear_variant(torch.zeros(2, 8), weight, bias, scheme), bias.expand(2, 3))
    assert torch.equal(linear_variant(torch.randn(2, 8), torch.zeros(3, 8), bias, scheme), bias.expand(2, 3))
    assert linear_variant(torch.zeros(0, 8), weight, bias, scheme).shape == (0, 3)
    assert torch.equal(linear_variant(torch.zeros(2, 0), torch.zeros(3, 0), bias, scheme), bias.expand(2, 3))
    for bad in (float("nan"), float("inf")):
        x = torch.randn(2, 8)
        x[0, 3] = bad
        for threshold in (None, 6.0):
            y = linear_variant(x, weight, bias, scheme, threshold)
            assert not y[0].isfinite().any()
            assert y[1].isfinite().all() or not scheme.endswith("-wise")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"scheme": "columnwise"}, "scheme must be one of 'absmax'"),
        ({"threshold": 0.0}, "threshold must be greater than 0"),
        ({"threshold": float("nan")}, "threshold must be greater than 0"),
        ({"x": torch.zeros(2, 5)}, "must be"),
        ({"x": torch.tensor(1.0)}, "must be"),
        ({"x": torch.zeros(2, 4, dtype=torch.int64)}, "x must be a matrix of fp32"),
        ({"weight": torch.zeros(4, dtype=torch.float64)}, "must be"),
        ({"weight": torch.zeros(3, 4, dtype=torch.float64)}, "weight must be a matrix of fp32"),
    ],
)
def test_bad_arguments_are_refused(changes: dict[str, object], match: str) -> None:
    arguments = {"x": torch.randn(2, 4), "weight": torch.randn(3, 4), "bias": None, "scheme": "absmax"} | changes
    with pytest.raises(ConfigurationError, match=match):
        linear_variant(**arguments)  # type: ignore[arg-type]
