"""Lets a model run, and gives what its layers see, or the gradients of its loss, to the statistics of a curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.operators.batches import run_batch, size_of
from gossamer.operators.fisher_gradients import gradients_of, shared_gradients
from gossamer.operators.ranks import ALONE, Ranks, together
from gossamer.pruning.curvature import Curvature, InputStatistic, Statistic
from gossamer.pruning.masks import trainable
from gossamer.pruning.owners import Owners
from gossamer.pruning.quadratic import Quadratic
from gossamer.pruning.targets import Target
from gossamer.system import available_memory

LossFn = Callable[[Any, Any], Tensor]


_SHARE_OF_MEMORY = 0.6  # of what is available, for statistics


@dataclass(frozen=True)
class Seen:
    """How much a statistic has seen, and the mean of its form's diagonal."""

    count: int
    scale: float


def groups_in_memory(
    targets: Mapping[str, Target], curvature: Curvature, memory: int | None, owners: Owners
) -> list[dict[str, Target]]:
    """Targets whose statistics fit into memory together.

    Args:
        targets: by name.
        curvature: says what each takes.
        memory: bytes; a share of what is available by default.
        owners: of the weights. Statistics of gradients are with them alone, so that more fit.

    Raises:
        ConfigurationError: one of them alone does not fit.
    """
    available = available_memory()
    budget = _least(memory or (int(available * _SHARE_OF_MEMORY) if available else None), owners.ranks)
    groups: list[dict[str, Target]] = [{}]
    used = [0] * owners.ranks.size
    for name, target in targets.items():
        size = curvature.bytes(target.shape)
        if budget is not None and size > budget:
            raise ConfigurationError(
                f"{curvature} takes {size / 1e9:,.2f} GB for {name} {list(target.shape)} alone, and "
                f"{budget / 1e9:,.2f} GB may be used: smaller blocks, fewer gradients, or more memory"
            )
        holder = owners[name] if curvature.source == "gradients" else 0
        if budget is not None and used[holder] + size > budget:
            groups.append({})
            used = [0] * owners.ranks.size
        groups[-1][name] = target
        used[holder] += size
    return groups


def _least(budget: int | None, ranks: Ranks) -> int | None:
    """The least of all processes: their groups have to be the same."""
    if ranks.size == 1:
        return budget
    budgets = torch.zeros(ranks.size, dtype=torch.float64)
    budgets[ranks.rank] = budget or torch.inf
    least = float(ranks.add(budgets).min())
    return int(least) if least < torch.inf else None


def begin(targets: Mapping[str, Target], curvature: Curvature, owners: Owners | None = None) -> dict[str, Statistic]:
    """An empty statistic for each weight that this process needs one of; see :class:`~.curvature.Statistic`."""
    needed = [name for name in targets if curvature.source != "gradients" or not owners or owners.mine(name)]
    return {name: curvature.begin(targets[name].shape) for name in needed}


def look(targets: Iterable[str], statistics: Mapping[str, Statistic], owners: Owners) -> dict[str, Seen]:
    """What the statistics of all processes have seen, as the owners of the weights know it."""
    names = list(targets)
    numbers = torch.zeros(len(names), 2, dtype=torch.float64)
    for place, name in enumerate(names):
        if owners.mine(name) and (count := statistics[name].count):
            numbers[place] = torch.tensor([count, statistics[name].scale], dtype=torch.float64)
    found = owners.ranks.add(numbers).tolist()
    return {name: Seen(int(count), scale) for name, (count, scale) in zip(names, found, strict=True)}


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
    model: nn.Module,
    targets: Mapping[str, Target],
    statistics: Mapping[str, Statistic],
    loader: Iterable[Any],
    ranks: Ranks = ALONE,
) -> int:
    """Runs the model over this process's batches for curvatures of inputs; returns how many there were."""
    count = 0
    with (
        together(ranks, "running the model"),
        watching(targets, statistics),
        evaluating(model),
        torch.no_grad(),
    ):
        for batch in loader:
            run_batch(model, batch)
            count += 1
        if not count:
            raise ConfigurationError("the loader of calibration data gave no batch")
    total(statistics, ranks)
    return count


