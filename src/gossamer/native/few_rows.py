"""How many rows are multiplied with quantized blocks as they are packed: measured on this machine.

A few rows take the codes of a weight from its packed words; for more, a panel is written out as bytes first, once for
all of them. Where the one becomes faster than the other depends on the processor and on the types of the blocks.
Results do not: both give the same bits.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch

from gossamer.native.weights import PackedLinear

MOST_ROWS = 8
_BYTES = 8 << 20  # of the weights that are measured: more than stays in a core's own caches
_ROUNDS = 2

# Measurements of this process.
_measured: dict[tuple[str, int, tuple[str, ...]], int] = {}


def choose_few_rows(weights: Iterable[PackedLinear], isa: str, threads: int) -> dict[tuple[str, ...], int]:
    """Set, for each mixture of types, up to how many rows are multiplied with packed blocks.

    Args:
        weights: of a model; those without blocks are left alone.
        isa, threads: what multiplies.

    Returns:
        What was found for each mixture of types, from 1 to :data:`MOST_ROWS`.
    """
    kinds: dict[tuple[str, ...], list[PackedLinear]] = {}
    for weight in weights:
        if weight.block_types:
            kinds.setdefault(weight.block_types, []).append(weight)
    found = {}
    for types, group in kinds.items():
        key = isa, threads, types
        if key not in _measured:
            _measured[key] = _measure(group, threads)
        found[types] = _measured[key]
        for weight in group:
            weight.handle.few_rows = found[types]
    return found


def _measure(weights: list[PackedLinear], threads: int) -> int:
    weights = sorted(weights, key=lambda weight: int(weight.handle.bytes))
    some, size = [], 0
    for weight in weights:
        some.append(weight)
        size += weight.handle.bytes
        if size >= _BYTES:
            break
    x = torch.randn(MOST_ROWS, max(weight.inputs for weight in some), generator=torch.Generator().manual_seed(0))
    y = torch.empty(MOST_ROWS, max(weight.outputs for weight in some) * 2 + 64)
    few = 1
    for rows in (2, 3, 4, 6, MOST_ROWS):
        best = {few: float("inf"), MOST_ROWS: float("inf")}
        for _ in range(_ROUNDS):
            for most in best:
                best[most] = min(best[most], _seconds(some, most, x, y, rows, threads))
        if best[MOST_ROWS] > best[few]:
            break
        few = rows
    return few


def _seconds(weights: list[PackedLinear], few_rows: int, x: Any, y: Any, rows: int, threads: int) -> float:
    for weight in weights:
        weight.handle.few_rows = few_rows
    start = time.perf_counter()
    for weight in weights:
        weight.handle.multiply(x.data_ptr(), rows, y.data_ptr(), *weight.outlier_rule(), threads)
    return time.perf_counter() - start
