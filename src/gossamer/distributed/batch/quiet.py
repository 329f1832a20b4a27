"""Ray says nothing: what a job does is told by us, and standard output is for the summary."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from gossamer.distributed.cluster import require_ray

_LISTENER = "ray_listen_error_messages"


class _WithoutRay:
    """A stream that what Ray's listener writes does not reach.

    That thread prints the death of every process to ``sys.stdout``, ``log_to_driver=False`` or not (Ray 2.60).
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return len(text) if threading.current_thread().name == _LISTENER else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_ray() -> Iterator[None]:
    """For as long as there is a connection to a cluster."""
    # Read when Ray is imported. C++ writes to standard error; and what is held back to be told once for several comes
    # at the end, from whichever thread disconnects.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    stream: Any = _WithoutRay(sys.stdout)
    with redirect_stdout(stream):
        yield


@contextmanager
def muted() -> Iterator[None]:
    """Standard error of all of this process is nowhere: while Ray connects, its C++ says that it will say nothing."""
    sys.stderr.flush()
    before, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(nowhere)


@contextmanager
def quiet_ray_data() -> Iterator[Any]:
    """Ray Data, with what it shows and gives up on by default changed for the time of a job."""
    require_ray()
    import ray.data as data

    context = data.DataContext.get_current()
    wanted = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        # A part may take hours, and passes nothing on before its end: our own watch looks at every step.
        "execution_no_progress_timeout_s": -1,
        # A row that kills its process comes as an error line; a part that Ray gives up on would be rows that are lost.
        "max_errored_blocks": 0,
    }
    before = {name: getattr(context, name) for name in wanted}
    loggers = {name: logging.getLogger(name) for name in ("ray.data", "ray")}
    levels = {name: logger.level for name, logger in loggers.items()}
    try:
        for name, value in wanted.items():
            setattr(context, name, value)
        for logger in loggers.values():
            logger.setLevel(logging.CRITICAL)
        yield data
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for name, logger in loggers.items():
            logger.setLevel(levels[name])
