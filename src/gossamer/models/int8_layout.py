"""What all int8 checkpoints have in common: a weight of int8 codes and, beside it, one scale per row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.models.shards import TensorSpec


def int8_layers(
    specs: Mapping[str, TensorSpec], scale: str, *, columns: tuple[int, ...] = (), strict: bool = True
) -> list[str]:
    """Finds the modules with int8 weights, and checks that each has its scales, without reading any data.

    Args:
        specs: name -> dtype and shape of all tensors of a checkpoint.
        scale: last part of the name of the scales, which stand beside ``weight`` int8 ``[N, K]``.
        columns: the scales have the shape ``[N, *columns]``.
        strict: refuse scales without an int8 weight; false where a model may have a parameter of that name itself.

    Returns:
        Paths of the modules, in the order of ``specs``.

    Raises:
        CheckpointError: names the tensor that is missing or has the wrong shape or dtype.

    Example:
        >>> layer = [TensorSpec("fc.weight", torch.int8, (4, 8)), TensorSpec("fc.SCB", torch.float32, (4,))]
        >>> int8_layers({spec.name: spec for spec in layer}, "SCB")
        ['fc']
    """
    paths = []
    for spec in specs.values():
        if spec.dtype != torch.int8:
            continue
        path, _, last = spec.name.rpartition(".")
        if last != "weight" or len(spec.shape) != 2:
            raise CheckpointError(f"{spec.name} is int8 {list(spec.shape)}; only weights of two dimensions may be int8")
        _check_partner(specs.get(f"{path}.{scale}"), f"{path}.{scale}", spec, columns)
        paths.append(path)
    if strict:
        orphans = {spec.name.removesuffix(f".{scale}") for spec in specs.values() if spec.name.endswith(f".{scale}")}
        if orphans := orphans.difference(paths):
            path = min(orphans)
            raise CheckpointError(f"{path}.{scale} has no int8 tensor {path}.weight beside it")
    return paths


def _check_partner(scale: TensorSpec | None, name: str, weight: TensorSpec, columns: tuple[int, ...]) -> None:
    if scale is None:
        raise CheckpointError(f"{weight.name} is int8, but the checkpoint has no {name}")
    shape = (weight.shape[0], *columns)
    if scale.shape != shape or not scale.dtype.is_floating_point:
        raise CheckpointError(
            f"{name} is {scale.dtype} {list(scale.shape)}; {weight.name} of {list(weight.shape)} needs floating-point "
            f"scales {list(shape)}"
        )


def check_scale(name: str, scale: Tensor) -> None:
    """Refuses scales that no quantization can have made.

    Raises:
        CheckpointError: a scale is negative, infinite or not a number.
    """
    if not bool(((scale >= 0) & scale.isfinite()).all()):
        raise CheckpointError(f"{name} holds a negative or non-finite scale; the checkpoint is damaged")
