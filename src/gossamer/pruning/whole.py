"""Prunes all weights of a model at once, or in groups whose statistics fit into memory."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from gossamer.pruning.job import Job
from gossamer.pruning.quadratic import Quadratic
from gossamer.pruning.schedule import geometric
from gossamer.pruning.statistics import (
    Forms,
    begin,
    count_samples,
    groups_in_memory,
    look,
    see_gradients,
    see_inputs,
)
from gossamer.pruning.targets import Target

if TYPE_CHECKING:
    from gossamer.pruning.pruner import Pruner


def prune_whole(pruner: Pruner, job: Job) -> None:
    """In as many stages as the pruner recomputes."""
    wanted, part = job.sparsity, f"whole-{job.sparsity}"
    if job.take_over(part, pruner.model, pruner.masks):
        return
    for job.sparsity in geometric(pruner.sparsity, wanted, pruner.recompute):
        _stage(pruner, job)
    job.keep_part(part, {name: target.parameter for name, target in pruner.targets.items()}, pruner.masks)


def _stage(pruner: Pruner, job: Job) -> None:
    groups = groups_in_memory(pruner.targets, pruner.curvature, pruner.memory, job.owners)
    if not pruner.competes_globally or len(groups) == 1:
        for group in groups:
            forms = _see(pruner, group, job)
            with job.report.timed("pruning"):
                pruner.prune_together({name: group[name] for name in forms}, forms, job)
        return
    # What is pruned in one group depends on the others: all costs first, and statistics again for the update.
    costs: dict[str, Tensor] = {}
    for group in groups:
        forms = _see(pruner, group, job)
        costs |= pruner.costs({name: group[name] for name in forms}, forms, job)
    keep = pruner.pattern.keep(costs, job.sparsity)
    costs.clear()
    for group in groups:
        known = {} if pruner.update == "none" else _see(pruner, group, job)
        pruner.apply_together({name: target for name, target in group.items() if name in keep}, keep, known, job)


def _see(pruner: Pruner, group: Mapping[str, Target], job: Job) -> Mapping[str, Quadratic]:
    with job.report.timed("statistics"):
        statistics = begin(group, pruner.curvature, job.owners)
        if pruner.curvature.source == "inputs":
            see_inputs(pruner.model, group, statistics, job.own_batches, job.ranks)
        elif pruner.curvature.source == "gradients":
            assert job.loss_fn is not None
            samples = job.samples or count_samples(job.batches)
            samples = min(samples, pruner.curvature.most_samples or samples)
            progress = partial(job.progress, "gradients")
            see_gradients(
                pruner.model,
                group,
                statistics,
                job.batches,
                job.loss_fn,
                samples,
                progress,
                vectorize=job.vectorize,
                owners=job.owners,
            )
        seen = pruner.reached(look(group, statistics, job.owners))
        return Forms(statistics, seen, pruner.curvature.relative_damping)
