"""Measures how sparse a Gaussian kernel matrix is, in the sense of Indyk, Kapralov, Sheth and Wagner (2025).

Their assumption: all entries of K but the n largest add up to at most c times what the n largest add up to, with c
independent of n. :func:`measure_assumption` measures that c, called ``ratio``, for K and for its prefixes K[:i, :i].

K is never stored. Block by block of rows, its entries go into histograms of ``-log2 K``, each entry into that of the
smallest prefix that has it. A bin keeps the number of its entries, their sum and the sum of their squares, in fp64.
Bins are 1/64 wide, so that the entries of one differ by 1.1 % at most. All sums are of whole bins, but for one: some of
the bin with the n-th largest entry belong to the n largest, and what these add up to is estimated from its mean and
variance, as if it were filled evenly. ``ratio_error`` bounds what that is off by, however the bin is filled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from gossamer.operators.gaussian.kernel import GaussianKernel

TAUS = tuple(2.0**-power for power in range(21))
MOST_PREFIXES = 1024  # 200 kB each

_PER_OCTAVE = 64  # bins for a factor of 2
_BINS = 128 * _PER_OCTAVE  # what is smaller than the largest entry by more than that shares one more bin
_BLOCK = 1 << 17  # entries that are looked at together: a few arrays of 1 MB
_GROUPS = 16  # of the rows of a pilot, for the error of the estimate
_ROUNDING = 64 * 2.0**-52  # of a squared distance, relative to the squared norms that it comes from
_NOTHING = 1e-200  # stands for a sum that has underflowed

_EDGE = torch.exp2(-torch.arange(_BINS + 1, dtype=torch.float64) / _PER_OCTAVE)  # of bins, over that of the first one
_FIRST_LIGHT = torch.arange(len(TAUS)) * _PER_OCTAVE + 1  # of all bins that K could be in: where K < tau begins

Exponents = Callable[[Tensor], Tensor]  # indices of rows (m) -> -log2 K of these rows (m, n_k), fp64, 0 or more


@dataclass(frozen=True)
class Sparsity:
    """Statistics of one kernel matrix, or of one prefix.

    Attributes:
        n: the larger one of its two sides.
        ratio: sum of all but the n largest entries over the sum of the n largest: the c of the assumption.
        ratio_error: ``ratio`` is at most so far from exact; of a pilot, two standard errors.
        sum_per_query: sum of all entries over the number of queries.
        frobenius_per_query: sum of the squares of all entries over the number of queries.
        light_energy: for each tau of :data:`TAUS`, the mean over rows of the sum of ``K_ij^2`` with ``K_ij < tau``: the
            variance that is left to a sample where everything else is multiplied exactly.
        effective_support: mean over rows of ``(sum K)^2 / sum K^2``: the number of equal entries that would give that.
    """

    n: int
    ratio: float
    ratio_error: float
    sum_per_query: float
    frobenius_per_query: float
    light_energy: tuple[float, ...]
    effective_support: float


@dataclass(frozen=True)
class AssumptionReport(Sparsity):
    """Statistics of a whole matrix, and of its prefixes.

    Attributes:
        prefixes: from the shortest to the whole matrix; the latter only, where queries and keys differ in number.
        pilot: number of random rows that everything here is an estimate from; ``None`` where it is measured.
    """

    prefixes: tuple[Sparsity, ...] = ()
    pilot: int | None = None

    @property
    def largest(self) -> Sparsity:
        """The prefix with the largest ratio, which is what the paper reports."""
        return max(self.prefixes, key=lambda each: each.ratio)

    @property
    def growth(self) -> float | None:
        """Slope of log ratio against log n, from n / 8 on; ``None`` where there are too few prefixes.

        It is 0 if the ratio does not depend on n, as the assumption says, and 1 if all entries are alike.
        """
        used = [each for each in self.prefixes if 8 * each.n >= self.n and each.ratio > 0]
        if len(used) < 3:
            return None
        x = torch.tensor([math.log(each.n) for each in used], dtype=torch.float64)
        y = torch.tensor([math.log(each.ratio) for each in used], dtype=torch.float64)
        return float((x - x.mean()) @ y / (x - x.mean()).square().sum())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"taus": TAUS, "growth": self.growth}

    def plot(self, path: str | Path) -> None:
        """Draws the ratio and the sum per query against n into a file; its name says the format.

        Both scales are logarithmic. The dashed guides have slope 0, as under the assumption, and slope 1, as where all
        entries are alike.

        Raises:
            ConfigurationError: matplotlib is not installed, or the file cannot be written.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ConfigurationError("a plot needs matplotlib: pip install 'gossamer[plots]'") from error
        figure = Figure(figsize=(5.6, 4.0), layout="constrained")
        axes = figure.subplots()
        n = [each.n for each in self.prefixes]
        series = {
            "ratio": [each.ratio for each in self.prefixes],
            "sum per query": [each.sum_per_query for each in self.prefixes],
        }
        for name, values in series.items():
            (line,) = axes.plot(n, values, "o-", markersize=3, label=name)
            for slope in (0, 1):
                guide = [values[-1] * (each / n[-1]) ** slope for each in n]
                axes.plot(n, guide, "--", color=line.get_color(), linewidth=0.8, alpha=0.5)
        axes.set(xscale="log", yscale="log", xlabel="n", title="dashed: slopes 0 and 1")
        axes.legend()
        try:
            figure.savefig(path)
        except (OSError, ValueError) as error:  # the latter: an ending that is no format
            raise ConfigurationError(f"cannot write the plot {path}: {error}") from error


