"""Ray says nothing: what a job does is told by us, and standard output is for the summary."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from gossamer.distributed.extra import require_ray

_RAYS_OWN = re.compile(r"(\x1b\[\d+m)?\((raylet|autoscaler)\b")


class _WithoutRay:
    """A stream that what Ray tells of its own does not reach.

    Ray prints the death of every process to ``sys.stdout``, ``log_to_driver=False`` or not (2.60), from a thread of its
    own, and what it held back of that when it disconnects.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._dropped = False

    def write(self, text: str) -> int:
        self._dropped = bool(_RAYS_OWN.match(text)) or (self._dropped and text == "\n")  # print() ends lines apart
        return len(text) if self._dropped else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_ray() -> Iterator[None]:
    """For as long as there is a connection to a cluster."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # C++ writes to standard error, here and in all it starts
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # its threads would look for another cluster after the end
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
