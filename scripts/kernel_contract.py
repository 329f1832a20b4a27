"""Checks the contract of approximate kernel products: |Kx - y| <= eps |x|, and what the report says of the error.

    .venv/bin/python scripts/kernel_contract.py --seeds 200
    .venv/bin/python scripts/kernel_contract.py --families manifold --confidence chebyshev --backend lsh

Every run draws points, x and everything else anew, and compares with the product in fp64. A table tells for each family
and eps: in how many runs the error was at most eps, the largest error over eps, how many products were sampled and not
exact, and how far the reported error was from the true one where that exceeded eps / 4. For the attention of real heads
there is ``scripts/kernel_attention.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.bench.point_sets import clustered, dense, gaussian, manifold
from gossamer.operators.gaussian.kernel import GaussianKernel
from gossamer.ops.gaussian import UNIT, Queries, entries

D = 64
Problem = tuple[Tensor, Tensor, float, Tensor]  # queries, keys, bandwidth, x


def signed(n: int, generator: torch.Generator) -> Tensor:
    return torch.randn(n, generator=generator)


def near_duplicates(n: int, generator: torch.Generator) -> Problem:
    """Every key has a twin, and x is opposite on the two: almost in the null space."""
    half, bandwidth = clustered(n // 2, D, generator)
    points = torch.cat([half, half + 1e-4 * torch.randn(n // 2, D, generator=generator)])
    x = signed(n // 2, generator)
    return points, points, bandwidth, torch.cat([x, -x])


def giant_coordinate(n: int, generator: torch.Generator) -> Problem:
    points, bandwidth = manifold(n, D, generator)
    x = signed(n, generator)
    x[int(torch.randint(n, (1,), generator=generator))] = 100.0 * n**0.5
    return points, points, bandwidth, x


def full_row(n: int, generator: torch.Generator) -> Problem:
    """Keys close together, one query among them, and all others far away."""
    keys = 0.02 * torch.randn(n, D, generator=generator)
    queries = 5.0 * torch.randn(n, D, generator=generator)
    queries[int(torch.randint(n, (1,), generator=generator))] = 0.0
    return queries, keys, 1.0, torch.ones(n)


def of_points(make: Callable[[int, int, torch.Generator], tuple[Tensor, float]]) -> Callable[..., Problem]:
    def problem(n: int, generator: torch.Generator) -> Problem:
        points, bandwidth = make(n, D, generator)
        return points, points, bandwidth, signed(n, generator)

    return problem


FAMILIES: dict[str, Callable[[int, torch.Generator], Problem]] = {
    "clustered": of_points(clustered),
    "manifold": of_points(manifold),
    "gaussian": of_points(gaussian),
    "near duplicates": near_duplicates,
    "giant coordinate": giant_coordinate,
    "full row": full_row,
    "dense": of_points(dense),
}


def exact(kernel: GaussianKernel, queries: Tensor, keys: Tensor, x: Tensor) -> Tensor:
    """In fp64, by an independent way: norms and products of centred points."""
    scale, centre = UNIT / kernel.bandwidth, keys.double().mean(0)
    q, k = (queries.double() - centre) * scale, (keys.double() - centre) * scale
    return entries(Queries.together(2 * q, -q.square().sum(1)), k).mul_(torch.exp2(-k.square().sum(1))) @ x.double()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--eps", nargs="+", type=float, default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--backend", default="ivf")
    parser.add_argument("--confidence", default="default")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each run")
    arguments = parser.parse_args()
    print(f"n = {arguments.n}, d = {D}, {arguments.seeds} seeds, {arguments.backend}, {arguments.confidence}")
    print(f"{'family':18}{'eps':>6}{'kept':>12}{'worst':>8}{'sampled':>9}{'reported / true, worst':>26}{'entries':>9}")
    for family in arguments.families:
        runs: dict[float, list[tuple[float, str, float, float]]] = {eps: [] for eps in arguments.eps}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            queries, keys, bandwidth, x = FAMILIES[family](arguments.n, torch.Generator().manual_seed(seed))
            kernel = GaussianKernel(queries, keys, bandwidth, arguments.backend, seed)
            kernel.build_index()
            truth = exact(kernel, queries, keys, x)
            for eps in arguments.eps:
                y, report = kernel.matvec(x, eps, arguments.confidence)
                error = float((y.double() - truth).norm() / x.double().norm())
                runs[eps].append((error, report.mode, report.error, report.entries))
                if arguments.json:
                    print(json.dumps({"family": family, "seed": seed, "true": error} | report.to_dict()), flush=True)
        for eps, found in runs.items():
            kept = sum(error <= eps for error, *_ in found)
            ratios = [said / true for true, mode, said, _ in found if mode == "sampled" and true > eps / 4]
            extremes = f"{min(ratios):.2f} .. {max(ratios):.2f} ({len(ratios)})" if ratios else "-"
            sampled = sum(mode == "sampled" for _, mode, *_ in found)
            share = sum(entry for *_, entry in found) / len(found)
            worst = max(error for error, *_ in found) / eps
            print(
                f"{family:18}{eps:6g}{kept:>6}/{len(found):<5}{worst:8.3f}{sampled:9}{extremes:>26}{share:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