def total(statistics: Mapping[str, Statistic], ranks: Ranks) -> None:
    """Of inputs: what all processes saw."""
    if ranks.size > 1:
        for statistic in statistics.values():
            cast(InputStatistic, statistic).total(ranks)


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
    owners: Owners,
) -> None:
    """Gradients of ``samples`` single samples for curvatures of gradients.

    Sample s is process s mod W's, one by one then; of its gradient each process gets what belongs to its weights.
    """
    ranks = owners.ranks
    with trainable([target.parameter for target in targets.values()]):
        order = [name for name, parameter in model.named_parameters() if name in targets and parameter.requires_grad]
        if ranks.size == 1:
            gradients = gradients_of(model, loss_fn, loader, samples, params=order, vectorize=vectorize)
            for done, gradient in enumerate(gradients, 1):
                for name, part in _by_weight(gradient, order, targets):
                    statistics[name].add(part)
                progress(done, samples)
            return
        sizes = {name: targets[name].parameter.numel() for name in order}
        rounds = shared_gradients(model, loss_fn, loader, samples, ranks, params=order)
        for number, shared in enumerate(rounds):
            first = number * ranks.size
            senders = min(ranks.size, samples - first)
            made = {} if shared is None else dict(_by_weight(shared, order, targets))
            received = _to_owners(made, sizes, senders, owners)
            with together(ranks, "adding a gradient"):
                for name, part in received:
                    statistics[name].add(part)
            progress(first + senders, samples)


def _by_weight(gradient: Tensor, order: Sequence[str], targets: Mapping[str, Target]) -> Iterator[tuple[str, Tensor]]:
    """Of one gradient what belongs to each weight, row by row of its matrix."""
    parts = gradient.split([targets[name].parameter.numel() for name in order])
    for name, part in zip(order, parts, strict=True):
        target = targets[name]
        yield name, target.to_matrix(part.reshape(target.parameter.shape)).reshape(-1).cpu()


def _to_owners(
    made: Mapping[str, Tensor], sizes: Mapping[str, int], senders: int, owners: Owners
) -> list[tuple[str, Tensor]]:
    """Sends the parts of this process's gradient to their owners; returns this one's, in the order of the samples."""
    ranks = owners.ranks
    names = [[name for name in sizes if owners[name] == rank] for rank in range(ranks.size)]
    counts = [sum(sizes[name] for name in each) for each in names]
    sending = torch.cat([made[name] for each in names for name in each]) if made else torch.empty(0)
    sent = counts if made else [0] * ranks.size
    received = [counts[ranks.rank] * (rank < senders) for rank in range(ranks.size)]
    mine = names[ranks.rank]
    found = ranks.exchange(sending, sent, received).split([sizes[name] for name in mine] * senders)
    return list(zip(mine * senders, found, strict=True))


def mean_loss(model: nn.Module, loader: Iterable[Any], loss_fn: LossFn, ranks: Ranks) -> float:
    """Mean over the batches of all processes."""
    losses = []
    with together(ranks, "measuring the loss"), evaluating(model), torch.no_grad():
        for batch in loader:
            losses.append(float(loss_fn(*run_batch(model, batch))))
    found, count = ranks.add(torch.tensor([sum(losses), len(losses)], dtype=torch.float64)).tolist()
    return float(found) / max(int(count), 1)


def count_samples(loader: Iterable[Any]) -> int:
    """Samples of all batches."""
    return sum(size_of(batch) for batch in loader)


class Forms(Mapping[str, Quadratic]):
    """Quadratic forms of statistics, each made when it is asked for: factors take as much memory as statistics do.

    Args:
        statistics: by name of the weight; those that this process has.
        seen: what all of them have seen.
        relative_damping: in units of the mean of a form's diagonal.

    Raises:
        ConfigurationError: a weight was not used, or nothing but zeros was seen.
    """

    def __init__(self, statistics: Mapping[str, Statistic], seen: Mapping[str, Seen], relative_damping: float) -> None:
        if unseen := [name for name, each in seen.items() if not each.count]:
            raise ConfigurationError(
                f"{unseen[0]} was not used with the calibration data, so that nothing is known of it: exclude it, or "
                "give other data"
            )
        mean = sum(each.scale for each in seen.values()) / max(len(seen), 1)
        if seen and not mean > 0:
            raise ConfigurationError(
                "all inputs or gradients of the weights that are pruned are zero: nothing tells them apart"
            )
        self._statistics = statistics
        # a layer that saw only zeros is damped as the others are
        self._damping = {name: relative_damping * (each.scale or mean) for name, each in seen.items()}

    def __getitem__(self, name: str) -> Quadratic:
        return self._statistics[name].quadratic(self._damping[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._damping)

    def __len__(self) -> int:
        return len(self._damping)
