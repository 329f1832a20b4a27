"""The published algorithm for products with Gaussian kernel matrices, written out for few points: to test and to teach.

It is that of Indyk, Kapralov, Sheth and Wagner (ICLR 2025, arXiv 2507.23539); to use there is
:class:`gossamer.GaussianKernel`. What is known of the algorithm, and from where:

From the abstract
    The problem: y with ``|K x - y| <= eps |x|`` for ``K_ij = exp(-|q_i - k_j|^2 / 2 sigma^2)`` and any x, in time
    subquadratic in n and linear in d. The assumption: the sum of the entries of K grows linearly with n.
Second-hand, from reviews and summaries that agree with each other
    The theorem (time ``d n^1.89 / eps^2`` up to logarithms, probability 0.99) and the constants below. Tiny coordinates
    of x are dropped and the largest multiplied exactly; heavy pairs are found by locality-sensitive hashing; x is
    divided into buckets by powers of 1 + eps; a data structure for kernel density estimation (Charikar, Kapralov, Nouri
    and Siminelakis, FOCS 2020) on the squared kernel gives second moments t_i, from which the light ones s_i follow;
    keys are drawn uniformly, in numbers proportional to s_i.
Reconstruction
    How these fit together, and all constant factors. Tiny is relative to ``|x|``; heavy pairs are sought among the
    coordinates that are left; squares are rounded up to the edges of their buckets, in t_i and in what is subtracted
    from it; how many hashes and tables there are; how many draws, by Chebyshev's inequality.

The paper's full text was not at hand, and no implementation by its authors is known: this is compared with the exact
product instead. In two parts it differs from what the theorem needs. The second moments are computed exactly, from all
of K, in the place of the data structure: the function is slower than the exact product, whatever it counts. The hashes
are those of Datar et al. (2004): as many tables find as much as with better ones, among more light candidates.

The theorem is about large n. The draws are bounded by about ``100 n^1.89 / eps^2``, which is below n^2 only where
``n^0.11`` is above ``100 / eps^2``. With the few points that fit in here, most keys are drawn, many of them repeatedly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.gaussian.kernel import GaussianKernel

# Second-hand, all of them.
ALPHA = 1 / 3  # K_ij is heavy from n^-ALPHA on
GAMMA = 0.109  # n^(1 - GAMMA) coordinates of x are multiplied exactly
DENSITY_ERROR = 0.218  # second moments are known up to a factor 1 +- n^-DENSITY_ERROR
TINY = 4  # coordinates below n^-TINY |x| are dropped
FAILURE = 0.01  # probability that the error is above eps |x|

# What each part costs, as powers of n, up to logarithms and a factor d; the last one over eps^2 besides.
EXPONENTS = {
    "large coordinates": 2 - GAMMA,
    "heavy pairs": 1 + 2 * ALPHA,
    "samples, for entries below the threshold": 2 + GAMMA - ALPHA,
    "samples, for the error of the second moments": 2 - DENSITY_ERROR + GAMMA,
}

# Reconstruction.
INTERVAL = 4.0  # width of the intervals that projections are cut into, in near radii (Datar et al.'s choice)
MOST_POINTS = 4096  # since K is stored
LEAST_EPS = 1e-6  # below, dropped coordinates and rounding would count


@dataclass(frozen=True)
class PaperReport:
    """What the algorithm counted.

    Attributes:
        n: the larger one of the numbers of queries and keys.
        large, dropped: coordinates of x that are multiplied exactly, and that are taken for 0.
        buckets: of the coordinates that are left.
        tables, hashes: hash tables, and projections that each of them joins.
        candidates: pairs that share a cell in a table: each is evaluated once, however many they share.
        heavy_found, heavy_true: pairs with ``K_ij >= n^-ALPHA`` among the coordinates that are left.
        draws: (n_q) fp64: keys drawn for each query. They are drawn with replacement and may be more than there are.
        evaluations: pairs whose kernel the algorithm evaluates, each once: those of large coordinates, candidates, and
            what is drawn besides. What stands in for the density estimation does not count.
        exponents: the powers of n that the parts are predicted to take.
    """

    n: int
    large: int
    dropped: int
    buckets: int = 0
    tables: int = 0
    hashes: int = 0
    candidates: int = 0
    heavy_found: int = 0
    heavy_true: int = 0
    draws: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    evaluations: int = 0
    exponents: dict[str, float] = field(default_factory=EXPONENTS.copy)

    @property
    def recall(self) -> float:
        """Share of the heavy pairs that hashing found; 1 where there is none."""
        return self.heavy_found / self.heavy_true if self.heavy_true else 1.0


class PaperProduct(NamedTuple):
    """y (n_q) fp64, and what was counted."""

    y: Tensor
    report: PaperReport


def reference_paper(
    queries: Tensor, keys: Tensor, bandwidth: float, x: Tensor, eps: float, seed: int = 0
) -> PaperProduct:
    """y with ``|K x - y| <= eps |x|``, with probability 0.99, by the published algorithm.

    Args:
        queries: (n_q, d).
        keys: (n_k, d), of either at most 4096.
        bandwidth: sigma, above 0.
        x: (n_k), signed.
        eps: 1e-6 at least.
        seed: of the hashes and of the draws.

    Raises:
        ConfigurationError: shapes, dtypes or numbers do not fit, or there are too many points.

    >>> points = torch.randn(300, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    >>> x = torch.ones(300, dtype=torch.float64)
    >>> y, report = reference_paper(points, points, 0.5, x, eps=0.5)
    >>> exact = torch.exp(-2 * torch.cdist(points, points).square()) @ x
    >>> bool((y - exact).norm() <= 0.5 * x.norm()), report.large
    (True, 161)
    """
    _check(queries, keys, bandwidth, x, eps)
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (points.to("cpu", torch.float64) / bandwidth for points in (queries, keys))
    n, unit = max(len(queries), len(keys)), float(x.abs().max()) or 1.0
    x = x.to("cpu", torch.float64) / unit  # whose squares neither underflow nor overflow
    norm = float(x.norm()) or 1.0

    # Preprocessing: tiny coordinates are dropped, the largest ones multiplied exactly. Of those that are left, none has
    # a square above n^(GAMMA - 1) |x|^2.
    order = x.abs().argsort(descending=True, stable=True)
    kept = int((x.abs() >= n**-TINY * norm).sum())
    large, left, dropped = order.tensor_split([min(kept, int(n ** (1 - GAMMA))), kept])
    lost = n * float(x[dropped].norm()) / norm  # |K| is n at most
    if lost >= eps:
        raise ConfigurationError(f"eps = {eps} is below {lost:.2g}, what dropping tiny coordinates of x may cost")
    y = _kernel(queries, keys[large]) @ x[large]
    report = PaperReport(n, len(large), len(dropped), evaluations=len(queries) * len(large))
    if len(left) == 0:
        return PaperProduct(y * unit, report)
    keys, x = keys[left], x[left]
    kernel = _kernel(queries, keys)  # for the second moments; what else is read of it counts as evaluated

    # Heavy pairs: whatever shares a cell with a query is evaluated, and added if it is heavy.
    near = math.sqrt(2 * ALPHA * math.log(n))  # K = n^-ALPHA at this distance, in bandwidths
    tables, hashes = _tables(n)
    candidates = _candidates(queries / near, keys / near, tables, hashes, generator)
    heavy = candidates & (kernel >= n**-ALPHA)
    y = y + torch.where(heavy, kernel, 0) @ x

    # All others: sampled, row by row, as much as their second moments ask for.
    moments, square, buckets = _second_moments(kernel, x / norm, eps)
    light = (moments - torch.where(heavy, kernel, 0).square() @ square).clamp_min(0)
    draws = _draws(light + n**-DENSITY_ERROR * moments, len(x), eps - lost)
    drawn = _tally(draws, len(x), generator)
    weights = drawn * (len(x) / draws.clamp_min(1))[:, None]
    y = y + torch.where(heavy, 0, weights * kernel) @ x

    counted = replace(
        report,
        buckets=buckets,
        tables=tables,
        hashes=hashes,
        candidates=int(candidates.sum()),
        heavy_found=int(heavy.sum()),
        heavy_true=int((kernel >= n**-ALPHA).sum()),
        draws=draws,
        evaluations=report.evaluations + int((candidates | (drawn > 0)).sum()),
    )
    return PaperProduct(y * unit, counted)


def _kernel(queries: Tensor, keys: Tensor) -> Tensor:
    """K, for points in bandwidths."""
    distance = torch.cdist(queries, keys, compute_mode="donot_use_mm_for_euclid_dist")
    return torch.exp(distance.square() / -2)


def _tables(n: int) -> tuple[int, int]:
    """Tables, and hashes in each: a heavy pair shares a cell of a table with probability n^-ALPHA at least, and with
    probability 1 / n at most none of n^ALPHA ln n tables finds it."""
    outside = math.erfc(INTERVAL / math.sqrt(2))  # two points at the near radius in one interval: Datar et al., 3.2
    together = 1 - outside - math.sqrt(2 / math.pi) / INTERVAL * (1 - math.exp(-(INTERVAL**2) / 2))
    return math.ceil(n**ALPHA * math.log(n)), max(1, int(ALPHA * math.log(n) / -math.log(together)))


def _candidates(queries: Tensor, keys: Tensor, tables: int, hashes: int, generator: torch.Generator) -> Tensor:
    """(n_q, n_k) bool: pairs that share a cell of some table, for points in near radii."""
    found = torch.zeros(len(queries), len(keys), dtype=torch.bool)
    points = torch.cat([queries, keys])
    for _ in range(tables):
        directions = torch.randn(points.shape[1], hashes, generator=generator, dtype=torch.float64)
        shifts = torch.rand(hashes, generator=generator, dtype=torch.float64)
        cells = (points @ directions / INTERVAL + shifts).floor()
        cell = cells.unique(dim=0, return_inverse=True)[1]
        found |= cell[: len(queries), None] == cell[None, len(queries) :]
    return found


def _second_moments(kernel: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, int]:
    """t_i, the sums of ``K_ij^2 x_j^2`` with squares rounded up to powers of 1 + eps; these squares; how many powers.

    The squares of one power are a bucket. The sums of ``K_ij^2`` over each bucket are the densities that the paper
    estimates; here they are exact.
    """
    step = math.log1p(eps)
    powers, bucket = (x.square().log() / step).ceil().unique(return_inverse=True)
    densities = kernel.new_zeros(len(kernel), len(powers)).index_add_(1, bucket, kernel.square())
    squares = (powers * step).exp()
    return densities @ squares, squares[bucket], len(powers)


def _draws(light: Tensor, keys: int, eps: float) -> Tensor:
    """How many keys each query draws: N_i, proportional to s_i (``light``, in units of ``|x|^2``).

    The variance of row i is below ``keys s_i |x|^2 / N_i``. Each row may add its part of ``FAILURE eps^2 |x|^2``: by
    Chebyshev's inequality the error is then above ``eps |x|`` with probability FAILURE at most.
    """
    return (len(light) * keys * light / (FAILURE * eps * eps)).ceil()


def _tally(draws: Tensor, keys: int, generator: torch.Generator) -> Tensor:
    """How often each key is drawn (n_q, keys), if row i draws ``draws_i`` of them uniformly, with replacement.

    Key by key, so that it takes no longer however many there are; the distribution is that of drawing one by one.
    """
    left, drawn = draws, []
    for key in range(keys):
        drawn.append(torch.binomial(left, torch.full_like(left, 1 / (keys - key)), generator=generator))
        left = left - drawn[-1]
    return torch.stack(drawn, 1)


def _check(queries: Tensor, keys: Tensor, bandwidth: float, x: Tensor, eps: float) -> None:
    GaussianKernel(queries, keys, bandwidth, "exact")  # refuses what cannot be multiplied at all
    if max(len(queries), len(keys)) > MOST_POINTS:
        raise ConfigurationError(f"{MOST_POINTS} queries and keys at most, got {len(queries)} and {len(keys)}")
    if x.shape != (len(keys),) or not x.is_floating_point():
        raise ConfigurationError(f"x is ({len(keys)}) floating-point numbers, got {tuple(x.shape)} of {x.dtype}")
    if not bool(torch.isfinite(x).all()):
        raise ConfigurationError(f"x has a number that is not finite, at {int((~torch.isfinite(x)).nonzero()[0])}")
    if not LEAST_EPS <= eps < math.inf:
        raise ConfigurationError(f"eps is a finite number, {LEAST_EPS} at least, got {eps}")