def measure_assumption(
    kernel: GaussianKernel, prefixes: int | Sequence[int] = 8, pilot: int | None = None
) -> AssumptionReport:
    """Statistics of a kernel matrix, exactly in O(n_q n_k d) time, or from some rows.

    Prefixes K[:i, :i] are for points that have an order, as the tokens of a text have. Of a set without one a prefix is
    a random sample of rows and columns, which removes most pairs of near points, so that its sum looks quadratic in n
    whatever the set is like: measure sets of different sizes instead.

    Args:
        kernel: any; where it has as many queries as keys, its prefixes are measured in the same pass.
        prefixes: how many, each half as long as the next; or their lengths. The whole matrix is always among them.
        pilot: estimate from so many random rows, without prefixes.

    Raises:
        ConfigurationError: a length or the number of rows is out of its range, or points are too large for fp64.

    >>> from gossamer.operators.gaussian.kernel import GaussianKernel
    >>> points = torch.arange(4.0, dtype=torch.float64)[:, None]
    >>> report = measure_assumption(GaussianKernel(points, points, bandwidth=0.5), prefixes=[2])
    >>> [(each.n, round(each.ratio, 3)) for each in report.prefixes]  # 2 exp(-2) / 2, (6 exp(-2) + ...) / 4
    [(2, 0.135), (4, 0.203)]
    """
    return measure_exponents(
        point_exponents(kernel._queries, kernel._points), kernel.shape, prefixes, pilot, kernel.seed
    )


