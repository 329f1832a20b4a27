"""How much of a Fisher product depends on how many processes sum it up, by the condition of K.

``torchrun --nproc-per-node 3 -m gossamer.distributed.fisher.condition`` prints the table of
docs/explanation/distributed-fisher.md. Sums over several processes round in another order than those of one. What
becomes of that is up to ``K = m lambda I + G G^T``: a relative change e of K, as large as rounding, changes ``K^-1 w``
by up to e cond(K). The gradients here are correlated as those of consecutive steps are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.distributed.fisher.group import Group
from gossamer.operators.gradient_store import GradientStore
from gossamer.operators.inverse_fisher import InverseFisher
from gossamer.operators.ranks import Ranks, own_columns
from gossamer.operators.sliding_fisher import SlidingFisher

_M, _D = 48, 10_007
# noise of the gradients relative to what they have in common, and damping: from a benign K to a hopeless one
_CASES = ((1e-2, 1e4), (1e-2, 1e2), (1e-2, 1e1), (1e-2, 1e0), (1e-2, 1e-2), (1e-3, 1e-4), (1e-4, 1e-6), (1e-5, 1e-8))


@dataclass(frozen=True)
class Row:
    """Relative differences to one process.

    Attributes:
        condition: of K.
        product: of ``F^-1 x``.
        span: of ``F^-1 g`` for the newest gradient g, from its weights in the span, in fp64.
        gram: of ``G G^T``.
    """

    condition: float
    product: float
    span: float
    gram: float


def correlated_gradients(m: int, d: int, noise: float, seed: int = 0) -> Tensor:
    """(m, d) fp32: a slow drift in three directions, and noise."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.randn(m, 3, generator=generator).cumsum(0) @ torch.randn(3, d, generator=generator)
    return drift + noise * torch.randn(m, d, generator=generator)


def measure(ranks: Ranks, seed: int = 0) -> Iterator[Row]:
    """A row for each case; the whole matrix is computed by each process, and compared in all its columns."""
    x = torch.randn(_D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))
    columns = own_columns(_D, ranks.rank, ranks.size)
    for noise, damping in _CASES:
        gradients = correlated_gradients(_M, _D, noise, seed)
        own = gradients[:, columns].contiguous()
        one, several = GradientStore.of(gradients), GradientStore.of(own, ranks)
        whole, cut = InverseFisher(one, damping), InverseFisher(several, damping)
        window = SlidingFisher([own.shape[1:]], _M, damping, ranks=ranks)
        for part in own:
            window.push([part])
        k = one.gram() + _M * damping * torch.eye(_M, dtype=torch.float64)
        newest = torch.eye(_M, dtype=torch.float64)[:, -1:]
        expected = _M * torch.cholesky_solve(newest, torch.linalg.cholesky(k))[:, 0]
        yield Row(
            float(torch.linalg.cond(k)),
            _difference(ranks, cut @ x[columns], (whole @ x)[columns]),
            _difference(ranks, own.double().T @ window.solve(), own.double().T @ expected),
            float((window.gram - one.gram()).norm() / one.gram().norm()),
        )


def _difference(ranks: Ranks, found: Tensor, expected: Tensor) -> float:
    squares = ranks.add(torch.stack([(found - expected).square().sum(), expected.square().sum()]))
    return float((squares[0] / squares[1]).sqrt())


def main() -> None:
    dist.init_process_group("gloo")
    group = Group()
    rows = list(measure(group))
    if group.rank == 0:
        print(f"{group.size} processes against one, {_M} gradients of {_D:,} numbers, relative differences")
        print("| cond(K) | F⁻¹x | span product | G Gᵀ |")
        print("|---|---|---|---|")
        for row in rows:
            print(f"| {row.condition:.0e} | {row.product:.0e} | {row.span:.0e} | {row.gram:.0e} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
