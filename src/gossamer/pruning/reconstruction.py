"""What a pruned block still gets wrong, trained away: its remaining weights learn the dense block's outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.pruning.masks import Hold, trainable


@dataclass(frozen=True)
class Reconstruction:
    """How a block is trained after it was pruned.

    Its inputs are those that the pruned model gives it, and its targets the dense model's outputs at the same place, so
    that it also makes up for what the blocks before it got wrong. All of its parameters that are not pruned are
    trained, norms and biases included.

    Args:
        epochs: times over the calibration data.
        lr: Adam's step; it falls to zero along a cosine.
        batch: calibration batches per step.
    """

    epochs: int = 2
    lr: float = 5e-4
    batch: int = 1

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.lr <= 0 or self.batch < 1:
            raise ConfigurationError(f"a reconstruction takes at least one epoch, and steps above 0; got {self}")


def reconstruct(
    block: nn.Module,
    forward: Callable[[Tensor], Tensor],
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    masks: list[tuple[nn.Parameter, Tensor]],
    settings: Reconstruction,
) -> tuple[float, float]:
    """Trains a block.

    Args:
        block: its parameters are changed in place, unless that makes things worse.
        forward: a batch through it.
        inputs, targets: batches.
        masks: of its pruned parameters.
        settings: how.

    Returns:
        Mean squared error before and after, relative to the mean square of the targets.

    Raises:
        ConfigurationError: the block is in another type than float32, in which steps this small would be lost.
    """
    if lower := {str(p.dtype).removeprefix("torch.") for p in block.parameters()} - {"float32"}:
        raise ConfigurationError(f"a block is trained in float32, and this one is {lower.pop()}: load the model so")
    power = sum(float(target.square().mean()) for target in targets) / len(targets)
    power = max(power, torch.finfo(torch.float32).tiny)
    before = _error(forward, inputs, targets) / power
    parameters = list(block.parameters())
    gradients = [parameter.grad for parameter in parameters]
    backup = [parameter.detach().clone() for parameter in parameters]
    steps = settings.epochs * -(-len(inputs) // settings.batch)
    optimizer = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    generator = torch.Generator().manual_seed(0)
    try:
        with trainable(parameters), torch.enable_grad(), Hold(masks, optimizer):
            for _ in range(settings.epochs):
                for chosen in torch.randperm(len(inputs), generator=generator).split(settings.batch):
                    optimizer.zero_grad()
                    for number in chosen.tolist():
                        error = (forward(inputs[number]) - targets[number]).square().mean()
                        (error / (power * len(chosen))).backward()
                    optimizer.step()
                    schedule.step()
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
    after = _error(forward, inputs, targets) / power
    if not after < before:
        with torch.no_grad():
            for parameter, old in zip(parameters, backup, strict=True):
                parameter.copy_(old)
        after = before
    return before, after


@torch.no_grad()
def _error(forward: Callable[[Tensor], Tensor], inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    pairs = zip(inputs, targets, strict=True)
    return sum(float((forward(x) - y).square().mean()) for x, y in pairs) / len(inputs)
