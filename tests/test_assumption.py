"""The sparsity of kernel matrices, against dense ones that are sorted: of points, of any matrix, of attention."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import gossamer.operators.gaussian.assumption as assumption_module
from gossamer.errors import ConfigurationError
from gossamer.operators.gaussian.assumption import (
    AssumptionReport,
    attention_points,
    measure_assumption,
    measure_exponents,
)
from gossamer.operators.gaussian.kernel import GaussianKernel
from sparsity_references import check, dense


def points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- points ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    n_q=st.integers(1, 70),
    n_k=st.integers(1, 70),
    d=st.integers(1, 9),
    bandwidth=st.floats(0.4, 20.0),
    seed=st.integers(0, 99),
)
def test_statistics_are_those_of_the_dense_matrix(n_q: int, n_k: int, d: int, bandwidth: float, seed: int) -> None:
    queries, keys = points(n_q, d, seed), points(n_k, d, seed + 1)
    report = GaussianKernel(queries, keys, bandwidth).assumption()
    check(report, dense(queries, keys, bandwidth))
    assert report.prefixes[-1].n == report.n and (n_q == n_k or len(report.prefixes) == 1)


@settings(max_examples=20, deadline=None)
@given(n=st.integers(1, 90), bandwidth=st.floats(0.4, 5.0), seed=st.integers(0, 99), data=st.data())
def test_prefixes_are_those_of_the_dense_matrix(n: int, bandwidth: float, seed: int, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(1, n), max_size=12))
    queries, keys = points(n, 3, seed), points(n, 3, seed + 1)
    report = measure_assumption(GaussianKernel(queries, keys, bandwidth), lengths)
    matrix = dense(queries, keys, bandwidth)
    assert [each.n for each in report.prefixes] == sorted({*lengths, n})
    for each in report.prefixes:
        check(each, matrix[: each.n, : each.n])
    assert report.ratio == report.prefixes[-1].ratio


def test_prefixes_are_halved_by_default() -> None:
    own = points(100, 3)
    report = GaussianKernel(own, own, 0.5).assumption(prefixes=4)
    assert [each.n for each in report.prefixes] == [13, 25, 50, 100]


def test_duplicates_count_as_entries_of_one() -> None:
    """K is 1 between copies, and it is so exactly: nothing of it is below tau = 1."""
    own = points(20, 5).repeat(5, 1) + 1000.0
    report = GaussianKernel(own, own, 0.01).assumption()
    assert report.sum_per_query == pytest.approx(5.0) and report.light_energy[0] == pytest.approx(0.0, abs=1e-12)
    assert report.ratio == pytest.approx(4.0) and report.ratio_error < 1e-9
    assert report.effective_support == pytest.approx(5.0)


def test_equal_points_are_the_worst_case_and_grow_like_n() -> None:
    report = GaussianKernel(torch.ones(64, 2), torch.ones(64, 2), 1.0).assumption()
    assert report.ratio == 63.0 and report.ratio_error == 0 and report.effective_support == 64.0
    assert report.growth == pytest.approx(1.0, abs=0.1)
    assert report.largest.n == 64


def test_points_that_are_far_apart_are_the_identity() -> None:
    own = torch.arange(50.0)[:, None]
    report = GaussianKernel(own, own, 1e-3).assumption()
    assert (report.ratio, report.sum_per_query, report.effective_support) == (0.0, 1.0, 1.0)
    assert report.growth is None


def test_single_precision_is_that_of_the_kernel() -> None:
    own = points(300, 16).float() + 3.0
    check(GaussianKernel(own, own, 2.0).assumption(), dense(own, own, 2.0), rel=1e-5)


@pytest.mark.parametrize("block", [1, 100, 1 << 20])
def test_blocks_change_nothing(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    own = points(60, 3)
    kernel = GaussianKernel(own, own, 0.7)
    expected = kernel.assumption()
    monkeypatch.setattr(assumption_module, "_BLOCK", block)
    found = kernel.assumption()
    for one, other in zip(found.prefixes, expected.prefixes, strict=True):
        assert vars(one).keys() == vars(other).keys()
        for name, value in vars(one).items():
            assert value == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-12)


# --- any matrix ------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(0, 3, width=32), min_size=1, max_size=4),
    width=st.sampled_from([1e-3, 1e-2, 0.1, 300.0]),
    n=st.integers(1, 12),
    shift=st.sampled_from([0.0, 0.3, 700.0]),
    seed=st.integers(0, 99),
)
def test_the_error_is_bounded_however_a_bin_is_filled(
    values: list[float], width: float, n: int, shift: float, seed: int
) -> None:
    """A few values within a bin, or far more than 128 octaves apart, and all of K too small for a number."""
    choice = torch.randint(len(values), (n, n), generator=torch.Generator().manual_seed(seed))
    exponents = torch.tensor(values, dtype=torch.float64)[choice] * width
    report = measure_exponents(lambda rows: exponents[rows] + shift * 3, (n, n), prefixes=1)
    ordered = torch.exp2(exponents.min() - exponents).flatten().sort(descending=True).values
    ratio = float(ordered[n:].sum() / ordered[:n].sum())
    assert abs(report.ratio - ratio) <= report.ratio_error + 1e-9 * (1 + ratio)
    assert report.ratio_error <= 0.011 * (1 + ratio)


def test_larger_entries_may_come_last() -> None:
    """The histogram moves down, and what no longer fits is kept in its last bin."""
    exponents = torch.linspace(400, 0, 40, dtype=torch.float64)[:, None] + points(40, 40).abs()
    forward, backward = (
        measure_exponents(lambda rows, part=part: part[rows].contiguous(), (40, 40), prefixes=1)
        for part in (exponents, exponents.flip(0))
    )
    assert forward.ratio == pytest.approx(backward.ratio, rel=1e-9)
    assert forward.sum_per_query == pytest.approx(backward.sum_per_query, rel=1e-12)
    check(forward, torch.exp2(-exponents))


def test_prefixes_far_below_the_largest_entry_have_a_ratio() -> None:
    exponents = torch.full((8, 8), 500.0, dtype=torch.float64)
    exponents[7, 7] = 0.0
    report = measure_exponents(lambda rows: exponents[rows], (8, 8), prefixes=[4])
    assert math.isfinite(report.prefixes[0].ratio) and report.prefixes[0].ratio_error >= 0
    assert report.prefixes[0].ratio <= 3 + report.prefixes[0].ratio_error


# --- pilots ----------------------------------------------------------------------------------------------------------


def test_all_rows_are_no_estimate() -> None:
    queries, keys = points(40, 3), points(70, 3, 1)
    kernel = GaussianKernel(queries, keys, 0.5)
    found = kernel.assumption(pilot=40)
    check(found, dense(queries, keys, 0.5))
    assert found.pilot == 40 and len(found.prefixes) == 1


def test_a_pilot_is_near_as_often_as_it_says() -> None:
    own = points(1500, 4)
    exact = GaussianKernel(own, own, 0.6).assumption(prefixes=1)
    pilots = [GaussianKernel(own, own, 0.6, seed=seed).assumption(pilot=150) for seed in range(20)]
    hits = sum(abs(each.ratio - exact.ratio) <= each.ratio_error for each in pilots)
    assert hits >= 16  # two standard errors, of few groups
    mean = sum(each.sum_per_query for each in pilots) / 20
    assert mean == pytest.approx(exact.sum_per_query, rel=0.05)
    assert all(each.ratio_error < 0.5 * exact.ratio for each in pilots)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prefixes": 0}, "1 to 1024, got 0"),
        ({"prefixes": [0, 5]}, "1 to 10 long, got 0"),
        ({"prefixes": [11]}, "1 to 10 long, got 11"),
        ({"pilot": 1}, "2 to 10 rows, got 1"),
        ({"pilot": 11}, "2 to 10 rows, got 11"),
    ],
)
def test_numbers_out_of_range(arguments: dict[str, Any], message: str) -> None:
    own = points(10, 2)
    with pytest.raises(ConfigurationError, match=message):
        GaussianKernel(own, own, 1.0).assumption(**arguments)


def test_points_beyond_double_precision() -> None:
    own = points(10, 2) * 1e200
    with pytest.raises(ConfigurationError, match="fp64"):
        GaussianKernel(own, own, 1.0).assumption()


# --- the report ------------------------------------------------------------------------------------------------------


def report_of_points() -> AssumptionReport:
    own = points(64, 3)
    return GaussianKernel(own, own, 0.5).assumption()


def test_report_is_json() -> None:
    found = json.loads(json.dumps(report_of_points().to_dict()))
    assert found["n"] == 64 and found["prefixes"][-1]["ratio"] == found["ratio"]
    assert len(found["light_energy"]) == len(found["taus"]) == 21 and found["pilot"] is None


def test_plot_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    report_of_points().plot(tmp_path / "plot.svg")
    assert "sum per query" in (tmp_path / "plot.svg").read_text()
    for path in (tmp_path / "none" / "plot.svg", tmp_path / "plot.nothing"):
        with pytest.raises(ConfigurationError, match=str(path)):
            report_of_points().plot(path)


def test_plot_says_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match="plots"):
        report_of_points().plot(tmp_path / "plot.svg")


# --- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize("centre", [True, False])
def test_attention_is_a_kernel_up_to_a_factor_per_row(scale: float | None, centre: bool) -> None:
    q, k = points(30, 16), points(50, 16, 1) + 2.0
    queries, keys, bandwidth = attention_points(q, k, scale, centre)
    beta = 0.25 if scale is None else scale
    moved = k - k.mean(0) if centre else k
    largest = moved.square().sum(1).max()
    factor = torch.exp(beta * (largest + q.square().sum(1)) / 2)
    kernel = dense(queries, keys, bandwidth)
    assert torch.allclose(torch.exp(beta * q @ moved.T), factor[:, None] * kernel, rtol=1e-9)
    assert torch.allclose((beta * q @ k.T).softmax(1), kernel / kernel.sum(1, keepdim=True), rtol=1e-9)
    assert bandwidth**2 == pytest.approx(1 / beta)


def test_attention_points_are_checked() -> None:
    with pytest.raises(ConfigurationError, match=r"\(3, 4\) and \(3, 5\)"):
        attention_points(points(3, 4), points(3, 5))
    with pytest.raises(ConfigurationError, match="scale"):
        attention_points(points(3, 4), points(3, 4), scale=0.0)
