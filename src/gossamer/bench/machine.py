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
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
