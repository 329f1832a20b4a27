"""The published algorithm, reconstructed for few points: its contract, and the parts it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.papers.gaussian_kernel import ALPHA, DENSITY_ERROR, FAILURE, GAMMA, MOST_POINTS, reference_paper


@dataclass
class Family:
    """A kernel matrix whose entries sum up to about n, and a vector."""

    queries: Tensor
    keys: Tensor
    x: Tensor
    bandwidth: float = 1.0

    @property
    def matrix(self) -> Tensor:
        return torch.exp(-torch.cdist(self.queries, self.keys).square() / (2 * self.bandwidth**2))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def clusters(n: int, seed: int) -> Tensor:
    """Five points each, near one another in bandwidths; most entries between clusters are small and none is 0."""
    return 1.6 * normal(n // 5, 8, seed=seed).repeat_interleave(5, 0) + 0.3 * normal(n, 8, seed=seed + 1)


def signed(n: int, seed: int) -> Family:
    points = clusters(n, seed)
    return Family(points, points, normal(n, seed=seed + 2))


def other_units(n: int, seed: int) -> Family:
    """Queries that are not the keys, more of them, and neither points nor x of size 1."""
    keys = clusters(n, seed)
    queries = torch.cat([keys + 0.1 * normal(n, 8, seed=seed + 2), clusters(n // 2, seed + 3)])
    return Family(1e-3 * queries, 1e-3 * keys, 1e200 * normal(n, seed=seed + 4), bandwidth=1e-3)


def nullspace(n: int, seed: int) -> Family:
    """Pairs of equal keys whose coordinates cancel: K x = 0, whatever the queries are."""
    points = clusters(n // 2, seed).repeat_interleave(2, 0)
    x = normal(n // 2, seed=seed + 2)
    return Family(points, points, torch.stack([x, -x], 1).reshape(-1))


def giant(n: int, seed: int) -> Family:
    family = signed(n, seed)
    family.x[n // 3] = 1e5
    return family


def row_of_ones(n: int, seed: int) -> Family:
    """One query is near all keys, and the others near none of them."""
    keys = 0.05 * normal(n, 8, seed=seed)
    queries = 5.0 * torch.nn.functional.normalize(normal(n, 8, seed=seed + 1))
    queries[0] = 0
    return Family(queries, keys, torch.ones(n, dtype=torch.float64))


FAMILIES = [signed, other_units, nullspace, giant, row_of_ones]


@pytest.mark.parametrize("make", FAMILIES)
def test_the_error_is_below_eps(make: Callable[[int, int], Family]) -> None:
    for seed, (n, eps) in enumerate([(500, 0.1), (500, 0.5), (500, 2.0), (1000, 0.5)]):
        family = make(n, 10 * seed)
        y, report = reference_paper(family.queries, family.keys, family.bandwidth, family.x, eps, seed)
        size = family.x.abs().max()
        error = float((y / size - family.matrix @ (family.x / size)).norm() / (family.x / size).norm())
        assert error <= eps, (n, eps, error)
        assert report.heavy_found <= report.heavy_true <= len(family.matrix) * n
        assert report.recall >= 0.99
        assert report.large == int(report.n ** (1 - GAMMA))
        assert report.evaluations <= family.matrix.numel()


def test_at_fifteen_hundred_points_the_parts_are_what_theory_says() -> None:
    family = signed(1500, 3)
    y, report = reference_paper(family.queries, family.keys, 1.0, family.x, 0.5)
    exact = family.matrix @ family.x
    assert (y - exact).norm() <= 0.5 * family.x.norm()
    assert exact.norm() > family.x.norm()  # so that y = 0 would not do
    assert report.tables == math.ceil(1500**ALPHA * math.log(1500))
    left = family.x.abs().argsort(descending=True)[report.large : 1500 - report.dropped]
    assert report.heavy_true == int((family.matrix[:, left] >= 1500**-ALPHA).sum())
    assert float(family.x[left].square().max()) <= 1500 ** (GAMMA - 1) * float(family.x.square().sum())
    # Most heavy pairs by far are found, and most light ones by far are not looked at for them.
    assert report.recall >= 0.999
    assert report.heavy_true <= report.candidates < 0.2 * family.matrix.numel()
    assert report.exponents["samples, for the error of the second moments"] == pytest.approx(1.891)


def test_draws_follow_the_second_moments() -> None:
    family = signed(500, 0)
    eps = 0.5
    _, report = reference_paper(family.queries, family.keys, 1.0, family.x, eps)
    left = family.x.abs().argsort(descending=True)[report.large : 500 - report.dropped]
    squares = family.matrix[:, left].square()
    light = torch.where(family.matrix[:, left] >= 500**-ALPHA, 0, squares)
    slack = 500**-DENSITY_ERROR
    # All heavy pairs are found here, so that only the rounding of x_j^2 up to 1 + eps times is unknown.
    least = (light + slack * squares) @ family.x[left].square() / family.x.square().sum()
    least = 500 * len(left) * least / (FAILURE * eps**2)
    assert report.recall == 1
    assert bool((report.draws >= 0.999 * least).all())
    assert bool((report.draws <= (1 + eps) * least + 1).all())


@pytest.mark.parametrize("make", [signed, nullspace, row_of_ones])
def test_the_light_part_is_unbiased_and_as_precise_as_planned(make: Callable[[int, int], Family]) -> None:
    family, eps, runs = make(100, 0), 1.0, 80
    exact = family.matrix @ family.x
    errors = torch.stack(
        [reference_paper(family.queries, family.keys, 1.0, family.x, eps, seed).y - exact for seed in range(runs)]
    )
    squared = float(errors.square().sum(1).mean())
    assert 0 < squared <= FAILURE * eps**2 * float(family.x.square().sum())
    # |mean of unbiased errors|^2 is about chi squared, with as many degrees of freedom as rows are independent.
    covariance = errors.T @ errors / runs
    freedom = float(covariance.trace().square() / covariance.square().sum())
    assert float(errors.mean(0).square().sum()) <= (1 + 4 * math.sqrt(2 / freedom)) * squared / runs


def test_a_seed_gives_the_same_numbers() -> None:
    family = signed(200, 0)
    first, again, other = (
        reference_paper(family.queries, family.keys, 1.0, family.x, 1.0, seed).y for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_tiny_coordinates_are_dropped_and_what_is_left_may_be_nothing() -> None:
    family = signed(200, 0)
    x = family.x.clone()
    x[100:] *= 1e-12
    y, report = reference_paper(family.queries, family.keys, 1.0, x, 0.1)
    assert report.dropped == 100 and report.large == 100 and report.heavy_true == 0
    torch.testing.assert_close(y, family.matrix[:, :100] @ x[:100])

    y, report = reference_paper(family.queries, family.keys, 1.0, torch.zeros_like(x), 0.1)
    assert not y.any() and report.evaluations == 0 and report.recall == 1

    one = torch.ones(1, 3)  # a single point, in fp32
    y, report = reference_paper(one, one, 1.0, torch.tensor([-2.0]), 1e-6)
    assert y.tolist() == [-2.0] and report.large == 1


def test_what_does_not_fit_is_said_with_numbers() -> None:
    points, x = torch.zeros(4, 2), torch.ones(4)
    nan = torch.tensor([0.0, 0.0, math.nan, 0.0])
    for arguments, message in [
        ((points, points, 0.0, x, 0.1), "above 0, got 0.0"),
        ((points, torch.zeros(4, 3), 1.0, x, 0.1), "2 dimensions, keys 3"),
        ((points, points, 1.0, torch.ones(5), 0.1), r"x is \(4\) floating-point numbers, got \(5,\)"),
        ((points, points, 1.0, torch.ones(4, 1), 0.1), r"got \(4, 1\)"),
        ((points, points, 1.0, torch.ones(4, dtype=torch.int64), 0.1), "torch.int64"),
        ((points, points, 1.0, nan, 0.1), "not finite, at 2"),
        ((points, points, 1.0, x, 0.0), "at least, got 0.0"),
        ((points, points, 1.0, x, math.nan), "at least, got nan"),
        ((points, points, 1.0, x, math.inf), "at least, got inf"),
        ((torch.zeros(MOST_POINTS + 1, 2), points, 1.0, x, 0.1), f"at most, got {MOST_POINTS + 1} and 4"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            reference_paper(*arguments)
    # So few points may drop coordinates that count.
    x = torch.cat([torch.tensor([1.0]), torch.full((9,), 1e-2), torch.full((10,), 6e-6)])
    with pytest.raises(ConfigurationError, match=r"eps = 1e-06 is below 0.00038"):
        reference_paper(torch.zeros(20, 2), torch.zeros(20, 2), 1.0, x, 1e-6)
