"""What is told of a product."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from torch import Tensor

from gossamer.timing import timed

Mode = Literal["exact", "sampled", "zero"]
Confidence = Literal["default", "chi2", "chebyshev"]


@dataclass
class ProductReport:
    """How a product was computed, and how far it may be off.

    Attributes:
        eps: what was asked for, in units of ``|x|``.
        mode: ``exact``; ``sampled``; or ``zero``, where y = 0 satisfies eps for every matrix of this size.
        reason: why it is exact, or why the answer means little.
        error: estimate of ``|Kx - y| / |x|``, of this draw; 0 where y is exact.
        bound: the error and 2.33 of its standard errors, which was held against eps: 99 % of certainty where many rows
            share the error, as they do near eps. An error far below eps may be a few large misses, and above this.
        confidence: which of the rules accepted the product.
        norm: ``|y| / |x|``. Where eps is above it, y = 0 would have done.
        entries: share of K's entries that were evaluated, 0 to 1; the index's too where it was built for this product.
        near: share of K's entries that were multiplied exactly because the points are near.
        drawn: keys that a query draws from, on average.
        sum_per_query: sum of all entries of K over n_q, where it was estimated.
        rounds: how often the sample had to grow, or rows to be repaired.
        seconds: by phase.
    """

    eps: float
    mode: Mode = "exact"
    reason: str = ""
    error: float = 0.0
    bound: float = 0.0
    confidence: Confidence = "default"
    norm: float = 0.0
    entries: float = 0.0
    near: float = 0.0
    drawn: float = 0.0
    sum_per_query: float | None = None
    rounds: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Adds the time of what is inside to a phase."""
        return timed(self.seconds, phase)


@dataclass(frozen=True)
class KernelProduct:
    """Unpacks into y, shaped as x is, and the report."""

    y: Tensor
    report: ProductReport

    def __iter__(self) -> Iterator[Any]:
        return iter((self.y, self.report))
