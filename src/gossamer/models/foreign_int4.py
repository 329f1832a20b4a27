"""4-bit checkpoints of other projects: their quantized layers as matrices in blocks, whose values are theirs exactly.

A weight ``scale (code - zero point)`` is exact in fp32. The projects compute it in the 16-bit type of the scales; their
weights are these, rounded to that type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from gossamer.errors import CheckpointError
from gossamer.models import awq_int4, compressed_tensors_int4, gptq_int4
from gossamer.models.compressed_tensors_config import QUANT_METHOD, has_format
from gossamer.models.int4_layout import Int4Weight, layers_of
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.grouped_rows import BLOCK_TYPES, GroupedRows, input_order
from gossamer.nn.int8_weight import linear_weight
from gossamer.nn.stored_matrix import StoredMatrix


@dataclass(frozen=True)
class Format:
    """How one project's tensors and settings are read; see the module of each.

    Attributes:
        read_config: settings of all layers, of a ``quantization_config``.
        open_weight: reader, path of a layer, its shape (N, K) and these settings -> its weight.
        weight: last part of the name of a layer's codes.
        parts: those of the tensors that stand beside them.
    """

    read_config: Callable[[Mapping[str, Any]], Any]
    open_weight: Callable[[ShardReader, str, tuple[int, int], Any], Int4Weight]
    weight: str
    parts: tuple[str, ...]


_GPTQ, _AWQ, _COMPRESSED_TENSORS = (
    Format(module.read_config, module.open_weight, module.WEIGHT, module.PARTS)
    for module in (gptq_int4, awq_int4, compressed_tensors_int4)
)


def int4_format(config: PreTrainedConfig) -> Format | None:
    """The format of a checkpoint by its configuration, or ``None`` if it is none of those read here."""
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict):
        return None
    method = stored.get("quant_method")
    if method == QUANT_METHOD:
        return _COMPRESSED_TENSORS if has_format(stored, compressed_tensors_int4.FORMAT) else None
    return {gptq_int4.QUANT_METHOD: _GPTQ, awq_int4.QUANT_METHOD: _AWQ}.get(str(method))


def read_int4(
    reader: ShardReader, config: PreTrainedConfig, format: Format, model: nn.Module
) -> tuple[dict[str, Any], dict[str, StoredMatrix]]:
    """The tensors of a checkpoint; ``config`` then says nothing of quantization.

    Args:
        reader: of the checkpoint.
        config: of it.
        format: of its weights.
        model: the one that ``config`` describes, without weights.

    Returns:
        What is not quantized, unread, by name; and the quantized weights by name.

    Raises:
        CheckpointError: a tensor is missing, damaged or of the wrong shape.
        UnsupportedModelError: the checkpoint is of a kind that cannot be read exactly; says why.
    """
    settings = format.read_config(config.quantization_config)
    del config.quantization_config
    linear = ((name, linear_weight(layer)) for name, layer in model.named_modules())
    shapes = {name: tuple(weight.shape) for name, weight in linear if weight is not None}
    matrices: dict[str, StoredMatrix] = {}
    for path in layers_of(reader, format.weight, format.parts):
        if path not in shapes:
            where = reader.file_of(f"{path}.{format.weight}")
            raise CheckpointError(f"{where}: {path}.{format.weight} is in 4 bit, but the model has no such linear layer")
        matrices[f"{path}.weight"] = _matrix(format.open_weight(reader, path, shapes[path], settings))
    own = {format.weight, *format.parts}
    rest = {
        name: tensor
        for name, tensor in reader.slices().items()
        if name.rpartition(".")[2] not in own or f"{name.rpartition('.')[0]}.weight" not in matrices
    }
    return rest, matrices


def _matrix(weight: Int4Weight) -> StoredMatrix:
    order = input_order(weight.groups)
    rows = GroupedRows(weight.codes, weight.scale, weight.zero, weight.groups, order)
    return StoredMatrix(BLOCK_TYPES[weight.scale.dtype], len(weight.groups), rows, input_order=order)
