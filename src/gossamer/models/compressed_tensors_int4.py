"""4-bit checkpoints of compressed-tensors (``pack-quantized``): W4A16, and W4A8 with dynamic activations.

A linear layer ``P`` of N outputs and K inputs in G groups has

    P.weight_packed      int32 [N, K / 8]     number i of a word, 4 bit from the lowest on: code of input 8 j + i
    P.weight_scale       float16 or bfloat16 [N, G]
    P.weight_shape       integers [2]         N and K
    P.weight_zero_point  int32 [N / 8, G]     where it is asymmetric; number i of a word: output 8 j + i.
                         int8 [N, G]          the same before version 0.9, less 8 and not packed
    P.weight_g_idx       int32 [K]            the group of each input (act-order); -1 throughout says nothing

and the weight of output n for input k of group g is ``scale[n, g] * (code - zero point)``, with a zero point of 8 where
none is stored. W4A8 quantizes activations per token, which Gossamer does in any case, and finer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.models.compressed_tensors_config import (
    KNOWN_OF_SCHEME,
    check_int8_activations,
    config_groups,
    refusal,
    refuse_static_scales,
)
from gossamer.models.foreign_config import as_names, as_object, refuse_unknown
from gossamer.models.int4_layout import (
    PER_WORD,
    Int4Weight,
    check_group_size,
    check_inputs,
    group_count,
    listed_groups,
    nibbles,
    part,
    scales,
)
from gossamer.models.shard_reader import ShardReader

FORMAT = "pack-quantized"
WEIGHT = "weight_packed"
PARTS = ("weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
_MIDDLE = 8  # the code of zero in symmetric schemes
_KNOWN_OF_WEIGHTS = KNOWN_OF_SCHEME | {"group_size", "actorder", "block_structure"}
_INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True)
class Settings:
    """What the configuration says of all layers.

    Attributes:
        group_sizes: inputs in a group, -1 for one group; that of any scheme.
        symmetric: for each scheme, whether zero points are the middle of the range.
        act_order: whether any scheme has groups whose inputs stand apart.
    """

    group_sizes: frozenset[int]
    symmetric: frozenset[bool]
    act_order: bool


def read_config(config: Mapping[str, Any]) -> Settings:
    """Reads a ``quantization_config``.

    Raises:
        CheckpointError: a value has no meaning.
        UnsupportedModelError: the format is another one than integers of 4 bit with scales per group or row.

    >>> weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True}
    >>> schemes = {"group_0": {"targets": ["Linear"], "weights": weights}}
    >>> read_config({"format": "pack-quantized", "config_groups": schemes}).group_sizes
    frozenset({128})
    """
    as_names(config.get("ignore"), "quantization_config.ignore")  # which layers are in 4 bit is told by the tensors
    schemes = [_read_scheme(name, group) for name, group in config_groups(config, FORMAT).items()]
    sizes, symmetric, ordered = zip(*schemes, strict=True)
    return Settings(frozenset(sizes), frozenset(symmetric), any(ordered))


def _read_scheme(name: str, group: Mapping[str, Any]) -> tuple[int, bool, bool]:
    where = f"quantization_config.config_groups.{name}"
    weights = as_object(group.get("weights"), f"{where}.weights")
    if (weights.get("num_bits"), weights.get("type", "int")) != (4, "int"):
        raise refusal(f"the weights of {name} are {weights.get('num_bits')}-bit {weights.get('type')}")
    if weights.get("dynamic"):
        raise refusal(f"the weights of {name} have dynamic scales")
    refuse_unknown(weights, _KNOWN_OF_WEIGHTS, f"{where}.weights", refusal)
    if weights.get("block_structure"):
        raise refusal(f"the weights of {name} have scales per block")
    if inputs := group.get("input_activations"):
        check_int8_activations(name, as_object(inputs, f"{where}.input_activations"))
    size = weights.get("group_size")
    strategy = weights.get("strategy") or ("channel" if size == -1 else "group")
    if strategy not in ("group", "channel"):
        raise refusal(f"the weights of {name} have one scale per {strategy}")
    if strategy == "channel":
        size = -1
    order = weights.get("actorder")
    if order not in (None, False, "weight", "static", "group", "dynamic", True):
        raise refusal(f"the activation ordering of {name} is {order!r}")
    grouped = order in ("group", "dynamic", True)
    return check_group_size(size, f"{where}.weights.group_size"), bool(weights.get("symmetric", True)), grouped


def open_weight(reader: ShardReader, path: str, shape: tuple[int, int], settings: Settings) -> Int4Weight:
    """The weight of a layer, whose codes are read when they are needed.

    Args:
        reader: of the checkpoint.
        path: of the layer.
        shape: (N, K) in the model.
        settings: of the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or holds what it cannot; names it.
        UnsupportedModelError: the layer's shape has no blocks, or activations have scales of their own.
    """
    refuse_static_scales(name for name in reader.specs if name.startswith(f"{path}."))
    outputs, inputs = shape
    check_inputs(path, inputs)
    why = f"{path} of {list(shape)} in 4 bit"
    words = part(reader, f"{path}.weight_packed", (torch.int32,), (outputs, inputs // PER_WORD), why)
    if (said := part(reader, f"{path}.weight_shape", _INDICES, (2,), why).tolist()) != [outputs, inputs]:
        raise CheckpointError(
            f"{reader.file_of(f'{path}.weight_shape')}: {path}.weight_shape is {said}, not {list(shape)}"
        )
    count = group_count(reader, f"{path}.weight_scale", axis=1)
    groups = _groups(reader, path, inputs, count, settings)
    scale = scales(reader, f"{path}.weight_scale", (outputs, count), why)
    zero = _zero_points(reader, path, (outputs, count), settings.symmetric)
    return Int4Weight(lambda rows: nibbles(words[rows]), scale, zero, groups)


def _groups(reader: ShardReader, path: str, inputs: int, count: int, settings: Settings) -> Tensor:
    """(K) int64: as the checkpoint lists them, or equal parts of a size that a scheme has.

    Raises:
        CheckpointError: the scales are of no such groups, or act-order lacks its list.
    """
    name = f"{path}.weight_g_idx"
    if name in reader.specs and not bool(reader.tensor(name).eq(-1).all()):
        found = listed_groups(reader, name, inputs, count)
        assert found is not None
        return found
    size = -1 if count == 1 else inputs // count
    if {size, inputs // count}.isdisjoint(settings.group_sizes) or inputs % count:
        wanted = ", ".join(str(each) for each in sorted(settings.group_sizes))
        raise CheckpointError(
            f"{reader.file_of(f'{path}.weight_scale')}: {path}.weight_scale is of {count} groups of {inputs} inputs, "
            f"and quantization_config has group sizes of {wanted} (-1 is a whole row)"
        )
    if settings.act_order and count > 1 and name not in reader.specs:
        raise CheckpointError(f"the checkpoint has no {name}, which actorder needs; copy or make it again")
    return torch.arange(inputs) // (inputs // count)


def _zero_points(reader: ShardReader, path: str, shape: tuple[int, int], symmetric: frozenset[bool]) -> Tensor:
    """(N, G) uint8.

    Raises:
        CheckpointError: they are missing, of another shape, beyond the range, or there though the scheme is symmetric.
    """
    name, (outputs, count) = f"{path}.weight_zero_point", shape
    spec = reader.specs.get(name)
    middle = torch.full((1, 1), _MIDDLE, dtype=torch.uint8).expand(shape)
    if spec is None:
        if True not in symmetric:
            raise CheckpointError(f"the checkpoint has no {name}, which symmetric=false needs; copy or make it again")
        return middle
    if spec.dtype == torch.int8:
        stored = part(reader, name, (torch.int8,), shape, path)
        if bool((beyond := stored.lt(-_MIDDLE) | stored.ge(_MIDDLE)).any()):
            place = tuple(beyond.nonzero()[0].tolist())
            raise CheckpointError(
                f"{reader.file_of(name)}: {name}{list(place)} is {int(stored[place])}, beyond the range -8 to 7"
            )
        zero = (stored + _MIDDLE).to(torch.uint8)
    else:
        words = part(reader, name, (torch.int32,), (-(-outputs // PER_WORD), count), path)
        zero = nibbles(words.t())[:, :outputs].t()
    if False not in symmetric and not torch.equal(zero, middle):
        raise CheckpointError(f"{reader.file_of(name)}: {name} is not zero, though quantization_config is symmetric")
    return zero
