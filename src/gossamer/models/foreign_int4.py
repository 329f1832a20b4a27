"""4-bit checkpoints of other projects: their quantized layers as matrices in blocks, whose values are theirs exactly.

A weight ``scale (code - zero point)`` is exact in fp32. The projects compute it in the 16-bit type of the scales; their
weights are these, rounded to that type.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models import awq_int4, compressed_tensors_int4, gptq_int4
from gossamer.models.auto_round_int4 import translated
from gossamer.models.compressed_tensors_config import QUANT_METHOD, has_format
from gossamer.models.dequantized_rows import DequantizedRows, quantized_weights
from gossamer.models.int4_layout import Int4Weight, layers_of
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.experts import separate_experts
from gossamer.nn.grouped_rows import BLOCK_TYPES, GroupedRows, input_order
from gossamer.nn.int8_weight import is_conv1d, linear_weight
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
    """The format of a checkpoint by its configuration, or ``None`` if it is none of those read here.

    Raises:
        UnsupportedModelError: it is of AutoRound, in a format that is not.
    """
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, dict):
        return None
    method = translated(stored).get("quant_method")
    if method == QUANT_METHOD:
        return _COMPRESSED_TENSORS if has_format(stored, compressed_tensors_int4.FORMAT) else None
    return {gptq_int4.QUANT_METHOD: _GPTQ, awq_int4.QUANT_METHOD: _AWQ}.get(str(method))


def read_int4(
    reader: ShardReader,
    config: PreTrainedConfig,
    format: Format,
    model: nn.Module,
    skip: Sequence[str] | None = None,
    *,
    as_stored: bool = False,
) -> dict[str, Any]:
    """The weights of a checkpoint by name, unread; ``config`` then says nothing of quantization.

    Args:
        reader: of the checkpoint.
        config: of it.
        format: of its weights.
        model: the one that ``config`` describes, without weights.
        skip: layers that will not be quantized again, while the other linear layers will be; ``None`` if none will be.
        as_stored: quantized weights are given as :class:`StoredMatrix`, and not in floating point.

    Raises:
        CheckpointError: a tensor is missing, damaged or of the wrong shape.
        UnsupportedModelError: the checkpoint is of a kind that cannot be read exactly; says why.
    """
    settings = format.read_config(translated(config.quantization_config))
    del config.quantization_config
    separate_experts(model, lambda name: f"{name}.0.gate_proj.{format.weight}" in reader.specs)
    layers = {name: layer for name, layer in model.named_modules() if linear_weight(layer) is not None}
    kept = quantized_weights(model, skip)
    paths = layers_of(reader, format.weight, format.parts)
    parts = {f"{path}.{last}" for path in paths for last in (format.weight, *format.parts)}
    weights = {name: tensor for name, tensor in reader.slices().items() if name not in parts}
    for path in paths:
        where = f"{reader.file_of(f'{path}.{format.weight}')}: {path}.{format.weight}"
        if path not in layers:
            raise CheckpointError(f"{where} is in 4 bit, but the model has no such linear layer")
        if f"{path}.weight" in weights:
            raise CheckpointError(f"{where} is in 4 bit, and {path}.weight is there as well; one must go")
        weight: Any = linear_weight(layers[path])
        matrix = _matrix(format.open_weight(reader, path, tuple(weight.shape), settings))
        transposed = is_conv1d(layers[path])
        if not as_stored:
            keep = f"{path}.weight" in kept and not transposed
            weights[f"{path}.weight"] = DequantizedRows(matrix.shape, matrix.dequantize, keep, transposed=transposed)
        elif transposed:
            raise UnsupportedModelError(f"{where} is the weight of a transposed layer, which cannot be as stored")
        else:
            weights[f"{path}.weight"] = matrix
    return weights


def _matrix(weight: Int4Weight) -> StoredMatrix:
    order = input_order(weight.groups)
    rows = GroupedRows(weight.codes, weight.scale, weight.zero, weight.groups, order)
    return StoredMatrix(BLOCK_TYPES[weight.scale.dtype], len(weight.groups), rows, input_order=order)
