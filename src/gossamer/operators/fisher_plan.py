"""What an inverse Fisher matrix will cost, said before anything is allocated."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import torch

from gossamer.errors import ConfigurationError
from gossamer.system import available_memory

Structure = Literal["full", "block"]
Solver = Literal["auto", "dual", "primal"]


@dataclass(frozen=True)
class FisherPlan:
    """Memory and work of an :class:`~gossamer.operators.inverse_fisher.InverseFisher`.

    Attributes:
        m, d, structure, block_size, solver: as given, or as chosen.
        store_bytes: of the gradients.
        factor_bytes: of the matrices that are factored, and their factors.
        gigaflops: 1e9 operations of building it, each product and each sum counted.
    """

    m: int
    d: int
    structure: Structure
    block_size: int
    solver: Solver
    store_bytes: int
    factor_bytes: int
    gigaflops: float

    @property
    def total_bytes(self) -> int:
        return self.store_bytes + self.factor_bytes

    def seconds(self, gflops: float | None = None) -> float:
        """To build it, at so many GFLOP/s of fp64 products; measured on this machine by default (some milliseconds)."""
        return self.gigaflops / (gflops or product_gflops())

    def __str__(self) -> str:
        blocks = f"blocks of {self.block_size:,}, " if self.structure == "block" else ""
        return (
            f"{self.m:,} gradients of {self.d:,} numbers, {blocks}{self.solver}: {_size(self.store_bytes)} of "
            f"gradients, {_size(self.factor_bytes)} of factors, {self.gigaflops:,.1f} GFLOP"
        )


def plan_fisher(
    m: int,
    d: int,
    *,
    structure: Structure = "full",
    block_size: int | None = None,
    solver: Solver = "auto",
    dtype: torch.dtype = torch.float32,
    streaming: bool = False,
) -> FisherPlan:
    """The cost of ``InverseFisher`` for ``m`` gradients of ``d`` numbers.

    Args:
        structure: ``"full"``, or ``"block"``: only entries of blocks of ``block_size`` parameters in a row are not 0.
        solver: ``"dual"`` factors an m x m matrix per block, ``"primal"`` a ``block_size`` x ``block_size`` one;
            ``"auto"`` takes the smaller.
        dtype: of the stored gradients.
        streaming: blocks are summed up gradient by gradient, and none is stored (primal only).

    Raises:
        ConfigurationError: sizes below 1, or arguments that do not go together.

    >>> print(plan_fisher(256, 100_000))
    256 gradients of 100,000 numbers, dual: 102.4 MB of gradients, 1.0 MB of factors, 6.6 GFLOP
    >>> print(plan_fisher(1024, 85_000_000, structure="block", block_size=50, streaming=True))
    1,024 gradients of 85,000,000 numbers, blocks of 50, primal: 0 B of gradients, 34.0 GB of factors, 4,422.8 GFLOP
    """
    if m < 1 or d < 1:
        raise ConfigurationError(f"a Fisher matrix needs at least one gradient of one number, got m={m}, d={d}")
    if structure not in ("full", "block") or solver not in ("auto", "dual", "primal"):
        raise ConfigurationError(
            f"structure is 'full' or 'block' and solver 'auto', 'dual' or 'primal', got {structure!r} and {solver!r}"
        )
    if (structure == "block") != (block_size is not None):
        raise ConfigurationError("structure='block' needs a block_size, and structure='full' has none")
    if block_size is not None and block_size < 1:
        raise ConfigurationError(f"block_size must be at least 1, got {block_size}")
    size = min(block_size or d, d)
    blocks = -(-d // size)
    if streaming and solver == "dual":
        raise ConfigurationError("the dual solver needs the gradients; streaming keeps none")
    if solver == "auto":
        solver = "primal" if streaming or size <= m else "dual"
    if solver == "primal":
        factor_bytes, flops = 8 * blocks * size * size, blocks * (m * size**2 + size**3 / 3)
    else:
        factor_bytes, flops = 2 * 8 * blocks * m * m, blocks * (m * m * size + m**3 / 3)
    store_bytes = 0 if streaming else m * d * dtype.itemsize
    return FisherPlan(m, d, structure, size, solver, store_bytes, factor_bytes, flops / 1e9)


def check_memory(wanted: int, what: str, instead: str) -> None:
    """Raises :class:`~gossamer.errors.ConfigurationError`, with numbers, for more bytes than the system has to give."""
    available = available_memory()
    if available is not None and wanted > available:
        raise ConfigurationError(
            f"{what} take {_size(wanted)}, and the system has {_size(available)} to give; {instead}"
        )


def product_gflops() -> float:
    """GFLOP/s of an fp64 matrix product here: the best of a few short ones."""
    left, right = torch.rand(256, 512, dtype=torch.float64), torch.rand(512, 256, dtype=torch.float64)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        _ = left @ right
        best = min(best, time.perf_counter() - start)
    return 2 * 256 * 512 * 256 / best / 1e9


def _size(count: int) -> str:
    """
    >>> _size(1_500_000_000)
    '1.5 GB'
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:,.1f} {name}"
    return f"{count} B"