def attention_points(
    queries: Tensor, keys: Tensor, scale: float | None = None, centre: bool = True
) -> tuple[Tensor, Tensor, float]:
    r"""Points whose Gaussian kernel is attention, up to a factor per row: the paper's Lemma 4.1.

    With M the largest norm of a key, ``k~ = [k; sqrt(M^2 - |k|^2)]``, ``q~ = [q; 0]`` and ``sigma^2 = 1 / scale``,

        exp(scale q . k) = exp(scale (M^2 + |q|^2) / 2) exp(-|q~ - k~|^2 / 2 sigma^2).

    Args:
        queries: (n_q, d), as attention multiplies them: after rotary embedding, of one head.
        keys: (n_k, d).
        scale: of the products; ``1 / sqrt(d)`` by default.
        centre: subtract the mean key from all keys first. That divides each row of attention by a number, which softmax
            does not see, and makes M smaller.

    Returns:
        Queries (n_q, d + 1), keys (n_k, d + 1), both fp64, and the bandwidth.

    Raises:
        ConfigurationError: shapes do not fit, or the scale is not above 0.
    """
    if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or 0 in (*queries.shape, len(keys)):
        shapes = f"{tuple(queries.shape)} and {tuple(keys.shape)}"
        raise ConfigurationError(f"queries and keys of one head are (n_q, d) and (n_k, d), got {shapes}")
    scale = queries.shape[1] ** -0.5 if scale is None else scale
    if not 0 < scale < math.inf:
        raise ConfigurationError(f"the scale is a finite number above 0, got {scale}")
    queries, keys = queries.double(), keys.double()
    if centre:
        keys = keys - keys.mean(0)
    squares = keys.square().sum(1, keepdim=True)
    lifted = torch.cat([keys, (squares.max() - squares).sqrt()], 1)
    return torch.nn.functional.pad(queries, (0, 1)), lifted, scale**-0.5


def point_exponents(queries: Tensor, keys: Tensor) -> Exponents:
    """``|q_i - k_j|^2`` of points (n_q, d), (n_k, d): what :func:`measure_exponents` takes, for scaled points."""
    queries, keys = queries.detach().double(), keys.detach().double()
    of_queries, of_keys = queries.square().sum(1, keepdim=True), keys.square().sum(1)
    largest = float(of_queries.max() + of_keys.max())
    if not math.isfinite(largest):
        raise ConfigurationError("squares of distances are beyond what fp64 holds; divide points and bandwidth")

    def exponents(rows: Tensor) -> Tensor:
        products = torch.addmm(of_keys, queries[rows], keys.T, alpha=-2).add_(of_queries[rows])
        return torch.nn.functional.threshold(
            products, _ROUNDING * largest, 0.0, inplace=True
        )  # equal points have a distance of 0

    return exponents


def measure_exponents(
    exponents: Exponents,
    shape: tuple[int, int],
    prefixes: int | Sequence[int] = 8,
    pilot: int | None = None,
    seed: int = 0,
) -> AssumptionReport:
    """As :func:`measure_assumption`, for any matrix with entries from 0 to 1, given by blocks of rows.

    Args:
        exponents: of rows; whatever computes them decides how much memory a block takes beside this one's.
        shape: n_q, n_k.
        prefixes: as there.
        pilot: as there.
        seed: of the pilot's rows.
    """
    if pilot is not None:
        return _estimate(exponents, shape, pilot, seed)
    square = shape[0] == shape[1]
    lengths = _lengths(prefixes, shape[0]) if square else [max(shape)]
    ends = torch.tensor(lengths if square else [shape[1]])  # of the columns
    intervals = torch.arange(len(ends))
    of_column = torch.searchsorted(ends, torch.arange(shape[1]), right=True)
    histogram, support = _Histogram(len(ends)), torch.zeros(len(ends), dtype=torch.float64)
    for rows in _pieces(torch.arange(shape[0]), shape[1]):
        found = exponents(rows)
        of_row = of_column[rows] if square else torch.zeros_like(rows)
        histogram.add(found, torch.maximum(of_row[:, None], of_column))
        support += (_supports(found, ends) * (of_row[:, None] <= intervals)).sum(0)
    added = histogram.used().cumsum(1)
    statistics = [
        _statistics(added[:, i], histogram.first, n, n, n if square else shape[0], float(support[i]))
        for i, n in enumerate(lengths)
    ]
    return AssumptionReport(**vars(statistics[-1]), prefixes=tuple(statistics))


