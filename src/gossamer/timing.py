"""How long the phases of something take."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Adds what the body takes to the seconds of a phase.

    >>> seconds = {}
    >>> with timed(seconds, "reading"):
    ...     pass
    >>> list(seconds)
    ['reading']
    """
    start = time.perf_counter()
    try:
        yield
    finally:
        seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - start
