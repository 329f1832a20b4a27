"""Which drafted tokens to verify: as many as make a step bring most tokens in its time.

A step over R rows that brings one token to each of n sequences takes T(R). A drafted token adds a row, its time and,
with probability S, a token. Over all sequences, tokens are taken from the likeliest down, and of all numbers of them
that is taken for which

    (n + S_1 + ... + S_k) / T(R + k)

is largest. Beside a long prompt, T is large and nearly any draft pays; with many sequences and a small model, a row
costs its share of the step and hardly any does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.engine.speculation.step_time import StepTime

_GAIN = 1.02  # that is expected at least: estimates are not exact
LEAST_CHANCE = 0.02  # of a token that is considered
_AHEAD = 8


def least_chance(time: StepTime, rows: int, sampled: int) -> float:
    """From which on a token is a candidate: with half of what a row costs on average, none of those below pays."""
    slope = (time.seconds(rows + _AHEAD) - time.seconds(rows)) / _AHEAD
    return max(LEAST_CHANCE, 0.5 * sampled * slope / (time.seconds(rows) + time.overhead))


@dataclass(slots=True)
class Candidate:
    """A draft of one sequence.

    Attributes:
        chances: that the tokens up to each of them are right, falling.
        row_seconds: of attention of one row, more than the rows of the time model have.
    """

    chances: Sequence[float]
    row_seconds: float = 0.0


def choose(candidates: Sequence[Candidate], time: StepTime, *, rows: int, sampled: int, most: int) -> list[int]:
    """How many tokens of each draft to verify.

    Args:
        rows: of the step without drafts.
        sampled: how many of its sequences get a token.
        most: rows that may be added.

    >>> time = StepTime([(1, 0.010), (8, 0.0135)])  # half a millisecond a row
    >>> choose([Candidate([0.9, 0.8, 0.05]), Candidate([0.01])], time, rows=2, sampled=2, most=8)
    [2, 0]
    """
    wanted = sorted(
        ((chance, number) for number, each in enumerate(candidates) for chance in each.chances), reverse=True
    )
    seconds, expected = time.seconds(rows) + time.overhead + time.per_row * sampled, float(sampled)
    best, count = expected / seconds * _GAIN, 0
    attending, overhead = 0.0, max(time.overhead, time.drafted_overhead)
    for added, (chance, number) in enumerate(wanted[:most], start=1):
        expected += chance
        attending += candidates[number].row_seconds
        taken = time.seconds(rows + added) + overhead + time.per_row * (sampled + added) + attending
        if expected / taken > best:
            best, count = expected / taken, added
    counts = [0] * len(candidates)
    for _, number in wanted[:count]:
        counts[number] += 1
    return counts
