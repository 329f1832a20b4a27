"""Rounds the linear layers of a language model block by block, on the inputs that the rounded blocks before give.

Layers that are called with the same tensor, such as the three that make queries, keys and values, share its moments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compress.block_types import BlockType, check_weight
from gossamer.compress.second_order import factor, round_second_order
from gossamer.errors import ConfigurationError
from gossamer.nn.experts import Expert
from gossamer.nn.outlier_store import own_attention
from gossamer.pruning.blocks import BlockRun, decoder_blocks
from gossamer.pruning.curvature import Gram
from gossamer.pruning.job import OnProgress
from gossamer.pruning.targets import Target
from gossamer.pruning.unfinished import Unfinished
from gossamer.timing import timed


@dataclass(frozen=True)
class RoundedLayer:
    """One weight.

    Attributes:
        name: of the parameter.
        type: format of its blocks.
        shape: (N, K).
        error: what rounding adds to the layer's output, relative to it: the square root of the ratio of their energies.
        reached: whether the layer got any input; an expert that none was sent to is rounded to the nearest.
    """

    name: str
    type: str
    shape: tuple[int, int]
    error: float
    reached: bool = True


def round_blocks(
    model: Any,
    targets: Mapping[str, Target],
    types: Mapping[str, BlockType],
    batches: Sequence[Any],
    parts: Unfinished,
    relative_damping: float,
    progress: OnProgress,
    seconds: dict[str, float],
) -> tuple[dict[str, dict[str, Tensor]], list[RoundedLayer]]:
    """Rounds the targets that lie in decoder blocks, in place.

    Args:
        model: of transformers, in fp32.
        targets: weights by name.
        types: format of each of them.
        batches: calibration data.
        parts: where what is done of each block is kept, and taken from.
        relative_damping: see :func:`~gossamer.compress.second_order.factor`.
        progress: called with what is done.
        seconds: by phase; are added to.

    Returns:
        What is stored of each target, see :meth:`~gossamer.compress.block_types.BlockType.pack`; and a report.

    Raises:
        ConfigurationError: a target lies in no block.
        CheckpointError: a weight is not finite.
    """
    blocks = decoder_blocks(model)
    stored: dict[str, dict[str, Tensor]] = {}
    layers: list[RoundedLayer] = []
    inside = [_inside(block, targets) for block in blocks]
    if outside := targets.keys() - {name for names in inside for name in names}:
        raise ConfigurationError(f"{min(outside)} lies in no decoder block, so that its inputs are not seen: skip it")
    for name, target in targets.items():
        check_weight(target.read(), name)
    with own_attention(model):  # the masks that blocks are called with are made for it
        run = BlockRun(model, blocks, batches)
        for index, names in enumerate(inside):
            part = f"block-{index:03}"
            done = parts.load(part) if names else {}
            if done is None:
                with timed(seconds, "statistics"):
                    moments = _moments(run, index, {name: targets[name] for name in names})
                with timed(seconds, "rounding"):
                    done = _round(names, targets, types, moments, relative_damping)
                parts.save(part, done)
            for name in names:
                fields = {key.rpartition(":")[2]: value for key, value in done.items() if key.startswith(f"{name}:")}
                error, reached = float(fields.pop("error")), bool(fields.pop("reached"))
                stored[name] = fields
                targets[name].write(types[name].unpack(fields))
                layers.append(RoundedLayer(name, types[name].name, targets[name].shape, error, reached))
            with timed(seconds, "propagating"):
                run.hidden = run.outputs(index, run.hidden)
            progress("blocks", index + 1, len(blocks))
    return stored, layers


def _inside(block: nn.Module, targets: Mapping[str, Target]) -> list[str]:
    own = {id(parameter) for parameter in block.parameters()}
    return [name for name, target in targets.items() if id(target.parameter) in own]


def _round(
    names: Sequence[str],
    targets: Mapping[str, Target],
    types: Mapping[str, BlockType],
    moments: Mapping[str, Gram],
    relative_damping: float,
) -> dict[str, Tensor]:
    done: dict[str, Tensor] = {}
    shared: dict[int, list[str]] = {}
    for name in names:
        shared.setdefault(id(moments[name]), []).append(name)
    for same in shared.values():
        gram = moments[same[0]]
        matrix = gram.mean().float() if gram.count else torch.eye(targets[same[0]].shape[1])
        inverse = factor(matrix, relative_damping)
        for name in same:
            weight = targets[name].read()
            grid, codes = round_second_order(weight, types[name], inverse)
            energy = _energy(weight, matrix)
            error = (_energy(grid.values(codes) - weight, matrix) / max(energy, torch.finfo(torch.float32).tiny)) ** 0.5
            fields = types[name].pack(grid, codes)
            fields |= {"error": torch.tensor(error), "reached": torch.tensor(gram.count > 0)}
            done |= {f"{name}:{key}": value for key, value in fields.items()}
    return done


def _energy(rows: Tensor, moments: Tensor) -> float:
    """Mean square of what rows (N, K) give for inputs of these second moments, summed over the rows."""
    return float((rows @ moments * rows).sum(dtype=torch.float64).clamp_min(0))


def _moments(run: BlockRun, index: int, targets: Mapping[str, Target]) -> dict[str, Gram]:
    """Moments of the inputs of each target; the same object for those that share their inputs.

    Which do is seen with the first sequence; experts, which may get none of it, share them by what they are.
    """
    of_experts = _leaders_of_experts(run.blocks[index], targets)
    seen: dict[str, Tensor] = {}

    def remember(name: str, inputs: Tensor) -> None:
        seen[name] = inputs

    others = {name: target for name, target in targets.items() if name not in of_experts}
    with _watching(others, remember):
        run.outputs(index, run.hidden[:1])
    if unseen := others.keys() - seen.keys():
        raise ConfigurationError(f"{min(unseen)} was not used with the calibration data: skip it, or give other data")
    first: dict[int, str] = {}
    leaders = of_experts | {name: first.setdefault(id(inputs), name) for name, inputs in seen.items()}
    grams = {name: Gram(targets[name].shape[1]) for name in leaders.values()}

    def add(name: str, inputs: Tensor) -> None:
        grams[name].add(targets[name].inputs(targets[name].modules[0], inputs.detach()))

    with _watching({name: targets[name] for name in grams}, add):
        run.outputs(index, run.hidden)
    return {name: grams[leader] for name, leader in leaders.items()}


def _leaders_of_experts(block: nn.Module, targets: Mapping[str, Target]) -> dict[str, str]:
    """Of the targets that are layers of experts, by name: which one has the same inputs, or itself."""
    names = {id(module): name for name, target in targets.items() for module in target.modules}
    leaders = {}
    for expert in (module for module in block.modules() if isinstance(module, Expert)):
        for layer, leader in ((expert.gate_proj, expert.gate_proj), (expert.up_proj, expert.gate_proj)):
            if id(layer) in names:
                leaders[names[id(layer)]] = names.get(id(leader), names[id(layer)])
        if id(expert.down_proj) in names:
            leaders[names[id(expert.down_proj)]] = names[id(expert.down_proj)]
    return leaders


@contextmanager
def _watching(targets: Mapping[str, Target], take: Callable[[str, Tensor], None]) -> Iterator[None]:
    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda module, inputs: take(name, inputs[0])

    handles = [
        module.register_forward_pre_hook(hook(name)) for name, target in targets.items() for module in target.modules
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
