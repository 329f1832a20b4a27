r"""Attention over many keys as a kernel product: near keys exactly, the others by a sample, the error measured.

``exp(scale q.k)`` is a Gaussian kernel up to factors of its rows and columns (arXiv 2507.23539, section 4), and the
factors of rows cancel in softmax. Those of columns would not: they differ by ``exp(scale |k|^2 / 2)``. So the rows are
scaled here instead, by an estimate m_i of their log-sum-exp, ``K_ij = exp(scale q_i.k_j - m_i)``, whose rows add up to
about 1, and the same estimator as for Gaussian kernels multiplies it with the right-hand sides ``[v, 1]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.gaussian.approximate import approximate
from gossamer.operators.gaussian.index import KernelIndex
from gossamer.operators.gaussian.kernel import check_gradient
from gossamer.operators.gaussian.partition import PARTITIONS
from gossamer.operators.gaussian.report import Confidence, ProductReport
from gossamer.ops.attention import AttentionState, attend, merge_states
from gossamer.ops.gaussian import Queries

_FEWEST_ENTRIES = 1 << 24  # of a rectangle; fewer are attended to exactly
_ESTIMATED_FROM = 64  # points of a group whose mean stands for it when rows are scaled
_BASE = math.log2(math.e)
_CHECKED = 256  # rows whose error is measured after parts were merged


Rectangle = tuple[int, int, int, int]  # queries from, to; keys from, to


@dataclass(frozen=True)
class _Part:
    """A rectangle of K, and what was subtracted from the log-sum-exp of each of its rows (n_q), fp64."""

    index: KernelIndex
    offset: Tensor


@dataclass(frozen=True)
class AttentionProduct:
    """Attention of all queries, and how it was computed.

    ``state`` has the shapes of :func:`gossamer.attend` for one sequence and one head: out (1, 1, n_q, d_v) and lse
    (1, 1, n_q), so that :func:`gossamer.merge_states` takes it.
    """

    state: AttentionState
    report: ProductReport


class KernelAttention:
    """Softmax attention of one head over many keys, within a tolerance.

    Args:
        queries: (n_q, d), fp32 or 16-bit floats, which are computed with in fp32.
        keys: (n_k, d).
        causal: query i sees keys up to ``n_k - n_q + i``. The triangle is cut into squares, each of which is
            approximated by itself, and small triangles, which are exact.
        scale: of the scores; ``d ** -0.5`` by default.
        backend: how near pairs are found, see :class:`gossamer.GaussianKernel`.
        seed: of everything that is drawn.

    Raises:
        ConfigurationError: shapes do not fit, a number is not finite, or a gradient would be lost.

    >>> q, k, v = (torch.randn(300, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    >>> product = KernelAttention(q, k).apply(v, eps=0.1)
    >>> product.state.out.shape, product.report.mode  # so few keys are attended to exactly
    (torch.Size([1, 1, 300, 16]), 'exact')
    """

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        causal: bool = False,
        scale: float | None = None,
        backend: str = "ivf",
        seed: int = 0,
    ) -> None:
        if queries.dim() != 2 or keys.dim() != 2 or queries.shape[1] != keys.shape[1] or 0 in keys.shape:
            raise ConfigurationError(
                f"queries (n_q, d) and keys (n_k, d) are expected, got {tuple(queries.shape)} and {tuple(keys.shape)}"
            )
        if causal and len(queries) > len(keys):
            raise ConfigurationError(f"{len(queries)} causal queries see at least one key each, got {len(keys)} keys")
        if backend not in [*PARTITIONS, "exact"]:
            raise ConfigurationError(f"backend {backend!r} is not one of: {', '.join([*PARTITIONS, 'exact'])}")
        for name, points in (("queries", queries), ("keys", keys)):
            check_gradient(points, name)
            if not bool(torch.isfinite(points).all()):
                row, column = (~torch.isfinite(points)).nonzero()[0].tolist()
                raise ConfigurationError(f"the {name} have a number that is not finite, at row {row}, column {column}")
        # copies, so that they stay what the index was built of
        self.queries, self.keys = (points.detach().to(torch.float32, copy=True) for points in (queries, keys))
        self.causal = causal
        self.scale = queries.shape[1] ** -0.5 if scale is None else scale
        self.backend, self.seed = backend, seed
        self._parts: dict[Rectangle, _Part] = {}

    def apply(self, values: Tensor, eps: float, confidence: Confidence = "default") -> AttentionProduct:
        """Attention over ``values``, such that the errors of out, and of lse times s, are at most ``eps * s`` together.

        s is the root mean square of ``|v_j - mean v|``, and the errors are root mean squares over the queries: what
        makes no difference to the output, such as a constant added to all values, makes none to the tolerance.

        Args:
            values: (n_k, d_v).
            eps: 0 or less is exact.
            confidence: see :meth:`gossamer.GaussianKernel.matvec`.

        Raises:
            ConfigurationError: values do not fit or are not finite.
        """
        if values.dim() != 2 or len(values) != len(self.keys) or not bool(torch.isfinite(values).all()):
            raise ConfigurationError(f"values are ({len(self.keys)}, d_v) finite numbers, got {tuple(values.shape)}")
        check_gradient(values, "values")
        report = ProductReport(eps, confidence=confidence)
        if not self.causal:
            whole = (0, len(self.queries), 0, len(self.keys))
            return AttentionProduct(self._rectangle(whole, values.float(), report), report)
        state = self._triangle(0, len(self.queries), values.float(), report)
        shift = len(self.keys) - len(self.queries)
        if shift:
            before = self._rectangle((0, len(self.queries), 0, shift), values.float(), report)
            state = merge_states([before, state])
        if report.mode == "sampled":
            with report.timed("check"):
                self._measure(state, values.float(), report)
        return AttentionProduct(state, report)

    def _triangle(self, first: int, last: int, values: Tensor, report: ProductReport) -> AttentionState:
        """Queries [first, last) over the keys that begin with the first one's own."""
        shift = len(self.keys) - len(self.queries)
        middle = (first + last) // 2
        if (last - middle) * (middle - first) < _FEWEST_ENTRIES:
            with report.timed("exact"):
                part = slice(first + shift, last + shift)
                report.entries += (last - first) * (last - first + 1) / 2 / self._seen
                return self._attend(slice(first, last), part, values[part], causal=True)
        above = self._triangle(first, middle, values, report)
        below = self._triangle(middle, last, values, report)
        left = self._rectangle((middle, last, first + shift, middle + shift), values, report)
        below = merge_states([left, below])
        return AttentionState(torch.cat([above.out, below.out], 2), torch.cat([above.lse, below.lse], 2))

    @property
    def _seen(self) -> int:
        """How many pairs of a query and a key there are."""
        n_q, n_k = len(self.queries), len(self.keys)
        return n_q * n_k - (n_q * (n_q - 1) // 2 if self.causal else 0)

    def _rectangle(self, where: Rectangle, values: Tensor, report: ProductReport) -> AttentionState:
        """A part of the product; what the report counts is made a share of the whole."""
        others = report.entries, report.near, report.drawn
        report.entries = report.near = report.drawn = 0.0
        state = self._part(where, values, report)
        rows = where[1] - where[0]
        of_pairs, of_rows = rows * (where[3] - where[2]) / self._seen, rows / len(self.queries)
        report.entries = others[0] + of_pairs * min(report.entries, 1.0)
        report.near, report.drawn = others[1] + of_pairs * report.near, others[2] + of_rows * report.drawn
        return state

    def _part(self, where: Rectangle, values: Tensor, report: ProductReport) -> AttentionState:
        rows, columns = slice(*where[:2]), slice(*where[2:])
        values = values[columns]
        centre = values.mean(0)
        spread = float((values - centre).square().sum(1).mean().sqrt())
        entries = (where[1] - where[0]) * (where[3] - where[2])
        found = None
        if report.eps > 0 and spread > 0 and entries >= _FEWEST_ENTRIES and self.backend != "exact":
            with report.timed("index"):
                if where not in self._parts:
                    self._parts[where] = self._build(rows, columns)
                    report.entries += self._parts[where].index.entries / entries
                part = self._parts[where]
            right = torch.cat([values - centre, torch.full((len(values), 1), spread)], 1)
            unit = spread * math.sqrt(where[1] - where[0])
            draws = torch.Generator().manual_seed(self.seed)
            found = approximate(part.index, right, unit, report, draws, partial(_softmax, spread=spread))
        if found is None:
            if report.mode == "exact":
                report.error = report.bound = 0.0  # of what was tried
            with report.timed("exact"):
                report.entries += 1.0
                return self._attend(rows, columns, values)
        lse = found[:, -1] / spread + part.offset
        out = found[:, :-1] + centre.double()
        return AttentionState(out.float()[None, None], lse.float()[None, None])

    def _attend(self, rows: slice, columns: slice, values: Tensor, causal: bool = False) -> AttentionState:
        query, key = self.queries[None, None, rows], self.keys[None, None, columns]
        return attend(query, key, values[None, None], scale=self.scale, causal=causal)

    def _build(self, rows: slice, columns: slice) -> _Part:
        queries, keys = self.queries[rows], self.keys[columns]
        mean = keys.mean(0)  # softmax does not see it, and what is left of the scores is smaller
        keys = keys - mean
        generator = torch.Generator().manual_seed(self.seed)
        groups = PARTITIONS[self.backend](keys, _ESTIMATED_FROM, generator)
        estimate = (self.scale * (queries @ groups.means(keys).T) + groups.sizes.log()).logsumexp(1)
        index = KernelIndex.build(
            self.backend, Queries.together(_BASE * self.scale * queries, -_BASE * estimate), keys, False, generator
        )
        assert index.queries.row is not None
        added = torch.empty(len(queries))  # to the exponents of a row, by the index, which knows more
        added[index.order] = index.queries.row
        offset = -added / _BASE + self.scale * (queries @ mean)
        return _Part(index, offset.double())

    def _measure(self, state: AttentionState, values: Tensor, report: ProductReport) -> None:
        """The error of merged parts, on some rows."""
        spread = float((values - values.mean(0)).square().sum(1).mean().sqrt())
        rows = torch.randint(len(self.queries), (_CHECKED,), generator=torch.Generator().manual_seed(self.seed))
        shift = len(self.keys) - len(self.queries)
        scores = self.scale * (self.queries[rows] @ self.keys.T)
        scores.masked_fill_(torch.arange(len(self.keys)) > rows[:, None] + shift, -math.inf)
        lse = scores.logsumexp(1)
        out = (scores - lse[:, None]).exp() @ values
        error = (state.out[0, 0, rows] - out).square().sum(1) + (spread * (state.lse[0, 0, rows] - lse)).square()
        terms = error.double() / spread**2
        report.error = float(terms.mean().sqrt())
        report.bound = math.sqrt(float(terms.mean()) + 2.33 * float(terms.std()) / math.sqrt(_CHECKED))


def _softmax(y: Tensor, variance: Tensor, spread: float) -> tuple[Tensor, Tensor]:
    """Output and ``spread`` times log of the normalizer, of products with ``[v, spread]``."""
    total = (y[:, -1:] / spread).clamp_min(1e-30)
    return torch.cat([y[:, :-1] / total, spread * total.log()], 1), variance / total[:, 0].square()
