"""Nadaraya-Watson regression with Gaussian kernels, exact and approximate, beside scikit-learn.

    .venv/bin/python examples/kernel_regression.py      (--help for sizes; pip install scikit-learn to compare)

A prediction is the mean of all targets, weighted by the kernel: of one product K [targets, 1], the first column divided
by the second. Targets are centred, so that they are signed. On scikit-learn's diabetes data the product is exact, as
small ones are. On many points of a rolled-up surface some error is allowed.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gossamer import GaussianKernel

HAS_SKLEARN = importlib.util.find_spec("sklearn") is not None
NO_SKLEARN = "scikit-learn is not installed; without its data and methods (pip install scikit-learn for them):"
FEW = 1000  # queries for methods that would take minutes for all

Result = tuple[str, float, Tensor, Tensor]  # method, seconds, its K x, and the exact one, of all or the first queries


def swiss_roll(n: int, dimensions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points of a rolled-up surface with a little noise in all dimensions, and a smooth function of where they lie."""
    generator = torch.Generator().manual_seed(seed)
    turn, height = math.pi * (1.5 + 3 * torch.rand(n, generator=generator)), torch.rand(n, generator=generator)
    roll = torch.stack([turn * turn.cos() / 5, 4 * height, turn * turn.sin() / 5], 1)
    tilt = torch.linalg.qr(torch.randn(dimensions, 3, generator=torch.Generator().manual_seed(1)))[0]
    return roll @ tilt.T + 0.02 * torch.randn(n, dimensions, generator=generator), turn.sin() * (5 * height).cos()


