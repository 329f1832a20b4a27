"""The Gaussian kernel matrix as an operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.gaussian.approximate import PLANNED, approximate
from gossamer.operators.gaussian.index import KernelIndex
from gossamer.operators.gaussian.pilot import PILOT_ROWS, Pilot
from gossamer.operators.gaussian.report import Confidence, KernelProduct, ProductReport
from gossamer.operators.gaussian.tiles import WIDEST_IN_FP32, tile_products
from gossamer.ops.gaussian import UNIT, Keys, Queries, native, products

if TYPE_CHECKING:
    from gossamer.operators.gaussian.assumption import AssumptionReport

Backend = Literal["ivf", "sortlsh", "lsh", "exact"]

FEWEST_ENTRIES = 1 << 28  # of K; below, an index does not pay
_PROMISING = 0.5  # of the entries of K: where a few rows promise more than this, no index is built


class GaussianKernel:
    r"""``K_ij = exp(-|q_i - k_j|^2 / 2 sigma^2)`` without its n_q n_k entries.

    ``K @ x`` is exact, at two operations per dimension and entry. :meth:`matvec` returns y with
    ``|K x - y| <= eps |x|`` for any x, signed ones too, and takes fewer than n_q n_k entries where most of them are
    small; where they are not, it is exact. The problem and its measure of error are those of Indyk, Kapralov, Sheth and
    Wagner (2025, arXiv 2507.23539). So is the division of labour: pairs of near points are multiplied exactly, which a
    space partition finds, and the rest is sampled. The estimator, the plan and the certificate are Gossamer's own:
    ``docs/how-to/kernel.md`` says what is whose.

    Args:
        queries: (n_q, d), any floating dtype; 16-bit ones are computed with in fp32, and fp32 ones in fp64 where their
            digits ask for it. They are copied.
        keys: (n_k, d) of the same dtype, copied. The same tensor as the queries saves a part of the index.
        bandwidth: sigma, in the units of the points; above 0.
        backend: how near points are found, :mod:`gossamer.operators.gaussian.partition`; ``exact`` never approximates.
        seed: of everything that is drawn. The same seed and the same calls give the same numbers.

    No gradients flow through it: tensors that require one are refused, except under ``torch.no_grad()``.

    Raises:
        ConfigurationError: shapes, dtypes or bandwidth do not fit, a number is not finite, or a gradient would be lost.

    >>> points = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0))
    >>> kernel = GaussianKernel(points, points, bandwidth=1.0)
    >>> x = torch.ones(1000)
    >>> (kernel @ x).shape
    torch.Size([1000])
    >>> y, report = kernel.matvec(x, eps=0.1)
    >>> report.mode, report.error  # so few points are multiplied exactly
    ('exact', 0.0)
    """

    def __init__(
        self, queries: Tensor, keys: Tensor, bandwidth: float, backend: Backend = "ivf", seed: int = 0
    ) -> None:
        if backend not in get_args(Backend):
            raise ConfigurationError(f"backend {backend!r} is not one of: {', '.join(get_args(Backend))}")
        if not (math.isfinite(bandwidth) and bandwidth > 0):
            raise ConfigurationError(f"the bandwidth is a finite number above 0, got {bandwidth}")
        _check_points(queries, "queries")
        _check_points(keys, "keys")
        if queries.shape[1] != keys.shape[1]:
            raise ConfigurationError(f"queries have {queries.shape[1]} dimensions, keys {keys.shape[1]}")
        if queries.device != keys.device:
            raise ConfigurationError(f"queries are on {queries.device}, keys on {keys.device}")
        self.bandwidth, self.backend, self.seed = float(bandwidth), backend, seed
        self.shape = (len(queries), len(keys))
        self.dtype = torch.promote_types(torch.promote_types(queries.dtype, keys.dtype), torch.float32)
        self._centre = keys.detach().to(torch.float64).mean(0)  # small numbers keep more digits of what differs
        # Copies, so that K stays what it was when the points are written to.
        self._points = self._scaled(keys)
        self._queries = self._points if queries is keys else self._scaled(queries)
        if not bool(torch.isfinite(self._points).all() and torch.isfinite(self._queries).all()):
            raise ConfigurationError(f"the bandwidth {bandwidth:g} is too small for points so far apart")
        self._tiled = self.dtype == torch.float32 and float(self._points.norm(dim=1).max()) > WIDEST_IN_FP32
        if self.dtype == torch.float32 and not self._tiled:
            same = self._queries is self._points
            self._points = self._points.float()
            self._queries = self._points if same else self._queries.float()
        self._keys = None if self._tiled else Keys.pack(self._points)
        self._index: KernelIndex | None = None
        self._pilot: Pilot | None = None

    @property
    def index(self) -> KernelIndex | None:
        """What :meth:`matvec` needs to know of K; built when it is first used."""
        return self._index

    def __matmul__(self, x: Tensor) -> Tensor:
        """``K x`` for x (n_k) or (n_k, r), exact; of the dtype of x, summed in fp64."""
        return self._shaped(self._exact(self._columns(x)), x)

    def matvec(
        self, x: Tensor, eps: float, confidence: Confidence = "default", seed: int | None = None
    ) -> KernelProduct:
        """y with ``|K x - y| <= eps |x|`` (Frobenius norms for several right-hand sides), and a report.

        Args:
            x: (n_k) or (n_k, r), signed.
            eps: in units of ``|x|``; 0 or less is exact.
            confidence: ``default`` accepts y if the error of this very draw, measured on rows that are computed exactly
                too, is below eps by at least 2.33 standard errors of that measurement. ``chi2`` and ``chebyshev`` ask
                that much of the expected error that a draw stays below eps in 99 % of the cases even if all of it goes
                in one direction, and whatever its distribution is: up to 6.6 and 100 times the sample.
            seed: of this product, in the place of the kernel's. Products that depend on each other (power iteration, a
                solver) want a different one each.

        Raises:
            ConfigurationError: x has a wrong shape or a number that is not finite; eps is not a number.
        """
        given = self._columns(x)
        unit = float(given.abs().max()) or 1.0  # so that squares neither vanish nor overflow
        columns = given / unit
        if math.isnan(eps):
            raise ConfigurationError("eps is not a number")
        if confidence not in get_args(Confidence):
            raise ConfigurationError(f"confidence {confidence!r} is not one of: {', '.join(get_args(Confidence))}")
        report = ProductReport(eps, confidence=confidence)
        size = float(columns.double().square().sum())
        entries = self.shape[0] * self.shape[1]
        if eps >= math.sqrt(entries) and size > 0:  # |K| <= |K|_F <= sqrt(n_q n_k)
            report.mode, report.reason = "zero", "eps is above |K|: y = 0 satisfies it for any points"
            report.error = report.bound = math.sqrt(entries)
            return KernelProduct(self._shaped(torch.zeros(self.shape[0], columns.shape[1]), x), report)
        y = None
        if eps <= 0:
            report.reason = "eps is 0"
        elif size == 0:
            report.reason = "x is 0"
        elif self.backend == "exact":
            report.reason = "the backend is exact"
        elif self._points.device.type != "cpu":
            report.reason = "approximate products run on CPUs only"
        elif self._index is None and native(self._points) is None:
            report.reason = "approximate products are fast with native kernels only, for points that fit into fp32"
        elif self._index is None and entries < FEWEST_ENTRIES:
            report.reason = "so few entries are multiplied faster than looked into"
        elif self._index is None and not self._promising(columns, size, eps, confidence, report):
            report.reason = "too much of K is spread over too many entries for this eps"
        else:
            with report.timed("index"):
                report.entries += 0 if self._index else self.build_index().entries / entries
            draws = torch.Generator().manual_seed(self.seed if seed is None else seed)
            y = approximate(self.build_index(), columns, math.sqrt(size), report, draws)
        if y is not None:
            result = unit * y
        else:
            report.mode, report.error, report.bound = "exact", 0.0, 0.0
            report.entries += 1.0
            with report.timed("exact"):
                result = self._exact(given)
            y = result / unit
        report.entries = min(report.entries, 1.0)  # those that were looked at before, and computed again, count once
        report.norm = math.sqrt(float(y.square().sum()) / size) if size else 0.0
        if report.mode == "sampled" and report.norm + report.bound <= eps:
            report.reason = "y = 0 would satisfy this eps"
        return KernelProduct(self._shaped(result, x), report)

    def _promising(
        self, columns: Tensor, size: float, eps: float, confidence: Confidence, report: ProductReport
    ) -> bool:
        with report.timed("pilot"):
            if self._pilot is None:
                rows = torch.randint(self.shape[0], (PILOT_ROWS,), generator=torch.Generator().manual_seed(self.seed))
                self._pilot = Pilot(self._queries[rows], self._points)
            norms = columns.double().square().sum(1).sqrt()
            concentration = float(norms.sum()) ** 2 / (len(norms) * size)
            return self._pilot.share(concentration, eps**2 * PLANNED[confidence]) < _PROMISING

    def build_index(self) -> KernelIndex:
        """The index, now rather than with the first product; with it, small matrices are approximated too."""
        if self._index is None:
            generator = torch.Generator().manual_seed(self.seed)
            backend = "ivf" if self.backend == "exact" else self.backend
            same = self._queries is self._points
            self._index = KernelIndex.build(backend, Queries.together(self._queries), self._points, same, generator)
        return self._index

    def assumption(self, prefixes: int | Sequence[int] = 8, pilot: int | None = None) -> AssumptionReport:
        """How sparse K is in the paper's sense; :func:`~gossamer.operators.gaussian.assumption.measure_assumption`."""
        from gossamer.operators.gaussian.assumption import measure_assumption

        return measure_assumption(self, prefixes, pilot)

    def _scaled(self, points: Tensor) -> Tensor:
        """A copy in fp64 in which K is ``2^(-|q - k|^2)``."""
        return (points.detach().to(torch.float64) - self._centre) * (UNIT / self.bandwidth)

    def _exact(self, columns: Tensor) -> Tensor:
        """Each column by its own unit: one of small numbers keeps its digits beside one of large ones."""
        units = columns.abs().amax(0)
        units = torch.where(units > 0, units, 1.0)
        columns = columns / units
        if self._keys is None:
            return units * tile_products(self._queries, self._points, columns)
        x, ranges = self._keys.spread(columns), self._keys.everything(1)
        return units * products(Queries.together(self._queries), self._keys, x, ranges)[0]

    def _columns(self, x: Tensor) -> Tensor:
        """x as (n_k, r) fp64."""
        if x.dim() not in (1, 2) or len(x) != self.shape[1] or not x.is_floating_point():
            wanted = f"({self.shape[1]}) or ({self.shape[1]}, r) floating-point numbers"
            raise ConfigurationError(f"x is {wanted}, got {tuple(x.shape)} of {x.dtype}")
        check_gradient(x, "x")
        if not bool(torch.isfinite(x).all()):
            where = (~torch.isfinite(x)).nonzero()[0].tolist()
            raise ConfigurationError(f"x has a number that is not finite, at {where}")
        return (x if x.dim() == 2 else x[:, None]).detach().double()

    def _shaped(self, y: Tensor, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, self.dtype)
        return (y if x.dim() == 2 else y[:, 0]).to(dtype)


def check_gradient(tensor: Tensor, name: str) -> None:
    """Refuses a tensor whose gradient would be lost."""
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ConfigurationError(
            f"{name} requires a gradient, and none flows through kernel products: pass {name}.detach(), or compute "
            "under torch.no_grad()"
        )


def _check_points(points: Tensor, name: str) -> None:
    if points.dim() != 2 or 0 in points.shape or not points.is_floating_point():
        wanted = "(n, d) floating-point numbers, n and d at least 1"
        raise ConfigurationError(f"{name} are {wanted}, got {tuple(points.shape)} of {points.dtype}")
    check_gradient(points, name)
    for first, part in enumerate(points.split(1 << 16)):
        if not bool(torch.isfinite(part).all()):
            row, column = (~torch.isfinite(part)).nonzero()[0].tolist()
            at = f"row {(first << 16) + row}, column {column}"
            raise ConfigurationError(f"the {name} have a number that is not finite, at {at}")
