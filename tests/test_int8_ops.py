"""The int8 linear op against the paper's formula in fp64 and int64, on both of its product paths."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.ops import int8
from gossamer.ops.int8 import int8_linear, int8_matmul, outlier_mask, quantize_columnwise, quantize_rowwise
from int8_references import EPS, Layer, assert_as_expected, expected_linear, linear, random_layer, random_rows

TYPES = (torch.float32, torch.bfloat16, torch.float16)
MODES = ("batch", "token", "static", None)
NAN, INF = float("nan"), float("inf")
seeds = st.integers(0, 2**31 - 1)
sizes = st.sampled_from([0, 1, 2, 3, 7, 16, 31, 65])


@pytest.fixture(scope="module", params=["torch._int_mm", "fp32 in chunks"])
def product(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to multiply codes, whatever this processor would choose."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "_int_mm_is_fast", lambda device: request.param == "torch._int_mm")
        yield


def lay_out(x: Tensor, layout: str) -> Tensor:
    """Numbers of x in another memory layout; the expanded ones repeat its first row or column."""
    rows, columns = x.shape
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "strided":
        return x.repeat_interleave(2, 1)[:, ::2]
    if layout == "part of a larger one":
        return torch.cat([x, x], 1)[:, :columns]
    if layout == "one row" and rows:
        return x[:1].expand(rows, columns)
    if layout == "one column" and columns:
        return x[:, :1].expand(rows, columns)
    return x


layouts = st.sampled_from(["plain", "transposed", "strided", "part of a larger one", "one row", "one column"])


# --- quantization ----------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seeds, sizes, sizes, st.sampled_from(TYPES), st.integers(-30, 30))
def test_codes_are_within_half_a_scale(seed: int, rows: int, columns: int, dtype: torch.dtype, exponent: int) -> None:
    power = exponent if dtype != torch.float16 else exponent / 10
    x = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0**power).to(dtype)
    codes, scale = quantize_rowwise(x)
    assert (codes.dtype, scale.dtype, codes.shape, scale.shape) == (torch.int8, torch.float32, x.shape, x.shape[:1])
    assert bool((codes >= -127).all())
    error = (codes.double() * scale.double()[:, None] - x.double()).abs()
    assert bool((error <= scale.double()[:, None] / 2 * (1 + 256 * EPS)).all())
    if columns:
        assert torch.equal(scale, x.float().abs().amax(1) / 127)
        assert bool((codes.abs().amax(1) == 127).all())  # the whole range is used
    across = quantize_columnwise(x.T)
    assert torch.equal(across[0], codes.T) and torch.equal(across[1], scale)


def test_rows_that_have_no_scale_of_their_own() -> None:
    smallest = 2.0**-149
    x = torch.tensor([[0.0, -0.0], [NAN, 1.0], [INF, 1.0], [-INF, 0.0], [smallest, 180 * smallest]])
    codes, scale = quantize_rowwise(x)
    assert not codes[:4].any()
    assert scale[0] == 0 and scale[1].isnan() and scale[2] == INF and scale[3] == INF
    # absmax / 127 is hardly a number any more where absmax is the smallest there is: the error is as small
    error = (codes[4].double() * scale[4].double() - x[4].double()).abs()
    assert bool((error <= scale[4].double() / 2 + 64 * smallest).all())


# --- the integer product ---------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(seed=seeds, rows=sizes, inner=sizes, columns=sizes, left=layouts, right=layouts)
def test_the_product_of_codes_is_exact(
    product: None, seed: int, rows: int, inner: int, columns: int, left: str, right: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a = lay_out(torch.randint(-128, 128, (rows, inner), generator=generator, dtype=torch.int8), left)
    b = lay_out(torch.randint(-128, 128, (columns, inner), generator=generator, dtype=torch.int8), right)
    result = int8_matmul(a, b)
    assert result.dtype == torch.int32
    assert torch.equal(result.long(), a.long() @ b.long().T)


@pytest.mark.parametrize("inner", [1023, 1024, 1025, 4096, 131_071])
@pytest.mark.parametrize(("left", "right"), [(-128, -128), (127, -128), (127, 127)])
def test_the_product_is_exact_where_sums_are_largest(product: None, inner: int, left: int, right: int) -> None:
    a = torch.full((3, inner), left, dtype=torch.int8)
    b = torch.full((5, inner), right, dtype=torch.int8)
    assert int8_matmul(a, b).tolist() == [[inner * left * right] * 5] * 3
    assert int8_matmul(a[:1], b[:1].expand(7, inner)).tolist() == [[inner * left * right] * 7]


def test_the_product_is_exact_whatever_precision_is_set_for_fp32(product: None) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(-128, 128, (33, 1500), generator=generator, dtype=torch.int8) for _ in range(2))
    exact = a.long() @ b.long().T
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(int8_matmul(a, b).long(), exact)
    finally:
        torch.set_float32_matmul_precision(before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(int8_matmul(a, b).long(), exact)


def test_more_inner_columns_than_int32_can_sum(product: None) -> None:
    inner = 140_000
    codes = torch.full((2, inner), -128, dtype=torch.int8)
    with pytest.raises(ConfigurationError, match="131071"):
        int8_matmul(codes, codes)
    # every product is 127 * -128 but for one row that cancels: sums of -2.3e9 and 0
    x = torch.ones(2, inner)
    x[1, ::2] = -1
    result = int8_linear(x, codes, torch.tensor([1.0, 0.5]), outliers=None)
    expected = torch.tensor([[-128.0 * inner, -64.0 * inner], [0.0, 0.0]])
    torch.testing.assert_close(result, expected, rtol=4 * EPS, atol=0)


# --- the layer -------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    seed=seeds,
    rows=sizes,
    inputs=sizes,
    outputs=sizes,
    mode=st.sampled_from(MODES),
    criterion=st.sampled_from(["absolute", "relative"]),
    threshold=st.sampled_from([0.3, 1.5, 6.0, 1e9]),
    dtype=st.sampled_from(TYPES),
    layout=layouts,
    bias=st.booleans(),
    store=st.booleans(),
    piece=st.sampled_from([1, 3, 10**6]),
)
def test_the_layer_is_the_papers_formula(
    product: None,
    seed: int,
    rows: int,
    inputs: int,
    outputs: int,
    mode: str | None,
    criterion: str,
    threshold: float,
    dtype: torch.dtype,
    layout: str,
    bias: bool,
    store: bool,
    piece: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = None
    if store or mode == "static":
        count = int(torch.randint(0, inputs + 1, (), generator=generator))
        kept = torch.randperm(inputs, generator=generator)[:count].tolist()
    layer = random_layer(generator, inputs, outputs, bias=bias, kept=kept)
    x = lay_out(random_rows(generator, rows, inputs).to(dtype), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "piece_rows", lambda columns: piece)
        result = linear(x, layer, threshold, criterion, mode)
    assert result.dtype == dtype
    assert_as_expected(result, expected_linear(x, layer, threshold, criterion, mode))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("criterion", ["absolute", "relative"])
def test_a_layer_of_ordinary_size(product: None, mode: str | None, criterion: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layer = random_layer(generator, 1537, 515, bias=True, kept=[1536, 0, 700])
    x = random_rows(generator, 6, 1537, share=0.005)
    assert_as_expected(linear(x, layer, 6.0, criterion, mode), expected_linear(x, layer, 6.0, criterion, mode))
    cube = x.reshape(2, 3, 1, 1537)
    assert torch.equal(
        linear(cube, layer, 6.0, criterion, mode), linear(x, layer, 6.0, criterion, mode).view(2, 3, 1, -1)
    )
    flat = linear(x[0], layer, 6.0, criterion, mode)
    assert flat.shape == (515,) and torch.equal(flat, linear(x[:1], layer, 6.0, criterion, mode)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
def test_rows_of_zeros_give_the_bias(mode: str | None, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    layer = random_layer(generator, 40, 6, bias=True, kept=[3])
    assert layer.bias is not None
    x = random_rows(generator, 5, 40).to(dtype)
    x[1] = 0
    result = linear(x, layer, 6.0, "relative", mode)
    assert torch.equal(result[1], layer.bias.to(dtype))
    assert not result.isnan().any()
    nothing = Layer(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.int8), torch.zeros(3), torch.arange(3.0))
    assert linear(torch.ones(2, 0), nothing).tolist() == [[0, 1, 2], [0, 1, 2]]  # K = 0 is a sum of nothing


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("criterion", ["absolute", "relative"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("column", [3, 4])  # in the store, and not
def test_what_is_not_a_number_stays_in_its_row(
    product: None, mode: str | None, criterion: str, bad: float, column: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    layer = random_layer(generator, 40, 6, bias=True, kept=[3])
    x = random_rows(generator, 7, 40, share=0.1)
    x[2] = torch.randn(40, generator=generator).clamp(-1, 1)  # without outliers of its own
    poisoned = x.clone()
    poisoned[2, column] = bad
    result = linear(poisoned, layer, 6.0, criterion, mode)
    assert not result[2].isfinite().any()
    assert bad == bad or result[2].isnan().all()
    others = torch.arange(7) != 2
    assert bool(result[others].isfinite().all())
    if abs(bad) == INF and criterion == "absolute" and mode in ("batch", "token"):
        # an infinity is an outlier here: it takes its column out of every row (batch), or changes the order of sums
        same = expected_linear(x[others] if mode == "token" else poisoned, layer, 6.0, criterion, mode)
        if mode == "batch":
            same = type(same)(*(part[others] for part in same))
        assert_as_expected(result[others], same)
    else:
        assert torch.equal(result[others], linear(x, layer, 6.0, criterion, mode)[others])


def test_results_that_do_not_fit_are_infinite_as_pytorchs_are() -> None:
    weight, scale = quantize_rowwise(torch.tensor([[100.0] * 8, [-100.0] * 8, [1.0] * 8]))
    x = torch.full((2, 8), 1000.0, dtype=torch.float16)
    plain = torch.nn.functional.linear(x, (weight.float() * scale[:, None]).half())
    assert torch.equal(int8_linear(x, weight, scale), plain) and plain[0].tolist() == [INF, -INF, 8000]


@pytest.mark.parametrize("size", [1e-44, 1e-41, 1e-36, 1e-30, 1e30, 1e35])
def test_sizes_at_the_ends_of_fp32(size: float) -> None:
    x = torch.full((1, 4096), size)
    weight, scale = quantize_rowwise(torch.full((2, 4096), 0.01))
    result = int8_linear(x, weight, scale, outliers=None)
    expected = (x.double() @ (weight.double() * scale.double()[:, None]).T).float()
    # the scale of numbers near 1e-44 has no digits to spare; see quantize_rowwise
    torch.testing.assert_close(result, expected, rtol=1e-5 if size > 1e-36 else 0.02, atol=4096 * 0.01 * 64 * 2.0**-149)


# --- what a row depends on -------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(
    seed=seeds, rows=st.integers(2, 40), inputs=st.sampled_from([1, 5, 64, 577]), mode=st.sampled_from([None, "token"])
)
def test_without_outliers_a_row_is_bit_equal_in_any_company(
    product: None, seed: int, rows: int, inputs: int, mode: str | None
) -> None:
    """All sums are of integers then, and everything else is done entry by entry."""
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(generator, inputs, 67, bias=True)
    x = torch.randn(rows, inputs, generator=generator)
    settings_ = (1e9, "absolute", mode)
    result = linear(x, layer, *settings_)
    for row in range(rows):
        assert torch.equal(result[row], linear(x[row], layer, *settings_))
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(result[order], linear(x[order], layer, *settings_))
    wild = torch.cat([x, random_rows(generator, 3, inputs, share=0.5)])
    if mode is None:
        assert torch.equal(result, linear(wild, layer, *settings_)[:rows])


@settings(deadline=None, max_examples=30)
@given(seed=seeds, rows=st.integers(2, 40), inputs=st.sampled_from([5, 64, 577]), store=st.booleans())
def test_per_token_a_row_is_the_same_in_any_company_up_to_fp32_sums(
    seed: int, rows: int, inputs: int, store: bool
) -> None:
    """Neighbours with outliers elsewhere add zeros to a row's floating-point sum, which moves its rounding, no more.

    A sum of S terms v w in fp32 is within S eps sum |v w| in any order; two of them differ by twice that. S is the
    number of columns in which *any* row has an outlier.
    """
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(generator, inputs, 67, kept=list(range(0, inputs, 3)) if store else None)
    x = random_rows(generator, rows, inputs, share=0.1)
    mask = outlier_mask(x, 6.0, "relative", "token")
    exact = layer.original.abs() * 1.01 + layer.scale[:, None]  # no less than any weight that may be used
    sums = (x * mask).abs().double() @ exact.double().T
    together = linear(x, layer)
    tolerance = 2 * (int(mask.any(0).sum()) + 2) * EPS * (sums + together.abs())
    alone = torch.cat([linear(row[None], layer) for row in x])
    assert bool(((together - alone).abs() <= tolerance).all())
    quiet = ~mask.any(1)
    assert torch.equal(together[quiet], alone[quiet])
    order = torch.randperm(rows, generator=generator)
    assert bool(((together[order] - linear(x[order], layer)).abs() <= tolerance[order]).all())


@pytest.mark.parametrize(("rows", "inputs"), [(64, 576), (16, 1), (8, 1537), (4, 70_000)])
def test_whether_an_entry_is_an_outlier_does_not_depend_on_its_company(rows: int, inputs: int) -> None:
    """Entries within rounding of the threshold: the mean must be the same number for any batch and memory layout."""
    x = torch.randn(rows, inputs, generator=torch.Generator().manual_seed(4))
    for _ in range(30):
        x[:, 0] = 6 * x.abs().mean(1)
    for criterion in ("relative", "absolute"):
        mask = outlier_mask(x, 6.0, criterion, "token")
        assert torch.equal(mask, torch.cat([outlier_mask(row[None], 6.0, criterion, "token") for row in x]))
        assert torch.equal(mask, outlier_mask(lay_out(x, "transposed"), 6.0, criterion, "token"))
        assert torch.equal(mask, outlier_mask(lay_out(x, "strided"), 6.0, criterion, "token"))


def test_in_batch_mode_a_row_depends_on_its_neighbours() -> None:
    """As the paper has it: one row's outlier takes the column out of all of them."""
    generator = torch.Generator().manual_seed(5)
    layer = random_layer(generator, 64, 8)
    x = torch.randn(2, 64, generator=generator)
    x[0, 7] = 50.0
    alone = linear(x[1], layer, 6.0, "absolute", "batch")
    assert not torch.allclose(linear(x, layer, 6.0, "absolute", "batch")[1], alone, rtol=1e-4)
    assert torch.allclose(linear(x, layer, 6.0, "absolute", "token")[1], alone, rtol=1e-5)


