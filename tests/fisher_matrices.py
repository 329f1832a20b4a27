"""Gradients of several kinds and the dense Fisher matrix, for the tests of Fisher operators."""

from __future__ import annotations

import torch
from torch import Tensor


def gradients(m: int, d: int, kind: str, seed: int) -> Tensor:
    """Of a size that gradients have; some twice, some zero, some in a space of few dimensions."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, d, generator=generator) * torch.rand(d, generator=generator)
    if kind == "low rank":
        rows = torch.randn(m, 2, generator=generator) @ torch.randn(2, d, generator=generator)
        rows += 0.01 * torch.randn(m, d, generator=generator)
    if kind == "duplicates":
        rows[m // 2 :] = rows[: m - m // 2].clone()
    if kind == "zeros":
        rows[::2] = 0
    return rows


def dense(rows: Tensor, damping: float, block: int | None = None) -> Tensor:
    """F in fp64."""
    wide = rows.double()
    matrix = wide.T @ wide / len(rows)
    if block is not None:
        of = torch.arange(rows.shape[1]) // block
        matrix = matrix * (of[:, None] == of)
    return matrix + damping * torch.eye(rows.shape[1], dtype=torch.float64)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())
