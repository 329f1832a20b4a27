"""The machine a figure was taken on, and what its memory and its multiply units can do at best, measured in place."""

from __future__ import annotations

import itertools
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from gossamer.engine.large_pages import zeros


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


class Ceilings:
    """What no implementation can exceed, to be measured again and again beside it.

    Three figures: ``gemm_gflops``, GFLOP/s of a large matrix product in ``dtype``, or in fp32 where the processor has
    no instruction for bf16; ``read_gb_per_s``, GB/s of reading memory; and with ``int8`` also ``int8_gops``, GOP/s of
    a large product of codes (where PyTorch has no fast one, the same as ``gemm_gflops``). The products are PyTorch's.
    What is read stands in large pages, as our weights, keys and values do.

    ``best`` holds the best of everything that was measured: whatever else a machine does can only make a measurement
    lower, so the highest one is the closest to what the machine can do.
    """

    def __init__(self, dtype: torch.dtype, *, int8: bool = False) -> None:
        # a few milliseconds for each attempt: the shorter, the more of them nothing disturbs
        rows, inner, columns = 512, 1024, 1024
        if dtype == torch.bfloat16 and not _multiplies_bf16():
            dtype = torch.float32
        left, right = torch.randn(rows, inner).to(dtype), torch.randn(inner, columns).to(dtype)
        (memory,) = zeros([(1 << 26,)], torch.float32, torch.device("cpu"))  # 256 MB: larger than any cache
        memory.fill_(1.0)  # a page that was never written is not read from memory
        pieces = itertools.cycle(memory.chunk(4))  # a piece is read again when the others have been
        operations = 2 * rows * inner * columns / 1e9
        self._work: dict[str, tuple[float, Callable[[], object]]] = {
            "gemm_gflops": (operations, lambda: left @ right),
            "read_gb_per_s": (memory.numel() / 1e9, lambda: next(pieces).amax()),  # keeps up better than adding
        }
        if int8 and torch.cpu._is_vnni_supported():
            codes = torch.randint(-127, 128, (rows, inner), dtype=torch.int8)
            weight = torch.randint(-127, 128, (columns, inner), dtype=torch.int8).t()
            self._work["int8_gops"] = operations, lambda: torch._int_mm(codes, weight)
        self._int8 = int8
        self.best: dict[str, float] = {}

    def measure(self, duration: float = 0.04) -> dict[str, float]:
        """The best that is reached in at least so many seconds, and at least two attempts, for each figure.

        Half of that with one thread: where another program holds a core, PyTorch's threads wait for the one that has
        none for a whole time slice, and one thread alone gets further than all of them.
        """
        found: dict[str, float] = {}
        threads = torch.get_num_threads()
        try:
            for count in dict.fromkeys((threads, 1)):
                torch.set_num_threads(count)
                for name, (amount, run) in self._work.items():
                    times = [seconds(run), seconds(run)]
                    while sum(times) < duration / 2:
                        times.append(seconds(run))
                    found[name] = max(found.get(name, 0.0), amount / min(times))
        finally:
            torch.set_num_threads(threads)
        if self._int8:
            found.setdefault("int8_gops", found["gemm_gflops"])
        self.best = best_of([self.best, found])
        return found


def _multiplies_bf16() -> bool:
    """Whether PyTorch has the processor's own products of bf16; without them it takes a hundred times as long."""
    if platform.machine() in ("x86_64", "AMD64"):
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return True


def best_of(measurements: Sequence[dict[str, float]]) -> dict[str, float]:
    """The highest of each figure.

    >>> best_of([{"read_gb_per_s": 10.0}, {"read_gb_per_s": 12.0, "gemm_gflops": 80.0}])
    {'read_gb_per_s': 12.0, 'gemm_gflops': 80.0}
    """
    names = dict.fromkeys(name for each in measurements for name in each)
    return {name: max(each[name] for each in measurements if name in each) for name in names}


def seconds(run: Callable[[], object]) -> float:
    """Time of ``run``."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
