"""What a person sees while a model is fetched: on stderr, so that stdout stays free for results."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gossamer.progress import stderr as console

if TYPE_CHECKING:
    from rich.progress import Progress


def say(sentence: str) -> None:
    """Prints one line; a terminal may wrap it, a file or pipe gets it whole."""
    console.print(sentence, soft_wrap=True)


@contextmanager
def stage(doing: str, done: str) -> Iterator[None]:
    """Shows a spinner with ``doing``; prints ``done`` and the seconds it took when the body succeeds."""
    started = time.perf_counter()
    with console.status(doing):
        yield
    say(f"{done} in {time.perf_counter() - started:.1f} s")


def download_bar() -> Progress:
    """A bar with bytes and speed, to be used as a context manager."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,  # a log would fill with empty lines
    )