def _estimate(exponents: Exponents, shape: tuple[int, int], pilot: int, seed: int) -> AssumptionReport:
    """From random rows: their n m / n_q largest entries stand for the n largest of all."""
    if not 2 <= pilot <= shape[0]:
        raise ConfigurationError(f"a pilot takes 2 to {shape[0]} rows, got {pilot}")
    n, groups = max(shape), min(pilot, _GROUPS)
    rows = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))[:pilot]
    histogram, support = _Histogram(groups), 0.0
    for group, part in enumerate(rows.tensor_split(groups)):
        for some in _pieces(part, shape[1]):
            found = exponents(some)
            histogram.add(found, torch.tensor(group))
            support += float(_supports(found, torch.tensor([shape[1]])).sum())
    by_group = histogram.used()
    total = by_group.sum(1)

    def statistics(sums: Tensor, used: int) -> Sparsity:
        return _statistics(sums, histogram.first, n, n * used / shape[0], used, support)

    without = [
        statistics(total - by_group[:, group], pilot - len(part)).ratio
        for group, part in enumerate(rows.tensor_split(groups))
    ]
    spread = torch.tensor(without, dtype=torch.float64).var(unbiased=False) * (groups - 1)  # the jackknife's
    whole = asdict(statistics(total, pilot))
    error = whole["ratio_error"] + 2 * float(spread.sqrt()) * (1 - pilot / shape[0]) ** 0.5
    whole["ratio_error"] = error
    return AssumptionReport(**whole, prefixes=(Sparsity(**whole),), pilot=pilot)


class _Histogram:
    """Entries by ``-log2 K``, in fp64, relative to bins: nothing underflows, however small all of K is.

    Bin b holds exponents in ``((first + b - 1) / 64, (first + b) / 64]``, so that the bound ``K < 2^-m`` is one between
    bins, and K = 1 has a bin of its own. Its sums are of ``r = K 2^((first + b) / 64)``, from 1 to 1.011. The last
    bin holds everything smaller. ``first`` moves down when a larger entry than ever comes.

    Attributes:
        sums: (3, intervals, bins + 1): numbers, sums of r, sums of r^2.
    """

    def __init__(self, intervals: int) -> None:
        self.first = -1
        self.sums = torch.zeros(3, intervals, _BINS + 1, dtype=torch.float64)

    def add(self, exponents: Tensor, intervals: Tensor) -> None:
        """A block (rows, columns), and the interval of each entry, of a shape that broadcasts to it."""
        scaled = (exponents * _PER_OCTAVE).clamp_(max=2.0**60)
        number = scaled.ceil()
        lowest = int(number.min())
        if self.first < 0:
            self.first = lowest
        elif lowest < self.first:
            self._move(self.first - lowest)
        place = number.sub_(self.first).clamp_(max=_BINS)
        index = place.long().add_(intervals.to(place.device) * (_BINS + 1)).flatten()
        relative = place.add_(self.first).sub_(scaled).div_(_PER_OCTAVE).exp2_().flatten()
        self.sums = self.sums.to(place.device)
        for sums, values in zip(self.sums, (torch.ones_like(relative), relative, relative.square()), strict=True):
            sums.view(-1).scatter_add_(0, index, values)

    def used(self) -> Tensor:
        """The sums without the bins at the end that are empty, but for one: (3, intervals, at most bins + 1)."""
        last = int(self.sums[0].sum(0).nonzero()[-1])
        return self.sums[..., : last + 2].cpu()

    def _move(self, bins: int) -> None:
        """Lowers ``first``; what falls off the end joins the last bin, in its units."""
        self.first -= bins
        kept = max(0, _BINS - bins)
        moved = torch.zeros_like(self.sums)
        moved[..., _BINS - kept : _BINS] = self.sums[..., :kept]
        distance = torch.arange(kept, _BINS + 1, dtype=torch.float64, device=moved.device) + (bins - _BINS)
        for power, (sums, old) in enumerate(zip(moved, self.sums, strict=True)):
            sums[..., _BINS] = old[..., kept:] @ torch.exp2(-power * distance / _PER_OCTAVE)
        self.sums = moved


