"""What 4-bit checkpoints of GPTQ, AWQ and compressed-tensors have in common."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.grouped_rows import BLOCK, BLOCK_TYPES

BITS = 4
PER_WORD = 32 // BITS  # codes in an int32
SCALES = tuple(BLOCK_TYPES)


@dataclass(frozen=True)
class Int4Weight:
    """A weight (N, K) in 4 bit, as the tensors of a checkpoint have it: ``scale (codes - zero)``.

    Attributes:
        codes: gives the codes of a slice of rows, (n, K) uint8.
        scale: (N, G) float16 or bfloat16.
        zero: (N, G) uint8, 0 to 15.
        groups: (K) int64, the group of each input.
    """

    codes: Callable[[slice], Tensor]
    scale: Tensor
    zero: Tensor
    groups: Tensor


def nibbles(words: Tensor) -> Tensor:
    """The eight numbers of 4 bit in every int32, lowest first: (..., W) -> (..., 8 W) uint8.

    >>> nibbles(torch.tensor([0x76543210], dtype=torch.int32)).tolist()
    [0, 1, 2, 3, 4, 5, 6, 7]
    """
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(-2)


def layers_of(reader: ShardReader, weight: str, parts: Collection[str]) -> list[str]:
    """The paths of modules with a quantized weight: those that have a tensor ``weight``.

    Args:
        reader: of the checkpoint.
        weight: last part of the name of the codes.
        parts: those of the tensors that only stand beside them.

    Raises:
        CheckpointError: there are parts without codes.
    """
    paths = {name.rpartition(".")[0]: None for name in reader.specs if name.rpartition(".")[2] == weight}
    for name in reader.specs:
        path, _, last = name.rpartition(".")
        if last in parts and path not in paths:
            raise CheckpointError(f"{reader.file_of(name)}: {name} has no {path}.{weight} beside it")
    return list(paths)


def part(reader: ShardReader, name: str, dtypes: Collection[torch.dtype], shape: tuple[int, ...], why: str) -> Tensor:
    """A tensor of a quantized layer.

    Args:
        reader: of the checkpoint.
        name: of the tensor.
        dtypes: it may have.
        shape: it has to have.
        why: it has to have it, for messages.

    Raises:
        CheckpointError: it is missing, or of another type or shape.
    """
    spec = reader.specs.get(name)
    wanted = f"{' or '.join(_short(dtype) for dtype in dtypes)} {list(shape)}"
    if spec is None:
        raise CheckpointError(f"the checkpoint has no {name}; {why} needs it, {wanted}")
    if spec.dtype not in dtypes or spec.shape != shape:
        raise CheckpointError(
            f"{reader.file_of(name)}: {name} is {_short(spec.dtype)} {list(spec.shape)}; {why} needs {wanted}"
        )
    return reader.tensor(name)


def scales(reader: ShardReader, name: str, shape: tuple[int, int], why: str) -> Tensor:
    """The scales of a layer, 16 bit.

    Raises:
        CheckpointError: they are missing, of another shape, or not finite.
        UnsupportedModelError: they have another type.
    """
    spec = reader.specs.get(name)
    if spec is not None and spec.dtype == torch.float32:
        raise UnsupportedModelError(
            f"{reader.file_of(name)}: {name} is float32; only scales of 16 bit can be read. Save the model again in "
            "float16 or bfloat16."
        )
    found = part(reader, name, SCALES, shape, why)
    if not bool((finite := found.isfinite()).all()):
        place = tuple((~finite).nonzero()[0].tolist())
        raise CheckpointError(
            f"{reader.file_of(name)}: {name}{list(place)} is {float(found[place])}; the checkpoint is damaged"
        )
    return found


def group_count(reader: ShardReader, name: str, axis: int) -> int:
    """How many groups a tensor of scales has along ``axis``.

    Raises:
        CheckpointError: it is missing, or has no two dimensions.
    """
    spec = reader.specs.get(name)
    if spec is None or len(spec.shape) != 2 or not spec.shape[axis]:
        what = "the checkpoint has no" if spec is None else f"{reader.file_of(name)}: {list(spec.shape)} is no shape of"
        raise CheckpointError(f"{what} {name}; a weight in groups needs their scales in two dimensions")
    return spec.shape[axis]


def even_groups(path: str, inputs: int, group_size: int) -> Tensor:
    """The group of each input where every ``group_size`` inputs make one: (K) int64.

    Args:
        path: of the layer, for messages.
        inputs: K.
        group_size: -1 for a single group.

    Raises:
        UnsupportedModelError: groups or inputs do not fill blocks.

    >>> even_groups("fc", 96, 64).bincount()
    tensor([64, 32])
    """
    check_inputs(path, inputs)
    if group_size == -1:
        return torch.zeros(inputs, dtype=torch.int64)
    return torch.arange(inputs) // group_size


def check_inputs(path: str, inputs: int) -> None:
    """Refuses a layer whose rows do not consist of blocks.

    Raises:
        UnsupportedModelError: names it.
    """
    if inputs % BLOCK:
        raise UnsupportedModelError(f"{path} has {inputs} inputs; 4-bit weights need a multiple of {BLOCK}")


def listed_groups(reader: ShardReader, name: str, inputs: int, count: int) -> Tensor | None:
    """The group of each input as a tensor of the checkpoint says it, (K) int64, or ``None`` if there is no such tensor.

    Raises:
        CheckpointError: an index is out of range, or the inputs of a group fill no blocks.
    """
    if name not in reader.specs:
        return None
    groups = part(reader, name, (torch.int32, torch.int64), (inputs,), "act-order").long()
    low, high = (int(each) for each in groups.aminmax())
    if low < 0 or high >= count:
        raise CheckpointError(
            f"{reader.file_of(name)}: {name} has the group {low if low < 0 else high}; the scales are of groups 0 to "
            f"{count - 1}. The checkpoint is damaged; copy or make it again."
        )
    sizes = groups.bincount(minlength=count)
    if bool((odd := sizes.eq(0) | sizes.remainder(BLOCK).ne(0)).any()):
        group = int(odd.int().argmax())
        raise CheckpointError(
            f"{reader.file_of(name)}: {name} gives group {group} of {count} {int(sizes[group])} inputs; only groups "
            f"whose inputs are a multiple of {BLOCK} can be read"
        )
    return groups


def check_bits(bits: Any, where: str, what: str) -> None:
    """Refuses other widths than 4 bit.

    Raises:
        UnsupportedModelError: says which it is.
    """
    if bits != BITS or isinstance(bits, bool):
        raise UnsupportedModelError(
            f"{where} is {bits!r}; of {what} checkpoints only those with {BITS} bit can be read"
        )


def check_group_size(size: Any, where: str) -> int:
    """The number of inputs in a group, or -1 for all of them.

    Raises:
        CheckpointError: it is no such number.
        UnsupportedModelError: groups do not consist of blocks.
    """
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise CheckpointError(f"{where} is {size!r}; it has to be a number of inputs, or -1 for all")
    if size != -1 and size % BLOCK:
        raise UnsupportedModelError(f"{where} is {size}; only groups of a multiple of {BLOCK} inputs can be read")
    return size


def check_values(config: Mapping[str, Any], wanted: Mapping[str, Collection[Any]], what: str) -> None:
    """Refuses settings that have another value than those which are read.

    Args:
        config: the settings.
        wanted: values by key; ``None`` stands for a setting that is missing.
        what: the format, for messages.

    Raises:
        UnsupportedModelError: names the setting.
    """
    for key, values in wanted.items():
        value = config.get(key)
        if (value.lower() if isinstance(value, str) else value) not in values:
            known = ", ".join(repr(each) for each in values if each is not None)
            raise UnsupportedModelError(
                f"quantization_config.{key} is {value!r}; of {what} checkpoints only those with {known} can be read"
            )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
