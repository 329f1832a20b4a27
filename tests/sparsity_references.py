"""Kernel matrices that are stored, and the statistics of their sparsity by definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer.operators.gaussian.assumption import TAUS, Sparsity


def dense(queries: Tensor, keys: Tensor, bandwidth: float) -> Tensor:
    squares = (queries.double()[:, None] - keys.double()).square().sum(-1)
    return torch.exp(-squares / (2 * bandwidth**2))


def check(found: Sparsity, matrix: Tensor, rel: float = 1e-9) -> None:
    """Every statistic, by its definition."""
    n, rows = max(matrix.shape), len(matrix)
    ordered = matrix.flatten().sort(descending=True).values
    ratio = float(ordered[n:].sum() / ordered[:n].sum())
    assert found.n == n
    assert abs(found.ratio - ratio) <= found.ratio_error + rel * (1 + ratio)
    assert found.ratio_error <= 0.011 * (1 + ratio)
    assert found.sum_per_query == pytest.approx(float(matrix.sum()) / rows, rel=rel)
    assert found.frobenius_per_query == pytest.approx(float(matrix.square().sum()) / rows, rel=rel)
    light = [float(torch.where(matrix < tau, matrix, 0).square().sum()) / rows for tau in TAUS]
    assert found.light_energy == pytest.approx(light, rel=max(rel, 1e-6), abs=1e-12)
    supports = matrix.sum(1).square() / matrix.square().sum(1)
    assert found.effective_support == pytest.approx(float(supports.mean()), rel=rel)
