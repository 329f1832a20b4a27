"""Products with Gaussian kernel matrices: approximate ones, our exact one, KeOps', and what arithmetic allows.

All of them take the same points and the same x, in turn. The error is measured against the exact product.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.bench.machine import Ceilings, describe, seconds
from gossamer.bench.point_sets import POINT_SETS
from gossamer.errors import ConfigurationError
from gossamer.operators.gaussian.kernel import GaussianKernel
from gossamer.operators.gaussian.report import ProductReport

PUBLISHED = 1.89  # the exponent of n in the theorem (arXiv 2507.23539, as its reviews quote it)
_OPERATIONS = 12  # of an exponential


@dataclass
class KernelResult:
    """One set of points.

    Attributes:
        family, n, d, eps: what was asked for.
        exact: median seconds of our exact product.
        sampled: of the approximate one, its index known.
        first: of the approximate one, its index built for it.
        keops: of KeOps' exact product, ``None`` where it is not installed.
        floor: seconds that the arithmetic of the exact product takes at the rate of a large matrix product.
        error: ``|Kx - y| / |x|`` of the approximate product, the largest of all rounds.
        report: of its last round.
    """

    family: str
    n: int
    d: int
    eps: float
    exact: float
    sampled: float
    first: float
    keops: float | None
    floor: float
    error: float
    report: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"speedup": self.exact / self.sampled, "speedup_first": self.exact / self.first}


def bench_kernel(
    *,
    families: list[str],
    sizes: list[int],
    d: int = 64,
    eps: float = 0.1,
    repeats: int = 3,
    keops: bool = True,
    progress: Callable[[str], None] = lambda what: None,
    on_result: Callable[[KernelResult], None] = lambda result: None,
) -> dict[str, Any]:
    """Measures each family at each size; returns machine, results and fitted growth.

    Args:
        families: of :data:`gossamer.bench.point_sets.POINT_SETS`.
        sizes: numbers of points, which are queries and keys.
        d: dimensions.
        eps: of the approximate products, in units of ``|x|``.
        repeats: rounds that count; each has fresh points and a fresh x.
        keops: measure KeOps too, if it is installed.
        progress: called with what comes next.
        on_result: called with each result when it is there.

    Raises:
        ConfigurationError: there is no such family, or a size, d, eps or repeats is not above 0.
    """
    unknown = [family for family in families if family not in POINT_SETS]
    if unknown:
        raise ConfigurationError(f"there are no points {unknown[0]!r}; there are: {', '.join(POINT_SETS)}")
    if min([*sizes, d, repeats, eps]) <= 0:
        raise ConfigurationError(f"sizes, d, eps and repeats are above 0, got {sizes}, {d}, {eps}, {repeats}")
    ceilings = Ceilings(torch.float32)
    with_keops = keops and importlib.util.find_spec("pykeops") is not None
    results = []
    for family in families:
        for n in sizes:
            progress(f"{family}, {n:,} points")
            results.append(_measure(family, n, d, eps, repeats, ceilings, with_keops))
            on_result(results[-1])
    return {
        "machine": describe() | ceilings.best,
        "results": [result.to_dict() for result in results],
        "growth": {family: _growth([each for each in results if each.family == family]) for family in families},
    }


def _measure(
    family: str, n: int, d: int, eps: float, repeats: int, ceilings: Ceilings, with_keops: bool
) -> KernelResult:
    _round(family, n, d, eps, 0, with_keops)  # warms up, and KeOps compiles
    rounds, errors, floors = [], [], []
    report = ProductReport(eps)
    for seed in range(1, repeats + 1):
        times, error, report = _round(family, n, d, eps, seed, with_keops)
        rounds.append(times)
        errors.append(error)
        floors.append(n * n * (2 * d + _OPERATIONS) / ceilings.measure()["gemm_gflops"] / 1e9)
    middle = {name: statistics.median(times[name] for times in rounds) for name in rounds[0]}
    return KernelResult(
        family=family,
        n=n,
        d=d,
        eps=eps,
        exact=middle["exact"],
        sampled=middle["again"],
        first=middle["first"],
        keops=middle.get("keops"),
        floor=statistics.median(floors),
        error=max(errors),
        report=report.to_dict(),
    )


def _round(
    family: str, n: int, d: int, eps: float, seed: int, with_keops: bool
) -> tuple[dict[str, float], float, ProductReport]:
    """Seconds of everything, the error of the approximate product, and its report."""
    generator = torch.Generator().manual_seed(seed)
    points, bandwidth = POINT_SETS[family](n, d, generator)
    x = torch.randn(n, generator=generator)
    kernel = GaussianKernel(points, points, bandwidth, seed=seed)
    times = {}
    times["exact"], exact = _timed(lambda: kernel @ x)
    times["first"], _ = _timed(lambda: kernel.matvec(x, eps))
    times["again"], (y, report) = _timed(lambda: kernel.matvec(x, eps))
    if with_keops:
        times["keops"], _ = _timed(lambda: _keops(points, bandwidth, x))
    return times, float((y - exact).norm() / x.norm()), report


def _timed(run: Callable[[], Any]) -> tuple[float, Any]:
    found: list[Any] = []
    return seconds(lambda: found.append(run())), found[0]


def _keops(points: Tensor, bandwidth: float, x: Tensor) -> Tensor:
    """Its exact product, in fp32."""
    from pykeops.torch import LazyTensor

    scaled = (points / bandwidth).contiguous()
    distance = ((LazyTensor(scaled[:, None, :]) - LazyTensor(scaled[None, :, :])) ** 2).sum(-1)
    return (-distance / 2).exp() @ x[:, None]


def _growth(results: list[KernelResult]) -> dict[str, float | None]:
    """Exponents of n, fitted to the logarithms of seconds by least squares; ``None`` for fewer than two sizes."""

    def slope(values: list[float]) -> float | None:
        logs = [math.log(each.n) for each in results]
        if len(set(logs)) < 2 or min(values) <= 0:
            return None
        return statistics.linear_regression(logs, [math.log(value) for value in values]).slope

    return {
        "exact": slope([each.exact for each in results]),
        "sampled": slope([each.sampled for each in results]),
        "first": slope([each.first for each in results]),
        "published": PUBLISHED,
    }
