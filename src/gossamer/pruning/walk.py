"""Prunes and reconstructs the blocks of a language model one after the other, each on what those before it give."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor, nn

from gossamer.nn.outlier_store import own_attention
from gossamer.pruning.blocks import BlockRun
from gossamer.pruning.job import Job
from gossamer.pruning.original import Original
from gossamer.pruning.reconstruction import reconstruct
from gossamer.pruning.statistics import Forms, begin, groups_in_memory, watching
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
    run = BlockRun(pruner.model, blocks, job.batches)
    reference = run.hidden  # what the dense model has at the same place
    for index, block in enumerate(blocks):
        wanted = None
        if pruner.reconstruction:
            with job.report.timed("propagating"), original.in_place(block.parameters()):
                wanted = reference = run.outputs(index, reference)
        part = f"block-{index:03}-{job.sparsity}"
        if not job.take_over(part, pruner.model, pruner.masks):
            changed = _prune_block(pruner, job, run, index, wanted)
            job.keep_part(part, changed, {name: pruner.masks[name] for name in changed if name in pruner.masks})
        with job.report.timed("propagating"):
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
        errors = reconstruct(block, partial(run.forward, index), run.hidden, wanted, masks, pruner.reconstruction)
    job.report.reconstruction.append(errors)
    return {name: parameter for name, parameter in pruner.model.named_parameters() if id(parameter) in own}


def _prune_on_inputs(pruner: Pruner, job: Job, run: BlockRun, index: int, inside: dict[str, Target]) -> None:
    for group in groups_in_memory(inside, pruner.curvature, pruner.memory):
        statistics = begin(group, pruner.curvature)
        with job.report.timed("statistics"), watching(group, statistics):
            run.outputs(index, run.hidden)
        with job.report.timed("pruning"):
            forms = Forms(pruner.reached(statistics), pruner.curvature.relative_damping)
            pruner.prune_together({name: group[name] for name in forms}, forms, job)
