"""How long a step takes by its rows: measured before the first draft, corrected by each step that is made.

Reading the weights takes the same time for one row as for several, multiplying does not; where the one gives way to the
other depends on model, number format and processor. Between the measured numbers of rows the time is interpolated; the
measured steps have hardly any keys to attend to, so what real ones take is larger by a factor that is learnt.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence

import torch

from gossamer.engine.memory import MemoryBudget
from gossamer.engine.plan import Chunk, StateRun, StepPlan
from gossamer.engine.runner import Runner
from gossamer.engine.slots import SlotPool

ROWS = (1, 2, 4, 8, 16, 32, 64)
FEW_ROWS = (1, 4, 16, 64)  # of a step that takes long
MANY_ROWS = (65, 96, 128)  # that are timed once steps come near them: products take rows in tiles
_LONG = 0.02  # seconds
_ROUNDS = 2
_MEMORY = 0.9  # of the factor, per step
_LEAST, _MOST = 0.25, 8.0  # of the factor


class StepTime:
    """Seconds of a forward pass by its number of rows.

    Args:
        points: measured (rows, seconds), ascending in both.
        measure: times steps of more rows, for :meth:`reach`.

    Attributes:
        factor: of real steps over measured ones.
        overhead, drafted_overhead: seconds of a step outside of the forward pass, without drafts and with some, whose
            plan has to be made anew; :attr:`per_row` for each row's choice of a token comes on top.
        whole: seconds of a step, all in all.

    >>> time = StepTime([(1, 0.010), (4, 0.016), (8, 0.020)])
    >>> round(time.seconds(2), 3), round(time.seconds(16), 3)
    (0.012, 0.028)
    """

    def __init__(
        self, points: Sequence[tuple[int, float]], measure: Callable[[Sequence[int]], list[float]] | None = None
    ) -> None:
        self.points = list(points)
        self._measure = measure
        self.factor = 1.0
        self.overhead = self.drafted_overhead = self.per_row = self.whole = 0.0

    def reach(self, rows: int) -> None:
        """Steps may have so many rows now: see that what they take is measured."""
        if self._measure is None or rows <= self.points[-1][0]:
            return
        measure, self._measure = self._measure, None
        self.points = _ascending([*self.points, *zip(MANY_ROWS, measure(MANY_ROWS), strict=False)])

    def seconds(self, rows: int) -> float:
        """Of a forward pass."""
        return self.factor * self._measured(rows)

    def _measured(self, rows: int) -> float:
        if len(self.points) == 1:
            return self.points[0][1]
        at = min(max(bisect_left(self.points, (rows, 0.0)), 1), len(self.points) - 1)
        (few, short), (many, long) = self.points[at - 1], self.points[at]
        return short + (long - short) * (rows - few) / (many - few)

    def learn(
        self, rows: int, seconds: float, *, choosing: float, chosen: int, other: float, drafted: bool = False
    ) -> None:
        """A step of ``rows``, some of them ``drafted``, took so many seconds.

        ``choosing`` tokens of ``chosen`` rows took its time as well, and there is ``other``.
        """
        seen = min(max(seconds / self._measured(rows), _LEAST), _MOST)
        self.factor = _MEMORY * self.factor + (1 - _MEMORY) * seen
        self.whole = _MEMORY * self.whole + (1 - _MEMORY) * (seconds + choosing + other)
        if drafted:
            self.drafted_overhead = _MEMORY * self.drafted_overhead + (1 - _MEMORY) * other
        else:
            self.overhead = _MEMORY * self.overhead + (1 - _MEMORY) * other
        if chosen:
            self.per_row = _MEMORY * self.per_row + (1 - _MEMORY) * choosing / chosen


def measure_steps(runner: Runner, most: int) -> StepTime:
    """Time steps of one sequence on what computes the model, all of whose rows have their logits.

    Args:
        most: rows of a step.
    """
    slot = SlotPool(runner.layout, MemoryBudget(1 << 62)).take(MANY_ROWS[-1])
    assert slot is not None

    def seconds(rows: int) -> float:
        positions = torch.arange(rows, device=runner.layout.device)
        plan = StepPlan([0] * rows, positions, runner.layout.device, logit_rows=positions.clone())
        plan.chunks.append(Chunk(slice(0, rows), slot, 0, 0))
        if runner.layout.state_bytes:
            plan.state_runs.append(StateRun(slice(0, rows), slot, 0, 1))
        start = time.perf_counter()
        runner.forward(plan)
        return time.perf_counter() - start

    long = min(seconds(1), seconds(1)) > _LONG

    def measure(counts: Sequence[int]) -> list[float]:
        possible = [rows for rows in counts if rows <= most]
        rounds = [[seconds(rows) for rows in possible] for _ in range(1 if long else _ROUNDS)]
        return [min(times) for times in zip(*rounds, strict=True)]

    counts = FEW_ROWS if long else ROWS
    return StepTime(_ascending(list(zip(counts, measure(counts), strict=False))), measure)


def _ascending(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """More rows never take less: what says so is noise."""
    slowest = 0.0
    found = []
    for rows, seconds in points:
        slowest = max(slowest * 1.0001, seconds)
        found.append((rows, slowest))
    return found
