"""What inverse Fisher matrices cost here: building one, a step of a window, an element, an optimizer's step.

Every figure stands beside what it is measured against, in turn with it: the published recursion, this machine's fp64
products and its memory, SGD and AdamW.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.bench.machine import describe, seconds
from gossamer.engine.large_pages import zeros
from gossamer.errors import ConfigurationError
from gossamer.operators.gradient_store import GradientStore
from gossamer.operators.inverse_fisher import InverseFisher
from gossamer.operators.sliding_fisher import SlidingFisher
from gossamer.optim import MFAC

_DAMPING = 1e-4


@dataclass(frozen=True)
class FisherResult:
    """One measured thing.

    Attributes:
        measure: what was done.
        setting: with which sizes.
        ms: median of ours.
        against: what stands beside it.
        against_ms: its median.
    """

    measure: str
    setting: str
    ms: float
    against: str
    against_ms: float

    @property
    def ratio(self) -> float:
        """Ours over the other."""
        return self.ms / self.against_ms


def bench_fisher(
    *,
    m: int = 256,
    d: int = 100_000,
    window: int = 32,
    parameters: int = 4_000_000,
    largest: int = 10_000_000,
    repeats: int = 5,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure everything. Returns ``{"machine": {...}, "results": [...]}``, see :class:`FisherResult`.

    Args:
        m, d: gradients, and numbers of each, of the static matrix.
        window: gradients of the sliding window and the optimizer.
        parameters: numbers of each of these.
        largest: numbers of a gradient up to which growth is shown, in a file.
        repeats: rounds; medians count.

    Raises:
        ConfigurationError: a size below 1.
    """
    if min(m, d, window, parameters, largest, repeats) < 1:
        raise ConfigurationError("sizes and repeats must be at least 1")
    results: list[FisherResult] = []
    progress(f"building the inverse of {m} gradients of {d:,} numbers")
    results += _static(m, d, repeats)
    progress("elements")
    results += _elements(m, (d // 10 or 1, d, 10 * d), repeats)
    for dtype in (torch.float32, torch.bfloat16):
        progress(f"a window of {window} gradients of {parameters:,} numbers in {dtype}")
        results.append(_window(window, parameters, dtype, repeats))
    progress("optimizer steps")
    results += _optimizers(window, parameters, repeats)
    progress(f"growth up to {largest:,} numbers")
    results += _growth(largest, repeats)
    return {
        "machine": describe(),
        "results": [asdict(result) | {"ratio": result.ratio} for result in results],
    }


def published_recursion(gradients: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The static algorithm as it was published (arXiv 2107.03356, algorithm 1): one gradient after the other.

    ``v_i = F_(i-1)^-1 g_i`` and ``q_i = m + g_i^T v_i``, so that ``F^-1 x = x / damping - sum_i v_i (v_i^T x) / q_i``.
    """
    m = len(gradients)
    vectors, q = gradients / damping, gradients.new_empty(m)
    for i in range(m):
        if i:
            vectors[i] -= ((vectors[:i] @ gradients[i]) / q[:i]) @ vectors[:i]
        q[i] = m + gradients[i] @ vectors[i]
    return vectors, q


def _static(m: int, d: int, repeats: int) -> list[FisherResult]:
    gradients = torch.randn(m, d)
    size = 1024
    left = torch.randn(size, size, dtype=torch.float64)
    # products of the upper half of a symmetric matrix, and of its Cholesky factor
    needed = m * (m + 1) * d + m**3 / 3
    ours, recursion, floor = _in_turn(
        repeats,
        lambda: InverseFisher(gradients, _DAMPING),
        lambda: published_recursion(gradients, _DAMPING),
        lambda: left @ left,
    )
    setting = f"m={m}, d={d:,}"
    return [
        FisherResult("static build", setting, ours, "published recursion, fp32", recursion),
        FisherResult("static build", setting, ours, "as many fp64 products", floor * needed / (2 * size**3)),
    ]


def _elements(m: int, sizes: tuple[int, ...], repeats: int) -> list[FisherResult]:
    results = []
    reference = None
    for d in sizes:
        inverse = InverseFisher(torch.randn(min(m, 64), d), _DAMPING, solver="dual")
        inverse.precompute()
        places = torch.randint(d, (200, 2)).tolist()
        (ours,) = _in_turn(repeats, partial(_ask, inverse, places))
        ours /= len(places)
        reference = reference or ours
        setting = f"m={min(m, 64)}, d={d:,}"
        results.append(FisherResult("element", setting, ours, f"d={sizes[0]:,}", reference))
    return results


def _window(window: int, d: int, dtype: torch.dtype, repeats: int) -> FisherResult:
    fisher = SlidingFisher([(d,)], window, _DAMPING, dtype=dtype)
    gradient, out = torch.randn(d), torch.empty(d)
    for _ in range(window):
        fisher.push(gradient * torch.randn(()))
    (memory,) = zeros([(1 << 26,)], torch.float32, torch.device("cpu"))  # 256 MB
    memory.fill_(1.0)

    def step() -> None:
        fisher.push(gradient)
        fisher.natural_gradient(out=out)

    ours, read = _in_turn(repeats, step, memory.amax)
    twice = 2 * window * d * dtype.itemsize / (4 * memory.numel()) * read
    name = str(dtype).removeprefix("torch.")
    return FisherResult("window step", f"m={window}, d={d:,}, {name}", ours, "reading G twice", twice)


def _optimizers(window: int, d: int, repeats: int) -> list[FisherResult]:
    def parameters() -> list[nn.Parameter]:
        made = [nn.Parameter(torch.randn(part)) for part in (d // 2, d - d // 2) if part]
        for parameter in made:
            parameter.grad = torch.randn_like(parameter)
        return made

    ours = MFAC(parameters(), window=window)
    others: dict[str, torch.optim.Optimizer] = {
        "SGD with momentum": torch.optim.SGD(parameters(), lr=1e-3, momentum=0.9),
        "AdamW": torch.optim.AdamW(parameters()),
    }
    for _ in range(window):
        ours.step()
    mine, *theirs = _in_turn(repeats, ours.step, *(each.step for each in others.values()))
    return [
        FisherResult("MFAC step", f"m={window}, d={d:,}", mine, name, ms)
        for name, ms in zip(others, theirs, strict=True)
    ]


def _growth(largest: int, repeats: int) -> list[FisherResult]:
    """Building from a file, for more and more numbers; beside each what the smallest one takes, times their ratio."""
    m = 16
    smallest = min(100_000, largest)
    sizes = [smallest]
    while sizes[-1] * 10 <= largest:
        sizes.append(sizes[-1] * 10)
    results = []
    base = 0.0
    with tempfile.TemporaryDirectory() as directory:
        for d in sizes:
            store = GradientStore(m, d, memmap=Path(directory) / "gradients")
            for _ in range(m):
                store.append(torch.randn(d))
            (ours,) = _in_turn(min(repeats, 3), partial(_rebuild, store))
            base = base or ours
            expected = base * d / sizes[0]
            results.append(FisherResult("build and diag", f"m={m}, d={d:,}, file", ours, "linear growth", expected))
            del store
    return results


def _ask(inverse: InverseFisher, places: list[list[int]]) -> None:
    for i, j in places:
        inverse.elem(i, j)


def _rebuild(store: GradientStore) -> None:
    InverseFisher(store.rows, _DAMPING).diag()  # of the rows alone: the store knows its Gram matrix already


def _in_turn(repeats: int, *works: Callable[[], object]) -> list[float]:
    """Median milliseconds of each, one after the other in every round; the first round does not count."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(1 + repeats):
        for work, each in zip(works, times, strict=True):
            each.append(seconds(work))
    return [1e3 * statistics.median(each[1:]) for each in times]
