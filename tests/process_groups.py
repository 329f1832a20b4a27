"""Functions that several processes run together, connected by gloo on 127.0.0.1."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing

import forked  # noqa: F401  its server has imported PyTorch already when it forks

_STARTING = torch.multiprocessing.get_context("forkserver")


def run_ranks(function: Callable[..., None], size: int, directory: Path, *arguments: Any, seconds: float = 120) -> None:
    """``function(*arguments)`` in ``size`` processes with an initialized ``torch.distributed``.

    Raises:
        AssertionError: a process raised (with all tracebacks), or had not ended after so many seconds.
    """
    start_ranks(function, size, directory, *arguments, seconds=seconds, killed=0)


def start_ranks(
    function: Callable[..., None], size: int, directory: Path, *arguments: Any, seconds: float = 120, killed: int
) -> None:
    """The same, where the last ``killed`` processes end by a signal."""
    directory.mkdir(exist_ok=True)
    processes = [
        _STARTING.Process(target=_run, args=(rank, size, directory, function, arguments)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    failures = [file.read_text() for file in sorted(directory.glob("failure-*"))]
    assert not failures, "\n".join(failures)
    assert not late, f"processes {late} were still running"
    codes = [process.exitcode for process in processes]
    assert codes == [0] * (size - killed) + [-9] * killed


def _run(rank: int, size: int, directory: Path, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=size)
        function(*arguments)
    except BaseException:
        (directory / f"failure-{rank}").write_text(f"process {rank}: {traceback.format_exc()}")
    os._exit(0)  # others may be gone, and an orderly end would wait for them
