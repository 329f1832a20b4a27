"""Memory in large pages. Keys and values are read from end to end in every step; with the usual pages of 4 KiB one core
of a virtual machine reads half as fast, because it stops at the border of each to look the next one up.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LARGE = 2 << 20  # bytes of a large page


def zeros(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Tensors of these shapes that stand in one piece of memory, which is free again when none of them is left.

    >>> a, b = zeros([(2, 3), (4,)], torch.float32, torch.device("cpu"))
    >>> a.shape, b.data_ptr() - a.data_ptr()
    (torch.Size([2, 3]), 24)
    """
    sizes = [math.prod(shape) for shape in shapes]
    memory = _bytes(sum(sizes) * dtype.itemsize, device).view(dtype)
    return [part.view(shape) for part, shape in zip(memory.split(sizes), shapes, strict=True)]


def _bytes(count: int, device: torch.device) -> Tensor:
    """Zeros, (count) uint8; at the start of a large page if they fill one."""
    if device.type != "cpu":
        return torch.zeros(count, dtype=torch.uint8, device=device)
    if count < LARGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.from_numpy(np.zeros(count, np.uint8))  # the system's own zeros: PyTorch would write them
    mapping = mmap.mmap(-1, count + LARGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory = torch.frombuffer(mapping, dtype=torch.uint8)  # keeps the mapping
    start = -memory.data_ptr() % LARGE
    with contextlib.suppress(OSError):  # a kernel without large pages
        mapping.madvise(mmap.MADV_HUGEPAGE, start, count // LARGE * LARGE)  # a last page that is not full stays small
    return memory[start : start + count]
