"""What a change of one weight costs, as a quadratic form, and the best change under a mask.

Near weights w, the loss grows by about ``1/2 s^T F s`` for a step s. Curvatures differ in what they take for F:

    Diagonal        F = diag(d)                        magnitude, Wanda, diagonal Fisher
    SharedGram      F = H for each row of W alike      the Hessian of a layer's output error, H = X^T X / T + damping
    FisherForm      F = lambda I + G^T G / m           blocks of it, or all of it with few gradients
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.inverse_fisher import InverseFisher
from gossamer.pruning.patterns import Pattern, subset_costs
from gossamer.pruning.search import search_mask

_GROUP_BYTES = 128 << 20  # of the systems that are solved at a time
_RESIDUAL = 1e-5  # of conjugate gradients, relative
_MOST_STEPS = 100
_DRIFT = 4  # a true residual may be so many times the one that is carried along


class Quadratic(Protocol):
    """A quadratic form over a weight (N, K)."""

    def inverse_blocks(self, size: int) -> Tensor:
        """Squares along the diagonal of F^-1, of ``size`` weights of a row: (N or 1, K / size, size, size)."""

    def choose(self, weight: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
        """A mask (N, K), True is kept, for a pattern whose weights compete within this one."""

    def independent(self, weight: Tensor, keep: Tensor) -> Tensor:
        """The pruned weight if each pruned entry is made up for as if it were the only one (N, K)."""

    def joint(self, weight: Tensor, keep: Tensor) -> Tensor:
        """The pruned weight of least cost under the mask ``keep`` (N, K) bool."""

    def cost(self, step: Tensor) -> float:
        """``1/2 s^T F s`` for a step (N, K)."""


class _ByCost:
    """Chooses what is cheapest for itself."""

    def choose(self: Quadratic, weight: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
        costs = subset_costs(weight, self.inverse_blocks(pattern.size), pattern)
        return pattern.keep({"": costs}, sparsity)[""]


class Diagonal(_ByCost):
    """F is diagonal: there is nothing to make up for.

    Args:
        diagonal: (N, K), or (1, K) or (1, 1) where rows or all entries are alike; above 0.
        shape: (N, K).
    """

    def __init__(self, diagonal: Tensor, shape: tuple[int, int]) -> None:
        self.diagonal = diagonal.expand(len(diagonal), shape[1])

    def inverse_blocks(self, size: int) -> Tensor:
        inverse = 1 / self.diagonal
        return torch.diag_embed(inverse.reshape(len(inverse), -1, size))

    def independent(self, weight: Tensor, keep: Tensor) -> Tensor:
        return weight * keep

    joint = independent

    def cost(self, step: Tensor) -> float:
        return float((step.square() * self.diagonal).sum(dtype=torch.float64)) / 2


class SharedGram(_ByCost):
    """F is H for each row.

    Args:
        matrix: H (K, K), positive definite.
        rounds: of the search for a mask; without them weights are chosen by their costs.
    """

    def __init__(self, matrix: Tensor, rounds: int = 0) -> None:
        self.matrix, self.rounds = matrix.to(torch.float64), rounds
        factor, info = torch.linalg.cholesky_ex(self.matrix)
        if bool(info.any()):
            raise ConfigurationError("the inputs' second moments are not positive definite: use more damping")
        self.inverse = torch.cholesky_inverse(factor)

    def inverse_blocks(self, size: int) -> Tensor:
        columns = len(self.inverse)
        cut = self.inverse.reshape(columns // size, size, columns // size, size)
        return cut.diagonal(dim1=0, dim2=2).movedim(-1, 0)[None]

    def choose(self, weight: Tensor, pattern: Pattern, sparsity: float) -> Tensor:
        if self.rounds:
            return search_mask(self.matrix, weight, pattern, sparsity, self.rounds)
        return super().choose(weight, pattern, sparsity)

    def independent(self, weight: Tensor, keep: Tensor) -> Tensor:
        lost = weight.to(torch.float64) * ~keep / self.inverse.diagonal()
        return ((weight - lost @ self.inverse) * keep).to(weight.dtype)

    def joint(self, weight: Tensor, keep: Tensor) -> Tensor:
        """Row by row ``H_KK x_K = (H w)_K``: least squares of the layer's output on the columns that are kept.

        All rows together by conjugate gradients, as products of whole matrices; the inverse that is there, restricted
        to the columns that are kept, is the preconditioner. Rows that do not get there are solved one by
        one.
        """
        out, residual = self._conjugate_gradients(weight, keep)
        if bool((left := ~(residual <= _RESIDUAL)).any()):
            out[left] = self._one_by_one(weight[left], keep[left])
        return out

    def _conjugate_gradients(self, weight: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """The solution (N, K), and the norm of each row's residual relative to that of its right side (N)."""
        scale = self.matrix.diagonal().rsqrt()
        matrix = (self.matrix * scale * scale[:, None]).float()
        inverse = (self.inverse / scale / scale[:, None]).float()
        start = weight.float() / scale.float()
        x, inside = start * keep, keep.float()
        right = (start @ matrix) * inside
        size = right.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        rest = right - (x @ matrix) * inside
        conditioned = (rest @ inverse) * inside
        direction = conditioned.clone()
        energy = (rest * conditioned).sum(1, keepdim=True)
        tiny = torch.finfo(torch.float32).tiny
        for _ in range(_MOST_STEPS):
            if bool((rest.norm(dim=1) <= _RESIDUAL * size).all()):
                break
            image = (direction @ matrix) * inside
            length = energy / (direction * image).sum(1, keepdim=True).clamp_min(tiny)
            x += length * direction
            rest -= length * image
            conditioned = (rest @ inverse) * inside
            before, energy = energy, (rest * conditioned).sum(1, keepdim=True)
            direction.mul_(energy / before.clamp_min(tiny)).add_(conditioned)
        true = (right - (x @ matrix) * inside).norm(dim=1) / size  # rounding adds up in what was carried along
        return (x * scale.float()).to(weight.dtype), true / _DRIFT

    def _one_by_one(self, weight: Tensor, keep: Tensor) -> Tensor:
        wanted = weight.to(torch.float64) @ self.matrix
        counts = keep.sum(1)
        order = counts.argsort(descending=True)
        out = torch.zeros_like(weight)
        first = 0
        while first < len(order) and (width := int(counts[order[first]])):
            rows = order[first : first + max(1, _GROUP_BYTES // (8 * width**2))]
            # the columns that are kept, and behind them others, where a row keeps fewer than the first one does
            columns = keep[rows].to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :width]
            inside = keep[rows].gather(1, columns)
            system = self.matrix[columns[:, :, None], columns[:, None, :]]
            system *= inside[:, :, None] & inside[:, None, :]
            system.diagonal(dim1=1, dim2=2).add_((~inside).to(torch.float64))
            right = (wanted[rows].gather(1, columns) * inside)[..., None]
            found = torch.cholesky_solve(right, torch.linalg.cholesky(system))[..., 0]
            out[rows] = torch.zeros_like(weight[rows]).scatter_(1, columns, found.to(weight.dtype))
            first += len(rows)
        return out

    def cost(self, step: Tensor) -> float:
        wide = step.to(torch.float64)
        return float((wide @ self.matrix * wide).sum()) / 2


class FisherForm(_ByCost):
    """F is the damped Fisher matrix of a weight (N, K), its parameters row by row; or blocks of it."""

    def __init__(self, inverse: InverseFisher, shape: tuple[int, int]) -> None:
        self.inverse, self.shape = inverse, shape

    def inverse_blocks(self, size: int) -> Tensor:
        if size == 1:
            return self.inverse.diag().reshape(*self.shape, 1, 1)
        return self.inverse.diagonal_blocks(size).reshape(self.shape[0], -1, size, size)

    def independent(self, weight: Tensor, keep: Tensor) -> Tensor:
        lost = weight.reshape(-1).double() * ~keep.reshape(-1) / self.inverse.diag()
        return ((weight - self.inverse.mv(lost).reshape(self.shape)) * keep).to(weight.dtype)

    def joint(self, weight: Tensor, keep: Tensor) -> Tensor:
        step = self.inverse.joint_step(weight.reshape(-1).double(), keep.reshape(-1))
        return (weight + step.reshape(self.shape)).to(weight.dtype) * keep

    def cost(self, step: Tensor) -> float:
        return self.inverse.curvature(step.reshape(-1)) / 2