# --- outliers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["batch", "token", "static"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_columns_use_their_16_bit_weights_and_no_others(mode: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(6)
    codes = torch.randint(-127, 128, (9, 50), generator=generator, dtype=torch.int8)
    scale = torch.rand(9, generator=generator)
    columns = torch.tensor([31, 4, 17])  # any order
    exact = torch.randn(9, 3, generator=generator).to(dtype) * 100  # nothing like the codes
    x = torch.zeros(4, 50)
    x[0, 4], x[1, 31], x[2, 17], x[3, 17] = 8.0, -16.0, 32.0, 64.0  # powers of two: products are exact
    arguments = {"outlier_columns": columns, "outlier_weight": exact}
    result = int8_linear(x, codes, scale, None, 6.0, "absolute", mode, **arguments)
    weights = exact.float()
    assert torch.equal(
        result, torch.stack([8 * weights[:, 1], -16 * weights[:, 0], 32 * weights[:, 2], 64 * weights[:, 2]])
    )
    if mode != "static":  # an outlier outside of the store: the dequantized weight
        x = torch.zeros(1, 50)
        x[0, 5], x[0, 4] = 16.0, 8.0
        result = int8_linear(x, codes, scale, None, 6.0, "absolute", mode, **arguments)
        torch.testing.assert_close(result[0], 16.0 * codes[:, 5] * scale + 8 * weights[:, 1], rtol=4 * EPS, atol=0)


