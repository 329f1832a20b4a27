"""Looks for a mask under which a layer's output can be kept best: masks and weights found together.

The cost of a mask is that of the best weights under it, which no sum over single weights tells. Instead of it, minimize
``1/2 tr (Z - W) H (Z - W)^T`` over Z = D, with D in the pattern, by the alternating direction method of multipliers, as
ALPS does (Meng et al. 2024, arXiv 2406.07831), in units in which H has a diagonal of ones:

    Z = (W H - V + rho D) (H + rho I)^-1          the weights, close to D
    D = what the pattern keeps of Z + V / rho     the largest entries
    V = V + rho (Z - D)

With H = Q diag(l) Q^T known, a round is two products with Q, whatever rho is. rho grows, and the mask settles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.pruning.patterns import Pattern, alike_costs

_FIRST_PENALTY = 0.1
_LAST_PENALTY = 6.0


def search_mask(matrix: Tensor, weight: Tensor, pattern: Pattern, sparsity: float, rounds: int) -> Tensor:
    """A mask (N, K) bool.

    Args:
        matrix: H (K, K) fp64, positive definite.
        weight: W (N, K). Its zeros are the first to be pruned.
        pattern: whose weights compete within W.
        sparsity: share of zeros.
        rounds: of the search.
    """
    scale = matrix.diagonal().rsqrt()
    values, vectors = torch.linalg.eigh(matrix * scale * scale[:, None])
    eigenvalues, basis = values.clamp_min(0).float(), vectors.float()
    start = weight.float() / scale.float()
    wanted = (start @ basis) * eigenvalues  # W H, in the basis
    inside, multipliers = start, torch.zeros_like(start)
    keep = torch.ones_like(start, dtype=torch.bool)
    for number in range(rounds):
        penalty = _FIRST_PENALTY * (_LAST_PENALTY / _FIRST_PENALTY) ** (number / max(rounds - 1, 1))
        right = wanted + (penalty * inside - multipliers) @ basis
        free = (right / (eigenvalues + penalty)) @ basis.T
        shifted = (free + multipliers / penalty) * (weight != 0)
        keep = pattern.keep({"": alike_costs(shifted, pattern)}, sparsity)[""]
        inside = shifted * keep
        multipliers += penalty * (free - inside)
    return keep
