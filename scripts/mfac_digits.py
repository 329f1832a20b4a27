"""Trains a small network with SGD, AdamW and M-FAC; prints who gets how far in how many steps.

    pip install scikit-learn mnist1d
    .venv/bin/python scripts/mfac_digits.py --seeds 5      (some four minutes)
    .venv/bin/python scripts/mfac_digits.py --seeds 5 --data mnist1d

Data are scikit-learn's digits, or MNIST-1D. A network of 64-64-32-10 units (40-64-32-10 for MNIST-1D), batches of 64,
settings from a grid of each optimizer (those with the best mean of validation loss over the seeds count), constant over
the run. What is printed: the best validation loss of a run, the step at which it was reached, the first step at which
it is at least as low as AdamW's best of the same seed, and the time of a step.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import MFAC

EVERY = 10  # steps from one validation to the next

Make = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def optimizers(window: int) -> dict[str, list[tuple[str, Make]]]:
    """By name, the settings of the grid."""
    grid: dict[str, list[tuple[str, Make]]] = {"SGD with momentum": [], "AdamW": [], "M-FAC": []}
    for lr in (0.02, 0.05, 0.1, 0.2):
        grid["SGD with momentum"].append((f"lr {lr}", lambda p, lr=lr: torch.optim.SGD(p, lr=lr, momentum=0.9)))
    for lr in (1e-3, 3e-3, 1e-2, 3e-2):
        grid["AdamW"].append((f"lr {lr}", lambda p, lr=lr: torch.optim.AdamW(p, lr=lr)))
    for lr in (3e-3, 1e-2, 3e-2):
        for damping in (1e-3, 1e-2):
            for momentum in (0.0, 0.9):
                settings: dict[str, Any] = {"lr": lr, "damping": damping, "momentum": momentum, "window": window}
                name = f"lr {lr}, damping {damping}, momentum {momentum}"
                grid["M-FAC"].append((name, lambda p, s=settings: MFAC(p, **s)))
    return grid


def digits() -> tuple[Any, Any]:
    """8 x 8 images of digits."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return data.data / 16, data.target


def mnist1d() -> tuple[Any, Any]:
    """Ten shapes in one dimension, at random places and scales, with noise; made here, not fetched."""
    from mnist1d.data import get_dataset_args, make_dataset

    made = make_dataset(get_dataset_args())
    return made["x"], made["y"]


DATA: dict[str, Callable[[], tuple[Any, Any]]] = {
    "digits": functools.cache(digits),
    "mnist1d": functools.cache(mnist1d),
}


def split(name: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets to train with, and to validate with (a third)."""
    inputs, targets = DATA[name]()
    x, y = torch.tensor(inputs, dtype=torch.float32), torch.tensor(targets)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    kept = len(x) * 2 // 3
    return x[order[:kept]], y[order[:kept]], x[order[kept:]], y[order[kept:]]


def train(make: Make, data: str, seed: int, steps: int) -> tuple[list[float], float]:
    """Validation losses, every :data:`EVERY` steps, and seconds of a step of the optimizer alone."""
    x, y, held_x, held_y = split(data, seed)
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(x.shape[1], 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))
    optimizer, loss_fn = make(model.parameters()), nn.CrossEntropyLoss()
    losses, times = [], []
    generator = torch.Generator().manual_seed(seed)
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (64,), generator=generator)
        optimizer.zero_grad()
        loss_fn(model(x[batch]), y[batch]).backward()
        start = time.perf_counter()
        optimizer.step()
        times.append(time.perf_counter() - start)
        if step % EVERY == 0:
            with torch.no_grad():
                losses.append(float(loss_fn(model(held_x), held_y).nan_to_num(torch.inf)))
    return losses, statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), default="digits", help="mnist1d needs `pip install mnist1d`")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--window", type=int, default=256)
    arguments = parser.parse_args()
    runs: dict[str, tuple[str, list[list[float]], float]] = {}
    for name, settings in optimizers(arguments.window).items():
        tried = []
        for label, make in settings:
            found = [train(make, arguments.data, seed, arguments.steps) for seed in range(arguments.seeds)]
            losses = [run for run, _ in found]
            best = statistics.mean(map(min, losses))
            tried.append((best, label, losses, statistics.median(seconds for _, seconds in found)))
        _, label, losses, seconds = min(tried, key=lambda each: each[0])
        runs[name] = label, losses, seconds
    targets = [min(run) for run in runs["AdamW"][1]]
    print(f"{arguments.seeds} seeds, {arguments.steps} steps, a window of {arguments.window}")
    print("| optimizer | settings | best loss | at step | AdamW's best reached at step | ms of a step |")
    print("|---|---|---|---|---|---|")
    for name, (label, losses, seconds) in runs.items():
        best = [min(run) for run in losses]
        at = [EVERY * (run.index(min(run)) + 1) for run in losses]
        reached = []
        for run, target in zip(losses, targets, strict=True):
            first = next((EVERY * (i + 1) for i, loss in enumerate(run) if loss <= target), None)
            reached.append("never" if first is None else str(first))
        print(
            f"| {name} | {label} | {statistics.mean(best):.4f} | {statistics.median(at):.0f} | {', '.join(reached)} "
            f"| {seconds * 1e3:.2f} |"
        )


if __name__ == "__main__":
    main()
