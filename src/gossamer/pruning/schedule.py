"""How sparsity grows over time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from gossamer.errors import ConfigurationError
from gossamer.pruning.patterns import check_share


@dataclass(frozen=True)
class CubicSchedule:
    """Gradual pruning: fast at first, and ever more carefully (Zhu and Gupta 2017, arXiv 1710.01878):

        s_t = s_f + (s_i - s_f) (1 - t / n)^3,    t = 1 ... n

    Args:
        final: s_f.
        steps: n.
        initial: s_i.

    >>> [round(sparsity, 3) for sparsity in CubicSchedule(0.9, 3)]
    [0.633, 0.867, 0.9]
    """

    final: float
    steps: int
    initial: float = 0.0

    def __post_init__(self) -> None:
        check_share(self.final)
        if self.steps < 1 or not 0 <= self.initial < self.final:
            raise ConfigurationError(f"a schedule takes steps from a lower to a higher sparsity, got {self}")

    def __iter__(self) -> Iterator[float]:
        for step in range(1, self.steps + 1):
            yield self.final + (self.initial - self.final) * (1 - step / self.steps) ** 3


def geometric(before: float, after: float, steps: int) -> list[float]:
    """Sparsities that take the same share of the remaining weights each time (M-FAC's recomputations).

    >>> [round(sparsity, 3) for sparsity in geometric(0.0, 0.75, 2)]
    [0.5, 0.75]
    """
    ratio = (1 - after) / (1 - before)
    return [1 - (1 - before) * ratio ** (step / steps) for step in range(1, steps)] + [after]
