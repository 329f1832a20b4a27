"""The machine a figure was taken on, and what its memory and its multiply units can do at best, measured in place."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Names and versions, for the record."""
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "gossamer": version("gossamer"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def available_memory() -> int | None:
    """Bytes that processes can take without others having to give up theirs; ``None`` where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


class Int8Limits:
    """What an int8 layer cannot exceed, to be measured beside it: reading memory, multiplying codes.

    A measurement also leaves nothing in the caches that was there before.
    """

    def __init__(self) -> None:
        self._memory = torch.ones(1 << 26)  # 256 MB: larger than any cache
        self._left = torch.randint(-127, 128, (512, 1024), dtype=torch.int8)
        self._right = torch.randint(-127, 128, (4096, 1024), dtype=torch.int8).t()
        self._operations = 2 * 512 * 1024 * 4096

    def measure(self) -> tuple[float | None, float]:
        """GOP/s of a large product of codes, ``None`` where PyTorch has no fast one, and GB/s of reading memory."""
        multiply = None
        if torch.cpu._is_vnni_supported():
            multiply = self._operations / seconds(lambda: torch._int_mm(self._left, self._right)) / 1e9
        # looking for the largest number keeps up with memory better than adding
        return multiply, self._memory.numel() * 4 / seconds(self._memory.amax) / 1e9


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What no implementation can exceed: GFLOP/s of a large matrix product, GB/s of reading memory."""
    rows, inner, columns = 512, 1024, 4096
    left = torch.randn(rows, inner).to(dtype)
    right = torch.randn(inner, columns).to(dtype)
    flop = 2 * rows * inner * columns
    large = torch.ones(1 << 26)  # 256 MB: larger than any cache
    return {
        "gemm_gflops": flop / median_seconds(lambda: left @ right, 15) / 1e9,
        "read_gb_per_s": large.numel() * 4 / median_seconds(large.sum, 7) / 1e9,
    }


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time of ``run`` after one warm-up."""
    run()
    return statistics.median(seconds(run) for _ in range(repeats))


def seconds(run: Callable[[], object]) -> float:
    """Time of ``run``."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
