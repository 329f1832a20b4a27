"""Measures the error of a product on rows that are computed exactly too.

Rows are drawn, row i ``E_i`` times on average, and the sum over draws of ``|e_i|^2 / E_i`` estimates ``|Kx - y|^2``
without bias, whatever the estimates that the plan was made by were worth. Rows that are known in the end are put into
y; of what that leaves, ``exp(-E_i) |e_i|^2 / E_i`` is an estimate, since exp(-E_i) is how likely a row was not drawn.
The standard error is known from the same numbers. This is statistical: an error that sits in very few rows that
nothing points to can be missed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Certificate:
    """Rows that are known exactly, and how likely each row was to be among them.

    Args:
        n: rows there are.
    """

    n: int
    rows: Tensor = field(init=False)
    exact: Tensor = field(init=False)
    drawn: Tensor = field(init=False)
    expected: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rows = torch.empty(0, dtype=torch.int64)
        self.exact = torch.empty(0, 0, dtype=torch.float64)
        self.drawn = torch.empty(0, dtype=torch.int64)
        self.expected = torch.zeros(self.n, dtype=torch.float64)

    def draw(self, weight: Tensor, count: int, generator: torch.Generator) -> Tensor:
        """``count`` draws of rows, half by ``weight`` (n), half evenly; returns those that are new, ascending."""
        even = torch.full_like(weight, 1 / self.n)
        total = float(weight.sum())
        probability = even if total <= 0 else 0.5 * weight / total + 0.5 * even
        sums = probability.cumsum(0)
        at = torch.rand(count, generator=generator, dtype=torch.float64) * sums[-1]
        found = torch.searchsorted(sums, at).clamp_max(self.n - 1)
        self.drawn = torch.cat([self.drawn, found])
        self.expected += count * probability
        fresh = found.unique()
        return fresh[~torch.isin(fresh, self.rows)]

    def add(self, rows: Tensor, exact: Tensor) -> None:
        """Rows that are now known, and their exact results (rows, columns)."""
        known = torch.cat([self.exact, exact]) if len(self.rows) else exact
        self.rows, order = torch.cat([self.rows, rows]).sort()
        self.exact = known[order]

    def squared_error(self, y: Tensor) -> tuple[float, float]:
        """Estimate of ``|Kx - y|^2`` with the known rows of y (rows, columns) put right, and its standard error."""
        error = (y - self.exact).square().sum(1)
        expected = self.expected[self.drawn]
        terms = error[torch.searchsorted(self.rows, self.drawn)] * (-expected).exp() / expected
        count = len(terms)
        spread = float((terms.square().sum() - terms.sum().square() / count).clamp_min(0)) * count / max(count - 1, 1)
        return float(terms.sum()), spread**0.5
