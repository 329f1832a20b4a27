"""A line per answered request, without texts, in the form of :mod:`gossamer.distributed.simulate.trace`."""

from __future__ import annotations

import heapq
import json
import time
from pathlib import Path
from typing import Any

from gossamer.distributed.simulate.trace import FORMAT
from gossamer.errors import ConfigurationError


class RequestTrace:
    """Appends to a file, in the order in which requests came: a line waits for those of requests that came earlier.

    Args:
        path: of the file; it is made anew.
        model: that the requests are for.

    Raises:
        ConfigurationError: it cannot be written.
    """

    def __init__(self, path: str, model: str) -> None:
        try:
            self._file = Path(path).open("w", encoding="utf-8", buffering=1)  # noqa: SIM115  for the server's life
        except OSError as error:
            raise ConfigurationError(f"cannot write the trace {path}: {error.strerror}") from None
        self._file.write(json.dumps({"format": FORMAT, "model": model}) + "\n")
        self._start = time.monotonic()
        self._open: set[float] = set()  # when requests came that have not ended
        self._ended: list[tuple[float, str]] = []

    def begin(self) -> float:
        """A request has come. Returns when, in seconds since the start; what :meth:`end` is to be told."""
        now = time.monotonic() - self._start
        self._open.add(now)
        return now

    def end(self, came: float, line: dict[str, Any] | None) -> None:
        """It has ended; ``line`` is what to write of it, if anything."""
        self._open.discard(came)
        if line is not None:
            heapq.heappush(self._ended, (came, json.dumps({"t": round(came, 4)} | line)))
        earliest = min(self._open, default=float("inf"))
        while self._ended and self._ended[0][0] < earliest:
            self._file.write(heapq.heappop(self._ended)[1] + "\n")
