"""Prunes and reconstructs the blocks of a language model one after the other, each on what those before it give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gossamer.nn.outlier_store import own_attention
from gossamer.operators.ranks import Ranks, together
from gossamer.pruning.blocks import BlockRun
from gossamer.pruning.job import Job
from gossamer.pruning.original import Original
from gossamer.pruning.reconstruction import reconstruct
from gossamer.pruning.statistics import Forms, begin, groups_in_memory, look, total, watching
from gossamer.pruning.targets import Target

if TYPE_CHECKING:
    from gossamer.pruning.pruner import Pruner


def prune_blocks(pruner: Pruner, job: Job, original: Original) -> None:
    """Blocks that are finished already, by an interrupted run, are only run.

    Args:
        pruner: with blocks.
        job: of it.
        original: the weights before anything was pruned; what the dense model computes with them is what the pruned one
            is trained to give.
    """
    assert pruner.blocks is not None
    with own_attention(pruner.model):  # the masks that blocks are called with are made for it
        _walk(pruner, job, original, pruner.blocks)


def _walk(pruner: Pruner, job: Job, original: Original, blocks: Sequence[nn.Module]) -> None:
    with together(job.ranks, "running the first block"):
        run = BlockRun(pruner.model, blocks, job.own_batches)
    reference = run.hidden  # what the dense model has at the same place
    for index, block in enumerate(blocks):
        wanted = None
        if pruner.reconstruction:
            with (
                job.report.timed("propagating"),
                together(job.ranks, f"running block {index}"),
                original.in_place(block.parameters()),
            ):
                wanted = reference = run.outputs(index, reference)
        part = f"block-{index:03}-{job.sparsity}"
        if not job.take_over(part, pruner.model, pruner.masks):
            changed = _prune_block(pruner, job, run, index, wanted)
            job.keep_part(part, changed, {name: pruner.masks[name] for name in changed if name in pruner.masks})
        with job.report.timed("propagating"), together(job.ranks, f"running block {index}"):
            run.hidden = run.outputs(index, run.hidden)
        job.progress("blocks", index + 1, len(blocks))


def _prune_block(
    pruner: Pruner, job: Job, run: BlockRun, index: int, wanted: list[Tensor] | None
) -> dict[str, nn.Parameter]:
    """Returns the parameters that were changed, by name."""
    block = run.blocks[index]
    own = {id(parameter) for parameter in block.parameters()}
    inside = {name: target for name, target in pruner.targets.items() if id(target.parameter) in own}
    if pruner.in_blocks and inside:
        _prune_on_inputs(pruner, job, run, index, inside)
    if pruner.reconstruction is None or wanted is None:
        return {name: target.parameter for name, target in inside.items()}
    masks = [(target.parameter, pruner.masks[name]) for name, target in inside.items()]
    with job.report.timed("reconstruction"):
        inputs, targets = (_at_first(states, len(job.batches), job.ranks) for states in (run.hidden, wanted))
        errors = torch.zeros(2, dtype=torch.float64)
        with together(job.ranks, f"training block {index}"):
            if job.ranks.rank == 0:
                forward = partial(run.forward, index)
                before, after = reconstruct(block, forward, inputs, targets, masks, pruner.reconstruction)
                errors = torch.tensor([before, after], dtype=torch.float64)
        trained = {str(place): parameter.detach() for place, parameter in enumerate(block.parameters())}
        trained = job.ranks.share(trained | {"errors": errors}, 0)
        with torch.no_grad():
            for place, parameter in enumerate(block.parameters()):
                parameter.copy_(trained[str(place)])
    before, after = trained["errors"].tolist()
    job.report.reconstruction.append((before, after))
    return {name: parameter for name, parameter in pruner.model.named_parameters() if id(parameter) in own}


def _at_first(states: list[Tensor], count: int, ranks: Ranks) -> list[Tensor]:
    """The hidden states of all processes' batches, in order, at the first process, which trains: a step at a time there
    is nothing that others could do meanwhile.
    """
    if ranks.size == 1:
        return states
    batches = [range(rank, count, ranks.size) for rank in range(ranks.size)]
    flat = torch.stack(states).reshape(-1)
    sent = [len(flat)] + [0] * (ranks.size - 1)
    received = [len(each) * states[0].numel() if ranks.rank == 0 else 0 for each in batches]
    found = ranks.exchange(flat, sent, received).view(-1, *states[0].shape)
    order = [number for each in batches for number in each]
    return [state for _, state in sorted(zip(order, found, strict=False), key=lambda pair: pair[0])]


def _prune_on_inputs(pruner: Pruner, job: Job, run: BlockRun, index: int, inside: dict[str, Target]) -> None:
    for group in groups_in_memory(inside, pruner.curvature, pruner.memory, job.owners):
        statistics = begin(group, pruner.curvature, job.owners)
        with job.report.timed("statistics"):
            with together(job.ranks, f"running block {index}"), watching(group, statistics):
                run.outputs(index, run.hidden)
            total(statistics, job.ranks)
        with job.report.timed("pruning"):
            seen = pruner.reached(look(group, statistics, job.owners))
            forms = Forms(statistics, seen, pruner.curvature.relative_damping)
            pruner.prune_together({name: group[name] for name in forms}, forms, job)
