"""Whether a process grows: the memory it has for itself, over time."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

SETTLED = 60.0  # seconds until buffers and caches have the size they need


def anonymous_kilobytes(pid: int) -> int | None:
    """Memory of a process that belongs to no file; ``None`` if there is no such process, or no Linux."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), None)


def slope_per_minute(samples: Sequence[tuple[float, float]]) -> float | None:
    """By how much the second number of each sample (seconds, amount) grows per minute, fitted by least squares.

    Samples of the first minute, and of the first third, do not count. ``None`` if fewer than two are left.

    >>> slope_per_minute([(0, 900), (60, 100), (90, 105), (120, 110)])
    10.0
    """
    skip = max([SETTLED, *(seconds / 3 for seconds, _ in samples)])
    settled = [(seconds, amount) for seconds, amount in samples if seconds >= skip]
    if len({seconds for seconds, _ in settled}) < 2:
        return None
    return statistics.linear_regression(*zip(*settled, strict=True)).slope * 60