def _statistics(sums: Tensor, first: int, n: int, top: float, rows: int, support: float) -> Sparsity:
    """What a histogram's sums (3, bins + 1) say of ``rows`` rows, of whose entries ``top`` are the largest ones."""
    counts, total, squares = sums
    edge = _EDGE[: len(counts)]
    if not bool(total.any()):  # a prefix far below the largest entry of K
        total = counts * _NOTHING
    below = counts.cumsum(0)
    at = int(torch.searchsorted(below, min(top, float(below[-1]))))
    inside, within, squared = (float(each[at]) for each in (counts, total, squares))
    taken = min(top, float(below[-1])) - float(below[at]) + inside
    lowest, highest = 0.0 if at == _BINS else 1.0, 1.0 if first + at == 0 else 2 ** (1 / _PER_OCTAVE)
    mean = within / inside
    deviation = max(squared / inside - mean * mean, 0.0) ** 0.5
    # The largest ones of some numbers add up to no less than their share of all, and to no more than either bound says.
    least = taken * mean
    most = min(
        taken * highest,
        within - (inside - taken) * lowest,
        least + deviation * (taken * (inside - taken)) ** 0.5,  # Cauchy-Schwarz
    )
    guess = min(max(least + math.sqrt(3) * deviation * taken * (1 - taken / inside), least), max(most, least))
    entries = total * edge
    above, unit = float(entries[:at].sum()), float(edge[at])
    head, tail = above + guess * unit, float(entries[at + 1 :].sum()) + max(within - guess, 0.0) * unit
    bounds = (above + least * unit, above + max(most, least) * unit)
    error = max((head + tail) / head * abs(bound - head) / bound for bound in bounds)
    energy = (squares * edge.square()).flip(0).cumsum(0).flip(0)  # from each bin on
    light = (_FIRST_LIGHT - first).clamp(0, len(energy) - 1)
    scale = 2.0 ** (-first / _PER_OCTAVE)
    return Sparsity(
        n=n,
        ratio=tail / head,
        ratio_error=error,
        sum_per_query=float(entries.sum()) * scale / rows,
        frobenius_per_query=float(energy[0]) * scale * scale / rows,
        light_energy=tuple((energy[light] * (scale * scale / rows)).tolist()),
        effective_support=support / rows,
    )


def _supports(exponents: Tensor, ends: Tensor) -> Tensor:
    """Effective support of each row of a block within its first ``ends`` columns: (rows, ends)."""
    relative = torch.exp2(exponents.amin(1, keepdim=True) - exponents)
    last = (ends - 1).to(relative.device)
    added, squared = (each.cumsum(1)[:, last] for each in (relative, relative.square()))
    return (added.square() / squared.clamp_min(_NOTHING)).clamp_min(1).cpu()  # underflow or not, it is never below 1


def _pieces(rows: Tensor, columns: int) -> Iterator[Tensor]:
    return iter(rows.split(max(1, _BLOCK // columns)))


def _lengths(prefixes: int | Sequence[int], n: int) -> list[int]:
    if isinstance(prefixes, int):
        if not 1 <= prefixes <= MOST_PREFIXES:
            raise ConfigurationError(f"the number of prefixes is 1 to {MOST_PREFIXES}, got {prefixes}")
        return sorted({max(1, -(-n // 2**halved)) for halved in range(prefixes)})
    lengths = sorted({*prefixes, n})
    if lengths[0] < 1 or lengths[-1] > n:
        wrong = lengths[0] if lengths[0] < 1 else lengths[-1]
        raise ConfigurationError(f"prefixes are 1 to {n} long, got {wrong}")
    if len(lengths) > MOST_PREFIXES:
        raise ConfigurationError(f"{len(lengths)} prefixes are too many; at most {MOST_PREFIXES} are measured together")
    return lengths
