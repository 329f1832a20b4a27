"""What all int8 checkpoints have in common: a weight of int8 codes and, beside it, one scale per row."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.models.shards import TensorSpec
from gossamer.nn.sparse_int8_linear import SPARSE_TENSORS, check_codes


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


def sparse_layers(specs: Mapping[str, TensorSpec]) -> list[str]:
    """The modules whose int8 weight is stored without its zeros, each with all of its tensors.

    Such a module ``P`` has ``P.weight_codes`` int8 [nonzeros], ``P.weight_mask`` uint8 [N, ceil(K / 8)] and
    ``P.weight_shape`` int64 [2] in the place of ``P.weight``; see :mod:`gossamer.nn.sparse_int8_linear`.

    Raises:
        CheckpointError: names the tensor that is missing, one too many, or of the wrong kind.
    """
    wanted = {"weight_codes": (torch.int8, 1), "weight_mask": (torch.uint8, 2), "weight_shape": (torch.int64, 1)}
    paths = dict.fromkeys(
        spec.name.rpartition(".")[0] for spec in specs.values() if spec.name.rpartition(".")[2] in SPARSE_TENSORS
    )
    for path in paths:
        if f"{path}.weight" in specs:
            raise CheckpointError(f"{path} has both {path}.weight and a weight without its zeros; one must go")
        for last, (dtype, dimensions) in wanted.items():
            found = specs.get(f"{path}.{last}")
            if found is None or found.dtype != dtype or len(found.shape) != dimensions:
                what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                raise CheckpointError(
                    f"{path}.{last} is {what}; a weight without its zeros needs it as {dtype} of {dimensions} "
                    "dimensions. The checkpoint is damaged; copy or make it again."
                )
    return list(paths)


def dense_specs(specs: Mapping[str, TensorSpec], read: Callable[[str], Tensor]) -> dict[str, TensorSpec]:
    """The same tensors as if every int8 weight were stored with its zeros; ``read`` gives a tensor.

    Raises:
        CheckpointError: the tensors of a sparse weight do not agree.
    """
    sparse = set(sparse_layers(specs))
    result: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        path, _, last = name.rpartition(".")
        if path not in sparse or last not in SPARSE_TENSORS:
            result[name] = spec
        elif last == "weight_codes":
            mask, shape = read(f"{path}.weight_mask"), read(f"{path}.weight_shape")
            check_codes(path, read(name), mask, shape)
            outputs, inputs = shape.tolist()
            result[f"{path}.weight"] = TensorSpec(f"{path}.weight", torch.int8, (outputs, inputs))
    return result
