"""Rounds a weight so that its layer's output changes least: columns still to be rounded make up for those that were.

With inputs of second moments H, a row w of the weight that becomes q costs ``1/2 (q - w) H (q - w)^T``. Let R be upper
triangular with H = R R^T, and U = R^-1, so that H^-1 = U^T U. Column after column is rounded to the grid, and those
behind it move to where the cost is least given its error (Frantar et al. 2022, GPTQ, arXiv 2210.17323, section 3):

    e_k = (w_k - q_k) R_kk        w_j -= e_k U_kj    for j > k        cost = 1/2 sum of e_k^2

Columns of large inputs come first, while there are many left to make up for them; so H is that of the columns in this
order. Scales are searched before, weighted by R_kk^2: what an error in column k costs when all behind it do their best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.compress.block_types import BlockType
from gossamer.compress.grid import Grid
from gossamer.errors import ConfigurationError

_TOGETHER = 128  # columns whose errors are spread to those behind them in one product of matrices
_ROWS = 2048  # rows at a time: they do not depend on each other
_MOST_DAMPING = 1.0  # of the mean of H's diagonal


@dataclass(frozen=True)
class InverseFactor:
    """Factors of H (K, K).

    Attributes:
        order: (K), the columns as they are rounded.
        upper: U (K, K) fp32, upper triangular, of the columns in this order.
        importance: R_kk^2 (K), in the weight's own order of columns.
    """

    order: Tensor
    upper: Tensor
    importance: Tensor


def factor(moments: Tensor, relative_damping: float) -> InverseFactor:
    """Factors H = ``moments`` + damping.

    Args:
        moments: (K, K), the mean of x x^T over the inputs x of a layer.
        relative_damping: in units of the mean of the diagonal; ten times more, and so on, where H is not positive
            definite in fp32 with it.

    Raises:
        ConfigurationError: the moments are not finite, or all zero.

    >>> found = factor(torch.tensor([[1.0, 0.5], [0.5, 4.0]]), 1e-6)
    >>> found.order.tolist(), (found.upper.T @ found.upper @ torch.tensor([[4.0, 0.5], [0.5, 1.0]])).round(decimals=4)
    ([1, 0], tensor([[1., 0.],
            [0., 1.]]))
    """
    diagonal = moments.diagonal()
    mean = float(diagonal.mean())
    if not 0 < mean < float("inf"):
        raise ConfigurationError("the inputs of the layer are all zero or not finite: nothing tells its columns apart")
    order = diagonal.argsort(descending=True)
    turned = order.flip(0)  # H turned by half a turn has a lower triangular factor, which turned back is R
    damping = relative_damping
    while damping <= _MOST_DAMPING:
        matrix = moments[turned][:, turned].float()
        matrix.diagonal().add_(damping * mean)
        lower, info = torch.linalg.cholesky_ex(matrix)
        if not bool(info.any()):
            upper = torch.linalg.solve_triangular(lower, torch.eye(len(lower)), upper=False).flip(0, 1)
            importance = torch.empty(len(lower)).scatter_(0, turned, lower.diagonal().square())
            return InverseFactor(order, upper, importance)
        damping *= 10
    raise ConfigurationError("the second moments of the layer's inputs are far from positive definite")


def round_second_order(weight: Tensor, kind: BlockType, inverse: InverseFactor) -> tuple[Grid, Tensor]:
    """Rounds a weight (N, K) fp32. Its zeros, which may be those of pruning, stay where the grid has no offsets.

    Returns:
        The grid, and codes (N, K) int8.
    """
    grid = kind.fit(weight, inverse.importance)
    codes = [
        _round_rows(weight[i : i + _ROWS], grid.rows(slice(i, i + _ROWS)), inverse)
        for i in range(0, len(weight), _ROWS)
    ]
    return grid, torch.cat(codes)


def _round_rows(weight: Tensor, grid: Grid, inverse: InverseFactor) -> Tensor:
    left = weight.t()[inverse.order]  # (K, N): a column is contiguous
    scales = grid.scale.t().contiguous()
    inverses = torch.where(scales == 0, 0.0, 1 / scales)
    offsets = torch.zeros_like(scales) if grid.offset is None else grid.offset.t().contiguous()
    groups = (inverse.order // grid.group).tolist()
    upper, roots = inverse.upper, (1 / inverse.upper.diagonal()).tolist()
    kept = left != 0
    pruned = grid.offset is None and not bool(kept.all())
    codes = torch.empty(left.shape, dtype=torch.int8)
    errors = torch.empty(_TOGETHER, left.shape[1])
    for first in range(0, len(left), _TOGETHER):
        last = min(first + _TOGETHER, len(left))
        for k in range(first, last):
            group, error = groups[k], errors[k - first]
            code = left[k].add(offsets[group]).mul_(inverses[group]).round_().clamp_(grid.lowest, grid.highest)
            if pruned:
                code.mul_(kept[k])
            codes[k] = code
            torch.sub(left[k], code.mul_(scales[group]).sub_(offsets[group]), out=error).mul_(roots[k])
            left[k + 1 : last].addr_(upper[k, k + 1 : last], error, alpha=-1)
        left[last:].addmm_(upper[first:last, last:].t(), errors[: last - first], alpha=-1)
    return torch.empty_like(codes).index_copy_(0, inverse.order, codes).t().contiguous()
