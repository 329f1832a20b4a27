"""What the tests of exports and of other projects' checkpoints share."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from gossamer.models import bitsandbytes_int8, compressed_tensors_int8
from gossamer.models.shard_reader import ShardReader

SAFETENSORS = {"bitsandbytes": bitsandbytes_int8, "compressed-tensors": compressed_tensors_int8}


def quantization_config(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text())["quantization_config"]


def read_as_native(directory: Path, foreign: ModuleType) -> dict[str, Tensor]:
    """What a loader does with a foreign checkpoint."""
    tensors = {}
    with ShardReader(directory) as reader:
        foreign.check_layers(reader.specs)
        for name in reader.specs:
            tensor = foreign.native_tensor(name, reader.tensor(name))
            native_name = foreign.native_names(name)
            assert (tensor is None) == (native_name is None)
            if tensor is not None and native_name is not None:
                tensors[native_name] = tensor.clone()
    return tensors


LAYER = "model.layers.0.mlp.up_proj"
