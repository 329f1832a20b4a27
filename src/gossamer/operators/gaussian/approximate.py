"""Plans a product, tries the plan on some rows, runs it, and measures what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gossamer.operators.gaussian.certificate import Certificate
from gossamer.operators.gaussian.index import KernelIndex
from gossamer.operators.gaussian.plan import Plan, draw, expected_draws, make_plan, near_ranges, some_rows
from gossamer.operators.gaussian.report import ProductReport
from gossamer.ops.gaussian import Sample, products

_WORTH_IT = 0.8  # of the entries of K: a plan that takes more is not followed
_FEWEST_CHECKED = 256  # rows before the product, and as many after it
_CHECKED = 1 / 96  # of all rows, as many as this if it is more
_MOST_CHECKED = 1024
_MOST_KNOWN = 1 / 24  # of all rows, before more of them are asked for
_MOST_ROUNDS = 8
_LEAST_STEP, _MOST_STEP = 1.25, 3.0  # that the planned squared error is divided by in a round
_QUANTILE = 2.33  # of the normal distribution: 99 %, one-sided
_REPAIRED = 0.005  # of the rows at most, that are computed exactly because they are conspicuous:
_CONSPICUOUS = 8.0  # times what is planned for a row on average
_GROWTH = 1.2  # of a tile's sample at least, for it to be drawn anew

# The expected squared error as a share of eps^2 |x|^2: what a plan aims at, and what those rules that speak of the
# expectation, and not of the draw at hand, ask of its estimate. 1 / 6.63 is the 99 % quantile of chi squared with one
# degree of freedom, 1 / 100 is Chebyshev's inequality for a probability of 1 %.
PLANNED = {"default": 1 / 1.6, "chi2": 1 / (1.2 * 6.63), "chebyshev": 1 / (1.2 * 100)}
_EXPECTED = {"default": None, "chi2": 1 / 6.63, "chebyshev": 1 / 100}


# What is wanted of rows of K x (rows, r) and of their expected squared errors (rows): those of the result.
Finish = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def approximate(
    index: KernelIndex,
    columns: Tensor,
    unit: float,
    report: ProductReport,
    generator: torch.Generator,
    finish: Finish = lambda y, variance: (y, variance),
) -> Tensor | None:
    """The result (n_q, ...) fp64 with an error of at most ``eps * unit``, or ``None`` if the exact one costs no more.

    Args:
        index: of the matrix.
        columns: x (n_k, r), not all of them 0.
        unit: of eps: ``|x|`` for a product.
        report: with eps and the confidence; it is filled in.
        generator: of all draws.
        finish: makes the result of the product; the product itself by default.
    """
    return _Product(index, columns, unit, report, generator, finish).run()


class _Product:
    def __init__(
        self,
        index: KernelIndex,
        columns: Tensor,
        unit: float,
        report: ProductReport,
        generator: torch.Generator,
        finish: Finish,
    ) -> None:
        self.index, self.report, self.generator, self.finish, self.unit = index, report, generator, finish, unit
        self.x = index.keys.spread(columns)
        self.square = index.keys.spread(columns.double().square().sum(1, keepdim=True))[0].double()
        self.allowed = (report.eps * unit) ** 2
        self._batch = min(max(_FEWEST_CHECKED, round(_CHECKED * len(index.order))), _MOST_CHECKED)
        self._planned = self.allowed * PLANNED[report.confidence]
        self.rows, self.columns = len(index.order), len(columns)
        self.certificate = Certificate(self.rows)
        self.uniform = torch.rand(index.keys.padded, generator=generator, dtype=torch.float64)
        report.sum_per_query = index.total / self.rows

    def run(self) -> Tensor | None:
        report = self.report
        with report.timed("plan"):
            plan: Plan | None = make_plan(self.index, self.square, self._planned)
            assert plan is not None
            if not self._pays(plan):
                return None
        with report.timed("check"):
            weight = plan.weight.clamp_min(0)[self.index.tile_of]
            settled = self._settle(plan, weight)
            if settled is None:
                return None
            plan, sample = settled
        with report.timed("product"):
            ranges = near_ranges(plan.near, self.index.keys)
            y, variance = self.finish(*products(self.index.queries, self.index.keys, self.x, ranges, sample))
        self._count(plan)
        with report.timed("repair"):
            self._repair_rows(y, variance)
        with report.timed("check"):
            self._compute(self.certificate.draw(variance, self._batch, self.generator))
            accepted = self._accepted(y[self.certificate.rows], float(variance.sum()))
        with report.timed("repair"):
            while not accepted and report.rounds < _MOST_ROUNDS:
                report.rounds += 1
                plan = self._repair_tiles(plan, y, variance)
                if plan is None:
                    return None
                accepted = self._accepted(y[self.certificate.rows], float(variance.sum()))
        if not accepted:
            report.reason = "the error did not come below eps"
            return None
        y[self.certificate.rows] = self.certificate.exact
        out = torch.empty_like(y)
        out[self.index.order] = y
        report.mode = "sampled"
        return out

    def _pays(self, plan: Plan) -> bool:
        rows = self.index.tile_sizes.double()
        planned = plan.near_entries + expected_draws(plan, rows) + 2 * self._batch * self.columns
        if planned <= _WORTH_IT * self.rows * self.columns:
            return True
        self.report.reason = "the plan costs no less than the exact product"
        return False

    def _compute(self, rows: Tensor) -> None:
        """Makes rows (places) known to the certificate."""
        self.certificate.add(rows, self._exact(rows))

    def _exact(self, rows: Tensor) -> Tensor:
        self.report.entries += len(rows) / self.rows
        part, keys = self.index.queries.take(rows), self.index.keys
        return self.finish(*products(part, keys, self.x, keys.everything(1)))[0]

    def _some(self, plan: Plan, sample: Sample, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates of some rows (places, ascending), and their expected squared errors."""
        queries, ranges, part = some_rows(plan, self.index, sample, rows)
        return self.finish(*products(queries, self.index.keys, self.x, ranges, part))

    def _settle(self, plan: Plan, weight: Tensor) -> tuple[Plan, Sample] | None:
        """Lets the sample grow until rows that are known come out well; ``None`` where that costs too much.

        Args:
            plan: to begin with.
            weight: (n_q), what rows are drawn by.
        """
        budget = self._planned
        sample = draw(plan, self.index, self.x, self.square, self.uniform)
        self._compute(self.certificate.draw(weight, self._batch, self.generator))
        while True:
            found, variance = self._some(plan, sample, self.certificate.rows)
            stands_for = self._stands_for()
            repaired = self._conspicuous(variance, stands_for)
            found[repaired], variance[repaired] = self.certificate.exact[repaired], 0.0
            expected = float(variance @ stands_for)
            if self._accepted(found, expected):
                return plan, sample
            if self._uncertain:  # rather than a larger sample, more rows that tell
                self._compute(self.certificate.draw(weight, len(self.certificate.drawn), self.generator))
                continue
            if self.report.rounds == _MOST_ROUNDS:
                self.report.reason = "the error did not come below eps"
                return None
            self.report.rounds += 1
            excess = (self.report.bound / self.report.eps) ** 2
            budget /= min(max(excess**0.5, _LEAST_STEP), _MOST_STEP)
            plan = make_plan(self.index, self.square, budget)
            if not self._pays(plan):
                return None
            sample = draw(plan, self.index, self.x, self.square, self.uniform)

    @property
    def _uncertain(self) -> bool:
        """Whether the product may be good, and more rows could show it."""
        few = len(self.certificate.drawn) < _MOST_KNOWN * self.rows
        return few and self.report.error < 0.85 * self.report.eps and self.report.confidence == "default"

    def _upper(self, y: Tensor, expected: float) -> float:
        """What is held against the allowed squared error: above the measured one, and above the expected one."""
        error, deviation = self.certificate.squared_error(y)
        upper = error + _QUANTILE * deviation
        share = _EXPECTED[self.report.confidence]
        return upper if share is None else max(upper, expected / share)

    def _accepted(self, y: Tensor, expected: float) -> bool:
        """Whether known rows of y, and the expected squared error, are good enough; it is written into the report."""
        error, _ = self.certificate.squared_error(y)
        self.report.error = error**0.5 / self.unit
        self.report.bound = self._upper(y, expected) ** 0.5 / self.unit
        return self.report.bound <= self.report.eps

    def _stands_for(self) -> Tensor:
        """How many rows each known one stands for: 1 / E_i for each time it was drawn."""
        known, drawn = self.certificate.rows, self.certificate.drawn
        times = torch.bincount(torch.searchsorted(known, drawn), minlength=len(known))
        return times / self.certificate.expected[known]

    def _conspicuous(self, variance: Tensor, stands_for: Tensor) -> Tensor:
        """Which of some rows have expected errors far above what is planned, as many as may be computed exactly."""
        order = variance.argsort(descending=True)
        among = stands_for[order].cumsum(0) <= max(1.0, _REPAIRED * self.rows)
        return order[among & (variance[order] > _CONSPICUOUS * self._planned / self.rows)].sort().values

    def _repair_rows(self, y: Tensor, variance: Tensor) -> None:
        """Computes conspicuous rows exactly: points that are in the wrong group, or near to everything."""
        rows = self._conspicuous(variance, torch.ones_like(variance))
        if len(rows):
            y[rows], variance[rows] = self._exact(rows), 0.0

    def _repair_tiles(self, plan: Plan, y: Tensor, variance: Tensor) -> Plan | None:
        """Draws more keys for the tiles whose rows have large expected errors; ``None`` if that costs too much."""
        sizes = self.index.tile_sizes.double()
        of_tile = torch.zeros_like(sizes).index_add_(0, self.index.tile_of, variance)
        error, _ = self.certificate.squared_error(y[self.certificate.rows])
        missed = max(1.0, error / max(float(of_tile.sum()), 1e-300))  # what the expectation does not know of
        at_one = of_tile * plan.rate * missed  # a tile's expected squared error is this over its rate
        wanted = (at_one / sizes).sqrt() * ((at_one * sizes).sqrt().sum() / self._planned)
        grown = wanted > _GROWTH * plan.rate
        plan = replace(plan, rate=torch.where(grown, wanted, plan.rate))
        if not bool(grown.any()) or not self._pays(plan):
            return None
        rows = grown[self.index.tile_of].nonzero()[:, 0]
        sample = draw(plan, self.index, self.x, self.square, self.uniform)
        y[rows], variance[rows] = self._some(plan, sample, rows)
        taken = float(expected_draws(plan, torch.where(grown, sizes, 0)))
        taken += float(sizes[grown] @ (plan.near[grown].double() @ self.index.block_sizes.double()))
        self.report.entries += taken / (self.rows * self.columns)
        return plan

    def _count(self, plan: Plan) -> None:
        drawn = expected_draws(plan, self.index.tile_sizes.double())
        self.report.near = plan.near_entries / (self.rows * self.columns)
        self.report.drawn = drawn / self.rows
        self.report.entries += self.report.near + drawn / (self.rows * self.columns)
