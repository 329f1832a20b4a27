"""Progress on standard error: a bar when that is a terminal, silence otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console

if TYPE_CHECKING:
    from gossamer.engine.stats import EngineStats

# Progress, notices and errors: what is not a result. Markup is off because messages quote what users and models wrote.
stderr = Console(stderr=True, highlight=False, markup=False)


class Progress:
    """``with Progress(10) as progress: ... progress.advance()``"""

    def __init__(self, total: int, what: str = "computing", *, enabled: bool = True) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Bar(*columns, console=stderr, disable=not (enabled and sys.stderr.isatty()))
        self._task = self._bar.add_task(what, total=total, note="")
        self._start = time.perf_counter()
        self._generated: int | None = None

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        self._bar.advance(self._task, count)

    def describe(self, stats: EngineStats) -> None:
        """Show tokens per second since the bar began."""
        if self._bar.disable:
            return
        if self._generated is None:
            self._generated = stats.generated_tokens
        rate = (stats.generated_tokens - self._generated) / max(time.perf_counter() - self._start, 1e-9)
        self._bar.update(self._task, note=f"{rate:,.0f} tokens/s")
