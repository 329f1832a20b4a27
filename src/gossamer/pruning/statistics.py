"""Lets a model run, and gives what its layers see, or the gradients of its loss, to the statistics of a curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.operators.batches import run_batch, size_of
from gossamer.operators.fisher_gradients import gradients_of
from gossamer.pruning.curvature import Curvature, Statistic
from gossamer.pruning.masks import trainable
from gossamer.pruning.quadratic import Quadratic
from gossamer.pruning.targets import Target
from gossamer.system import available_memory

LossFn = Callable[[Any, Any], Tensor]


_SHARE_OF_MEMORY = 0.6  # of what is available, for statistics


def groups_in_memory(
    targets: Mapping[str, Target], curvature: Curvature, memory: int | None
) -> list[dict[str, Target]]:
    """Targets whose statistics fit into memory together.

    Args:
        targets: by name.
        curvature: says what each takes.
        memory: bytes; a share of what is available by default.

    Raises:
        ConfigurationError: one of them alone does not fit.
    """
    available = available_memory()
    budget = memory or (int(available * _SHARE_OF_MEMORY) if available else None)
    groups: list[dict[str, Target]] = [{}]
    used = 0
    for name, target in targets.items():
        size = curvature.bytes(target.shape)
        if budget is not None and size > budget:
            raise ConfigurationError(
                f"{curvature} takes {size / 1e9:,.2f} GB for {name} {list(target.shape)} alone, and "
                f"{budget / 1e9:,.2f} GB may be used: smaller blocks, fewer gradients, or more memory"
            )
        if budget is not None and used + size > budget:
            groups.append({})
            used = 0
        groups[-1][name] = target
        used += size
    return groups


def begin(targets: Mapping[str, Target], curvature: Curvature) -> dict[str, Statistic]:
    """An empty statistic for each weight."""
    return {name: curvature.begin(target.shape) for name, target in targets.items()}


@contextmanager
def watching(targets: Mapping[str, Target], statistics: Mapping[str, Statistic]) -> Iterator[None]:
    """Whenever a layer of a target is called in the body, its statistic takes the rows of its input."""

    def hook(target: Target, statistic: Statistic) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def take(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            statistic.add(target.inputs(module, inputs[0].detach()).cpu())

        return take

    handles = [
        module.register_forward_pre_hook(hook(target, statistics[name]))
        for name, target in targets.items()
        for module in target.modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode in the body; afterwards each module's own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def see_inputs(
    model: nn.Module, targets: Mapping[str, Target], statistics: Mapping[str, Statistic], loader: Iterable[Any]
) -> int:
    """Runs the model over all batches for curvatures of inputs; returns how many there were."""
    count = 0
    with watching(targets, statistics), evaluating(model), torch.no_grad():
        for batch in loader:
            run_batch(model, batch)
            count += 1
    if not count:
        raise ConfigurationError("the loader of calibration data gave no batch")
    return count


def see_gradients(
    model: nn.Module,
    targets: Mapping[str, Target],
    statistics: Mapping[str, Statistic],
    loader: Iterable[Any],
    loss_fn: LossFn,
    samples: int,
    progress: Callable[[int, int], None],
    *,
    vectorize: bool = False,
) -> None:
    """Gradients of ``samples`` single samples for curvatures of gradients."""
    with trainable([target.parameter for target in targets.values()]):
        order = [name for name, parameter in model.named_parameters() if name in targets and parameter.requires_grad]
        gradients = gradients_of(model, loss_fn, loader, samples, params=order, vectorize=vectorize)
        for done, gradient in enumerate(gradients, 1):
            parts = gradient.split([targets[name].parameter.numel() for name in order])
            for name, part in zip(order, parts, strict=True):
                target = targets[name]
                statistics[name].add(target.to_matrix(part.reshape(target.parameter.shape)).reshape(-1).cpu())
            progress(done, samples)


def mean_loss(model: nn.Module, loader: Iterable[Any], loss_fn: LossFn) -> float:
    """Mean over batches."""
    losses = []
    with evaluating(model), torch.no_grad():
        for batch in loader:
            losses.append(float(loss_fn(*run_batch(model, batch))))
    return sum(losses) / max(len(losses), 1)


def count_samples(loader: Iterable[Any]) -> int:
    """Samples of all batches."""
    return sum(size_of(batch) for batch in loader)


class Forms(Mapping[str, Quadratic]):
    """Quadratic forms of statistics, each made when it is asked for: factors take as much memory as statistics do.

    Args:
        statistics: by name of the weight.
        relative_damping: in units of the mean of a form's diagonal.

    Raises:
        ConfigurationError: a weight was not used, or nothing but zeros was seen.
    """

    def __init__(self, statistics: Mapping[str, Statistic], relative_damping: float) -> None:
        if unseen := [name for name, statistic in statistics.items() if not statistic.count]:
            raise ConfigurationError(
                f"{unseen[0]} was not used with the calibration data, so that nothing is known of it: exclude it, or "
                "give other data"
            )
        scales = {name: statistic.scale for name, statistic in statistics.items()}
        mean = sum(scales.values()) / max(len(scales), 1)
        if scales and not mean > 0:
            raise ConfigurationError(
                "all inputs or gradients of the weights that are pruned are zero: nothing tells them apart"
            )
        self._statistics = statistics
        # a layer that saw only zeros is damped as the others are
        self._damping = {name: relative_damping * (scale or mean) for name, scale in scales.items()}

    def __getitem__(self, name: str) -> Quadratic:
        return self._statistics[name].quadratic(self._damping[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)
