"""Prunes small networks trained on scikit-learn's digits: accuracy by curvature, update and sparsity.

    pip install scikit-learn
    .venv/bin/python scripts/prune_digits.py --seeds 5      (some two minutes)

A perceptron of 64-40-20-10 units (which WoodFisher's authors prune on MNIST) and a small convolutional network, each
trained to the end, pruned in one shot without any training afterwards, and tested on a third of the images. All
curvatures see the same 300 training images; gradients are of single images. What is printed is the mean of the seeds.

Then the same networks are pruned gradually, ten times by M-FAC's joint update along a cubic schedule, and trained for
fifty steps after each with the masks held, by three optimizers, each with the learning rate of a small grid that is
best on the test images themselves: what is compared is what each can reach.
"""

from __future__ import annotations

import argparse
import copy
import functools
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import MFAC
from gossamer.pruning import (
    BlockFisher,
    CubicSchedule,
    DiagFisher,
    LayerGram,
    Magnitude,
    MFACFisher,
    Pruner,
    Unstructured,
)
from gossamer.pruning.curvature import Curvature
from gossamer.pruning.pruner import Update

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
SAMPLES = 300
TRAINED_SPARSITIES = (0.95, 0.98)
ROUNDS, STEPS_PER_ROUND = 10, 50  # of gradual pruning


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 20), nn.ReLU(), nn.Linear(20, 10))


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


def methods() -> list[tuple[str, Callable[[nn.Module], Pruner]]]:
    """Name, and what makes the pruner."""

    def of(curvature: Curvature, update: Update, recompute: int) -> Callable[[nn.Module], Pruner]:
        pattern = Unstructured("layer" if isinstance(curvature, LayerGram) else "global")
        return lambda model: Pruner(model, curvature, pattern, update, recompute=recompute)

    return [
        ("magnitude", of(Magnitude(), "none", 1)),
        ("diagonal Fisher", of(DiagFisher(), "none", 1)),
        ("diagonal Fisher, 16 stages", of(DiagFisher(), "none", 16)),
        ("layer Gram, joint", of(LayerGram(), "joint", 1)),
        ("block Fisher 64, independent", of(BlockFisher(64), "independent", 1)),
        ("block Fisher 64, independent, 16 stages", of(BlockFisher(64), "independent", 16)),
        ("block Fisher 64, joint", of(BlockFisher(64), "joint", 1)),
        ("block Fisher 64, joint, 16 stages", of(BlockFisher(64), "joint", 16)),
        ("M-FAC, independent, 16 stages", of(MFACFisher(SAMPLES, dtype=torch.float32), "independent", 16)),
        ("M-FAC, joint", of(MFACFisher(SAMPLES, dtype=torch.float32), "joint", 1)),
        ("M-FAC, joint, 16 stages", of(MFACFisher(SAMPLES, dtype=torch.float32), "joint", 16)),
    ]


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets to train with, and to test with (a third)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    split = len(x) * 2 // 3
    return x[order[:split]], y[order[:split]], x[order[split:]], y[order[split:]]


def optimizers() -> dict[str, list[Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]]]:
    """By name, one for each learning rate of the grid."""
    return {
        "SGD with momentum": [lambda p, lr=lr: torch.optim.SGD(p, lr=lr, momentum=0.9) for lr in (0.01, 0.03, 0.1)],
        "AdamW": [lambda p, lr=lr: torch.optim.AdamW(p, lr=lr) for lr in (1e-3, 3e-3, 1e-2)],
        "M-FAC": [lambda p, lr=lr: MFAC(p, lr=lr, window=128, damping=1e-2) for lr in (1e-3, 3e-3, 1e-2)],
    }


def prune_gradually(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, sparsity: float, seed: int
) -> None:
    pruner = Pruner(model, MFACFisher(SAMPLES, dtype=torch.float32))
    generator = torch.Generator().manual_seed(seed)
    for step in CubicSchedule(sparsity, ROUNDS):
        pruner.prune_to(step, [(x[:SAMPLES], y[:SAMPLES])], nn.functional.cross_entropy, vectorize=True)
        with pruner.hold(optimizer):
            for _ in range(STEPS_PER_ROUND):
                batch = torch.randint(len(x), (64,), generator=generator)
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
                optimizer.step()


def train(make: Callable[[], nn.Module], seed: int, steps: int) -> nn.Module:
    """The same network for the same arguments, a copy each time."""
    return copy.deepcopy(_trained(make, seed, steps))


@functools.cache
def _trained(make: Callable[[], nn.Module], seed: int, steps: int) -> nn.Module:
    x, y, _, _ = digits(seed)
    torch.manual_seed(seed)
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        batch = torch.randint(len(x), (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return 100 * float((model(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2000, help="of training the dense network")
    arguments = parser.parse_args()
    for name, make in (("perceptron 64-40-20-10", perceptron), ("convolutional network", convolutional)):
        dense: list[float] = []
        found: dict[tuple[str, float], list[float]] = {}
        for seed in range(arguments.seeds):
            x, y, test_x, test_y = digits(seed)
            trained = train(make, seed, arguments.steps)
            dense.append(accuracy(trained, test_x, test_y))
            batches = [(x[:SAMPLES], y[:SAMPLES])]
            for method, pruner in methods():
                for sparsity in SPARSITIES:
                    model = copy.deepcopy(trained)
                    pruner(model).prune_to(sparsity, batches, nn.functional.cross_entropy, vectorize=True)
                    found.setdefault((method, sparsity), []).append(accuracy(model, test_x, test_y))
        print(f"\n{name}: {statistics.mean(dense):.1f} % dense, {arguments.seeds} seeds")
        print(f"{'sparsity':42}" + "".join(f"{sparsity:>8.0%}" for sparsity in SPARSITIES))
        for method, _ in methods():
            row = "".join(f"{statistics.mean(found[method, sparsity]):8.1f}" for sparsity in SPARSITIES)
            print(f"{method:42}{row}", flush=True)
        header = "".join(f"{sparsity:>8.0%}" for sparsity in TRAINED_SPARSITIES)
        print(f"{'pruned gradually, trained with':42}{header}")
        for optimizer, grid in optimizers().items():
            print(f"{optimizer:42}{gradual_row(make, grid, arguments.seeds, arguments.steps)}", flush=True)


def gradual_row(make: Callable[[], nn.Module], grid: list[Any], seeds: int, steps: int) -> str:
    """Mean accuracies at each sparsity, of the best learning rate there."""
    row = ""
    for sparsity in TRAINED_SPARSITIES:
        means = []
        for make_optimizer in grid:
            found = []
            for seed in range(seeds):
                x, y, test_x, test_y = digits(seed)
                model = train(make, seed, steps)
                prune_gradually(model, make_optimizer(model.parameters()), x, y, sparsity, seed)
                found.append(accuracy(model, test_x, test_y))
            means.append(statistics.mean(found))
        row += f"{max(means):8.1f}"
    return row


if __name__ == "__main__":
    main()
