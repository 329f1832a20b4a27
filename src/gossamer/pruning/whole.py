"""Prunes all weights of a model at once, or in groups whose statistics fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.pruning.job import Job
from gossamer.pruning.quadratic import Quadratic
from gossamer.pruning.schedule import geometric
from gossamer.pruning.statistics import Forms, begin, count_samples, see_gradients, see_inputs
from gossamer.pruning.targets import Target
from gossamer.system import available_memory

if TYPE_CHECKING:
    from gossamer.pruning.pruner import Pruner

_SHARE_OF_MEMORY = 0.6  # of what is available, for statistics
_PART = "whole"


def prune_whole(pruner: Pruner, job: Job) -> None:
    """In as many stages as the pruner recomputes."""
    if job.take_over(_PART, pruner.model, pruner.masks):
        return
    wanted = job.sparsity
    for job.sparsity in geometric(pruner.sparsity, wanted, pruner.recompute):
        _stage(pruner, job)
    job.keep_part(_PART, {name: target.parameter for name, target in pruner.targets.items()}, pruner.masks)


def _stage(pruner: Pruner, job: Job) -> None:
    groups = _groups(pruner)
    if not pruner.competes_globally or len(groups) == 1:
        for group in groups:
            forms = _see(pruner, group, job)
            with job.report.timed("pruning"):
                pruner.prune_together(group, forms, job)
        return
    # What is pruned in one group depends on the others: all costs first, and statistics again for the update.
    costs: dict[str, Tensor] = {}
    for group in groups:
        forms = _see(pruner, group, job)
        costs |= {name: pruner.costs(target, forms[name]) for name, target in group.items()}
    keep = pruner.pattern.keep(costs, job.sparsity)
    costs.clear()
    for group in groups:
        known = {} if pruner.update == "none" else _see(pruner, group, job)
        for name, target in group.items():
            pruner.apply(target, keep[name], known.get(name), job)


def _groups(pruner: Pruner) -> list[dict[str, Target]]:
    """Targets whose statistics fit into memory together."""
    available = available_memory()
    budget = pruner.memory or (int(available * _SHARE_OF_MEMORY) if available else None)
    groups: list[dict[str, Target]] = [{}]
    used = 0
    for name, target in pruner.targets.items():
        size = pruner.curvature.bytes(target.shape)
        if budget is not None and size > budget:
            raise ConfigurationError(
                f"{pruner.curvature} takes {size / 1e9:,.2f} GB for {name} {list(target.shape)} alone, and "
                f"{budget / 1e9:,.2f} GB may be used: smaller blocks, fewer gradients, or more memory"
            )
        if budget is not None and used + size > budget:
            groups.append({})
            used = 0
        groups[-1][name] = target
        used += size
    return groups


def _see(pruner: Pruner, group: Mapping[str, Target], job: Job) -> Mapping[str, Quadratic]:
    with job.report.timed("statistics"):
        statistics = begin(group, pruner.curvature)
        if pruner.curvature.source == "inputs":
            see_inputs(pruner.model, group, statistics, job.batches)
        elif pruner.curvature.source == "gradients":
            assert job.loss_fn is not None
            samples = job.samples or count_samples(job.batches)
            progress = partial(job.progress, "gradients")
            see_gradients(
                pruner.model, group, statistics, job.batches, job.loss_fn, samples, progress, vectorize=job.vectorize
            )
        return Forms(statistics, pruner.curvature.relative_damping)