def timed(function: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return function(), time.perf_counter() - start


def scikit(module: str) -> Any:
    return importlib.import_module(f"sklearn.{module}")


def eps_for(relative: float, queries: Tensor, keys: Tensor, bandwidth: float, x: Tensor) -> float:
    """eps for a relative error: eps is in units of |x|, and some queries tell how large the product is beside it."""
    some = queries[torch.randperm(len(queries), generator=torch.Generator().manual_seed(0))[:256]]
    square = (GaussianKernel(some, keys, bandwidth) @ x).square().sum() * len(queries) / len(some)
    return relative * float(square.sqrt() / x.norm())


def products(queries: Tensor, keys: Tensor, x: Tensor, args: argparse.Namespace) -> Iterator[Result]:
    """K x by one method after the other. scikit-learn's feature maps get twice as many components until they take as
    long as the approximate product."""
    width, gamma = args.bandwidth, 0.5 / args.bandwidth**2
    exact, seconds = timed(lambda: GaussianKernel(queries, keys, width) @ x)
    yield "exact", seconds, exact, exact
    eps, before = timed(lambda: eps_for(args.relative, queries, keys, width, x))
    kernel = GaussianKernel(queries, keys, width)
    (y, report), limit = timed(lambda: kernel.matvec(x, eps))
    yield f"eps {eps:.3g}: {report.mode}, {100 * report.entries:.0f} % of K", before + limit, y, exact
    (y, report), seconds = timed(lambda: kernel.matvec(x, eps, seed=1))
    yield f"  once more with this kernel: {100 * report.entries:.1f} %", seconds, y, exact
    if not HAS_SKLEARN:
        return
    few, times = queries[:FEW], len(queries) / len(queries[:FEW])
    rbf_kernel = partial(scikit("metrics.pairwise").rbf_kernel, Y=keys.numpy(), gamma=gamma)
    pieces = [part.numpy() for part in few.split(100)]  # faster than all at once, which caches do not hold
    y, seconds = timed(lambda: torch.cat([torch.from_numpy(rbf_kernel(piece)).to(x) @ x for piece in pieces]))
    yield f"rbf_kernel, {times:g} x the seconds of {len(few):,}", times * seconds, y, exact[: len(y)]
    for name in ("Nystroem", "RBFSampler"):
        components, seconds = 64, 0.0
        while seconds < before + limit and 2 * components <= len(keys):
            components *= 2
            method = getattr(scikit("kernel_approximation"), name)(gamma=gamma, n_components=components, random_state=0)
            y, seconds = timed(partial(feature_product, method, queries, keys, x))
        yield f"{name}, {components:,} components", seconds, y, exact


def feature_product(method: Any, queries: Tensor, keys: Tensor, x: Tensor) -> Tensor:
    of_keys = torch.from_numpy(method.fit_transform(keys.numpy())).to(x)
    return torch.from_numpy(method.transform(queries.numpy())).to(x) @ (of_keys.T @ x)


def columns(targets: Tensor) -> Tensor:
    return torch.stack([targets - targets.mean(), torch.ones_like(targets)], 1)


def predictions(product: Tensor, targets: Tensor) -> Tensor:
    """From K times their columns. A mean is within the targets' range: an approximate one that is not, is put there."""
    centred = torch.where(product[:, 1] > 0, product[:, 0] / product[:, 1], 0)
    return (centred + targets.mean()).clamp(targets.min(), targets.max())


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def diabetes() -> None:
    """442 patients, ten measurements each: the disease after a year. The bandwidth is the best if each is left out."""
    points, targets = map(torch.from_numpy, scikit("datasets").load_diabetes(return_X_y=True))
    test, train = torch.randperm(len(points), generator=torch.Generator().manual_seed(0)).tensor_split([100])
    own, queries, known, x = points[train], points[test], targets[train], columns(targets[train])
    others = {h: GaussianKernel(own, own, h) @ x - x for h in (0.02, 0.03, 0.04, 0.06, 0.08)}  # one's own weight is 1
    best = min(others, key=lambda h: rms(predictions(others[h], known) - known))
    (y, report), seconds = timed(lambda: GaussianKernel(queries, own, best).matvec(x, eps=0.1))
    dense = torch.from_numpy(scikit("metrics.pairwise").rbf_kernel(queries, own, gamma=0.5 / best**2)) @ x
    found, off = predictions(y, known), float((predictions(y, known) - predictions(dense, known)).abs().max())
    error, of_mean = rms(found - targets[test]), rms(known.mean() - targets[test])
    print(f"Diabetes: {len(test)} patients predicted from {len(train)}, to {error:.1f} (by their mean: {of_mean:.1f}).")
    print(f"{report.mode} in {1e3 * seconds:.1f} ms; at most {off:.1g} from predictions with rbf_kernel.\n")


def surface(args: argparse.Namespace) -> None:
    keys, smooth = swiss_roll(args.train, args.dimensions, seed=2)
    queries, truth = swiss_roll(args.queries, args.dimensions, seed=3)
    targets = smooth + 0.3 * torch.randn(len(smooth), generator=torch.Generator().manual_seed(4))
    print(f"{len(keys):,} targets, {len(queries):,} queries, {args.dimensions} dimensions, bandwidth {args.bandwidth}")
    print(f"{'':46}{'seconds':>10}{'K x off by':>12}{'predictions by':>20}{'from the truth':>16}")
    for name, seconds, y, exact in products(queries, keys, columns(targets), args):
        found, error = predictions(y, targets), float((y - exact).norm() / exact.norm())
        off, from_truth = rms(found - predictions(exact, targets)), rms(found - truth[: len(y)])
        print(f"{name:46}{seconds:10.2f}{100 * error:10.2g} %{off:20.4f}{from_truth:16.4f}")
    print("Seconds vary from run to run, and with what else the machine does.")


def arguments(description: str | None, argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=100_000, help="points that are known")
    parser.add_argument("--queries", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=16, help="3 at least")
    parser.add_argument("--bandwidth", type=float, default=0.1)
    parser.add_argument("--relative", type=float, default=0.02, help="error that is allowed, as a share of the product")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(__doc__, argv)
    diabetes() if HAS_SKLEARN else print(NO_SKLEARN)
    surface(args)


if __name__ == "__main__":
    main()