def test_the_store_is_left_alone_where_there_are_no_outliers() -> None:
    generator = torch.Generator().manual_seed(7)
    layer = random_layer(generator, 20, 5, kept=[2, 3])
    x = torch.randn(3, 20, generator=generator)
    bare = layer._replace(outlier_columns=None, outlier_weight=None)
    assert torch.equal(linear(x, layer, 100.0), linear(x, bare, 100.0))
    assert torch.equal(linear(x, layer, 0.1, "absolute", None), linear(x, bare, 0.1, "absolute", None))
    empty = layer._replace(outlier_columns=torch.empty(0, dtype=torch.int64), outlier_weight=torch.empty(5, 0))
    assert torch.equal(linear(x, empty, 6.0, "relative", "static"), linear(x, bare, 6.0, "relative", None))


@pytest.mark.parametrize("mode", ["batch", "token"])
@pytest.mark.parametrize("power", [-20, 3, 20])
def test_relative_outliers_do_not_depend_on_the_size_of_the_input(mode: str, power: int) -> None:
    generator = torch.Generator().manual_seed(8)
    layer = random_layer(generator, 128, 16, kept=[1])
    x = random_rows(generator, 9, 128)
    assert outlier_mask(x, 6.0, "relative", mode).any()
    assert torch.equal(
        linear(x * 2.0**power, layer, 6.0, "relative", mode), linear(x, layer, 6.0, "relative", mode) * 2.0**power
    )


