"""Int8 checkpoints of other projects, translated into Gossamer's own while they are read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from gossamer.errors import CheckpointError
from gossamer.models import bitsandbytes_int8, compressed_tensors_config, compressed_tensors_int8
from gossamer.models.int8_quantizer import GossamerInt8Config
from gossamer.models.shard_reader import ShardReader
from gossamer.models.shards import TensorSpec
from gossamer.nn.int8_weight import linear_weight


@dataclass(frozen=True)
class Format:
    """How one project's tensors and settings become ours; see the module of each."""

    read_config: Callable[[Mapping[str, Any]], dict[str, Any]]
    check_layers: Callable[[Mapping[str, TensorSpec]], list[str]]
    native_names: Callable[[str], str | None]
    native_tensor: Callable[[str, Tensor], Tensor | None]


_FORMATS = {
    method: Format(module.read_config, module.check_layers, module.native_names, module.native_tensor)
    for method, module in (
        (bitsandbytes_int8.QUANT_METHOD, bitsandbytes_int8),
        (compressed_tensors_config.QUANT_METHOD, compressed_tensors_int8),
    )
}


def foreign_format(config: PreTrainedConfig) -> Format | None:
    """The format of a checkpoint by its configuration, or ``None`` if it is none of those read here."""
    stored = getattr(config, "quantization_config", None)
    return _FORMATS.get(str(stored.get("quant_method"))) if isinstance(stored, dict) else None


def read_foreign(reader: ShardReader, config: PreTrainedConfig, format: Format, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint under our names; ``config`` then says that the checkpoint is our own.

    ``model`` is the one that ``config`` describes, without weights.

    Tensors are views of the mapped files, except for the scales.

    Raises:
        CheckpointError: a tensor is missing, damaged or of the wrong shape.
        UnsupportedModelError: the checkpoint is of a kind that cannot be read exactly; says why.
    """
    settings = format.read_config(config.quantization_config)
    del config.quantization_config
    tensors: dict[str, Tensor] = {}
    int8 = set(format.check_layers(reader.specs))
    for name in reader.specs:
        tensor = format.native_tensor(name, reader.tensor(name))
        if tensor is not None and (native := format.native_names(name)) is not None:
            tensors[native] = tensor
    # Which layers are int8 is told by the tensors; what the settings name may mean something else to their project.
    linear = {name for name, layer in model.named_modules() if linear_weight(layer) is not None}
    if strangers := sorted(int8 - linear):
        raise CheckpointError(f"{strangers[0]}.weight is int8, but the model has no such linear layer")
    settings["skip"] = [re.escape(name) for name in sorted(linear - int8)]
    config.quantization_config = GossamerInt8Config(**settings, outlier_store=0.0).to_dict()
    return tensors
