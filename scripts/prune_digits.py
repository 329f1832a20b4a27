"""Prunes small networks trained on scikit-learn's digits: accuracy by curvature, update and sparsity.

    pip install scikit-learn
    .venv/bin/python scripts/prune_digits.py --seeds 5      (some two minutes)

A perceptron of 64-40-20-10 units (which WoodFisher's authors prune on MNIST) and a small convolutional network, each
trained to the end, pruned in one shot without any training afterwards, and tested on a third of the images. All
curvatures see the same 300 training images; gradients are of single images. What is printed is the mean of the seeds.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.pruning import BlockFisher, DiagFisher, LayerGram, Magnitude, MFACFisher, Pruner, Unstructured
from gossamer.pruning.curvature import Curvature

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98)
SAMPLES = 300


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

    def of(curvature: Curvature, update: str, recompute: int) -> Callable[[nn.Module], Pruner]:
        pattern = Unstructured("layer" if isinstance(curvature, LayerGram) else "global")
        return lambda model: Pruner(model, curvature, pattern, update, recompute=recompute)  # type: ignore[arg-type]

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


def train(make: Callable[[], nn.Module], x: Tensor, y: Tensor, seed: int, steps: int) -> nn.Module:
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
            trained = train(make, x, y, seed, arguments.steps)
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


if __name__ == "__main__":
    main()