def test_what_counts_as_an_outlier() -> None:
    x = torch.tensor([[6.0, -7.0, 5.9, NAN], [0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -8.0]])
    absolute = [[True, True, False, False], [False] * 4, [False, False, False, True]]
    assert outlier_mask(x, 6.0, "absolute", "token").tolist() == absolute
    assert outlier_mask(x, 6.0, "absolute", "batch").tolist() == [[True, True, False, True]] * 3
    # mean 2: 8 is four times that, and "more than" is strict
    assert outlier_mask(x, 3.9, "relative", "token").tolist() == [[False] * 4, [False] * 4, [False, False, False, True]]
    assert not outlier_mask(x, 4.0, "relative", "token").any()


@pytest.mark.parametrize("seed", range(3))
def test_outliers_out_of_int8_make_the_layer_more_exact(seed: int) -> None:
    """The point of the method: with outlier features in the input, plain vector-wise int8 loses the small entries."""
    generator = torch.Generator().manual_seed(seed)
    layer = random_layer(generator, 512, 64, kept=[10, 200, 300])
    x = torch.randn(32, 512, generator=generator)
    x[:, [10, 200, 300]] *= 40.0
    exact = x @ layer.original.T
    error = {mode: float((linear(x, layer, 6.0, "relative", mode) - exact).norm() / exact.norm()) for mode in MODES}
    assert max(error["batch"], error["token"], error["static"]) < error[None] / 3
