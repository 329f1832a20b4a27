"""Kernel density estimation, exact and approximate, beside scikit-learn.

    .venv/bin/python examples/kernel_density.py      (--help for sizes; pip install scikit-learn to compare)

The density at a query is the sum of its row of K, over the number of points and the kernel's volume. With a column for
each class, one product gives the densities of all classes: on scikit-learn's digits they tell the digit, exactly, as
small products are. On many points of a rolled-up surface, where some error is allowed, low densities are to tell which
queries do not belong to it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain

import torch
from kernel_regression import FEW, HAS_SKLEARN, NO_SKLEARN, Result, arguments, products, scikit, swiss_roll, timed
from torch import Tensor

from gossamer import GaussianKernel

STRAY = 0.01  # share of the queries that are not on the surface


def log_volume(dimensions: int, bandwidth: float) -> float:
    """Of exp(-|x|^2 / 2 bandwidth^2), as a logarithm: in many dimensions it would overflow or vanish."""
    return dimensions * math.log(math.sqrt(2 * math.pi) * bandwidth)


def digits() -> None:
    """1,797 images of 8 x 8: the class of the highest density. The bandwidth is the best if each is left out."""
    points, labels = map(torch.from_numpy, scikit("datasets").load_digits(return_X_y=True))
    test, train = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tensor_split([600])
    own, queries, x = points[train], points[test], torch.nn.functional.one_hot(labels[train]).double()
    others = {h: GaussianKernel(own, own, h) @ x - x for h in (2.0, 3.0, 4.0, 6.0, 8.0)}  # one's own weight is 1
    best = max(others, key=lambda h: int((others[h].argmax(1) == labels[train]).sum()))
    (y, report), seconds = timed(lambda: GaussianKernel(queries, own, best).matvec(x, eps=0.1))
    found = (y / x.sum(0)).log() - log_volume(64, best)

    def class_by_class(leaf: int) -> Tensor:
        parts = [own[labels[train] == digit].numpy() for digit in range(10)]
        trees = [scikit("neighbors").KernelDensity(bandwidth=best, leaf_size=leaf).fit(part) for part in parts]
        return torch.stack([torch.from_numpy(tree.score_samples(queries.numpy())) for tree in trees], 1)

    right = int((found.argmax(1) == labels[test]).sum())
    print(f"Digits: {right} of {len(test)} told right from {len(train)}; {report.mode} in {1e3 * seconds:.0f} ms.")
    for leaf in (40, len(train)):  # scikit-learn's default, and a tree that is one leaf
        expected, seconds = timed(partial(class_by_class, leaf))
        same, off = int((found.argmax(1) == expected.argmax(1)).sum()), float((found - expected).abs().max())
        print(f"KernelDensity(leaf_size={leaf}) tells {same} alike, in {1e3 * seconds:.0f} ms;", end=" ")
        print(f"log densities are {off:.1g} apart at most.")
    print()


def trees(queries: Tensor, keys: Tensor, x: Tensor, bandwidth: float) -> Iterator[Result]:
    """scikit-learn's, which bound the relative error of every query."""
    scale = math.log(len(keys)) + log_volume(keys.shape[1], bandwidth)
    for tolerance, count in ((0.0, FEW // 10), (0.01, FEW)):
        few = queries[:count]
        method = scikit("neighbors").KernelDensity(bandwidth=bandwidth, rtol=tolerance)
        _, before = timed(partial(method.fit, keys.numpy()))
        score, seconds = timed(partial(method.score_samples, few.numpy()))
        times, y = len(queries) / len(few), (torch.from_numpy(score) + scale).exp().to(x)
        name = f"KernelDensity, rtol {tolerance:g}, {times:g} x that of {len(few):,}"
        yield name, before + times * seconds, y, GaussianKernel(few, keys, bandwidth) @ x


def surface(args: argparse.Namespace) -> None:
    keys, _ = swiss_roll(args.train, args.dimensions, seed=2)
    queries, _ = swiss_roll(args.queries, args.dimensions, seed=3)
    generator = torch.Generator().manual_seed(4)
    stray = torch.rand(len(queries), generator=generator) < STRAY
    queries[stray] += queries.std() * torch.randn(int(stray.sum()), args.dimensions, generator=generator)
    x = torch.ones(len(keys))
    print(f"{len(keys):,} points, {len(queries):,} queries, {args.dimensions} dimensions, bandwidth {args.bandwidth}")
    print(f"{'':46}{'seconds':>10}{'K x off by':>12}{'a query by':>12}{'at most':>12}{'strays told':>13}")
    more = trees(queries, keys, x, args.bandwidth) if HAS_SKLEARN else ()
    for name, seconds, y, exact in chain(products(queries, keys, x, args), more):
        away = stray[: len(y)]
        error, each = (y - exact).norm() / exact.norm(), ((y - exact).abs() / exact)[~away]
        told = away[y.argsort()[: int(away.sum())]].double().mean()
        shares = f"{100 * error:10.2g} %{100 * each.median():10.2g} %{100 * each.max():10.2g} %{100 * told:11.1f} %"
        print(f"{name:46}{seconds:10.2f}{shares}")
    print(
        "A query: the median and the largest error of those on the surface. Strays told: the share of strays among as"
    )
    print("many lowest densities. Seconds vary from run to run, and with what else the machine does.")


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    digits() if HAS_SKLEARN else print(NO_SKLEARN)
    surface(args)


if __name__ == "__main__":
    main()
