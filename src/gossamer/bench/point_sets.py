"""Points to multiply kernel matrices of: some sparse, as the theory of fast kernel products assumes, and some not."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_CLUSTER = 64  # points of a cluster, on average


def clustered(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Clusters of some 64 points each, whose edges overlap a little; their number grows with n."""
    count = max(1, n // _CLUSTER)
    centres = 0.42 * torch.randn(count, d, generator=generator)
    own = torch.randint(count, (n,), generator=generator)
    return centres[own] + 0.18 * torch.randn(n, d, generator=generator), (d / 64) ** 0.5


def manifold(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """A curved surface of six dimensions; the bandwidth falls with n, as in density estimation."""
    flat = 3.2 * torch.randn(n, min(6, d), generator=generator)
    basis = torch.linalg.qr(torch.randn(d, min(12, d), generator=generator)).Q
    curved = torch.cat([flat, 0.5 * torch.sin(flat)], 1)[:, : basis.shape[1]]
    return curved @ basis.T, 1.2 * (8192 / n) ** (1 / 6)


def gaussian(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Independent normal points, all far from each other: K is nearly the identity."""
    return torch.randn(n, d, generator=generator), 1.0


def dense(n: int, d: int, generator: torch.Generator) -> tuple[Tensor, float]:
    """Normal points under a bandwidth that makes every entry of K matter."""
    return torch.randn(n, d, generator=generator), 2.0 * d**0.5


POINT_SETS: dict[str, Callable[[int, int, torch.Generator], tuple[Tensor, float]]] = {
    "clustered": clustered,
    "manifold": manifold,
    "gaussian": gaussian,
    "dense": dense,
}
