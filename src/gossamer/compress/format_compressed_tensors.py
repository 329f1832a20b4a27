"""W8A8 checkpoints of compressed-tensors (``int-quantized``), written.

A linear layer ``P`` has ``P.weight`` int8 [N, K] and ``P.weight_scale`` [N, 1], so a weight is about
``weight * weight_scale``. Activations are quantized per token when the model runs. There is no decomposition.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gossamer.compress.int8_checkpoint import NativeCheckpoint
from gossamer.compress.safetensors_export import Entry, entry, stored, translate, unquantized, write_directory
from gossamer.compress.skeleton import Skeleton, build_skeleton
from gossamer.errors import UnsupportedModelError
from gossamer.models.compressed_tensors_config import QUANT_METHOD
from gossamer.models.compressed_tensors_int8 import FORMAT
from gossamer.models.shards import Progress

_NO_DECOMPOSITION = (
    "compressed-tensors has no decomposition: whoever runs this checkpoint quantizes all activations to int8, outliers "
    "included, which costs quality where the model has outlier features"
)


def export_compressed_tensors(source: NativeCheckpoint, output: Path, progress: Progress) -> list[str]:
    """Writes ``source`` as a compressed-tensors checkpoint into the empty directory ``output``.

    Returns:
        What the reader will do differently, one sentence each.

    Raises:
        UnsupportedModelError: an int8 layer is not an ``nn.Linear``, or the model joins experts when it is loaded.
        CheckpointError: a tensor of ``source`` is wrong.
    """
    skeleton = build_skeleton(source.model_config)
    _refuse_joined_weights(source, skeleton)
    linears = {path for path, kind in skeleton.linears.items() if issubclass(kind, nn.Linear)}
    entries, layers = translate(source, skeleton, linears, lambda path: _quantized(source, path))
    config = _config(unquantized(source, skeleton, linears, layers))
    write_directory(source, output, entries, config, progress)
    warnings = [_NO_DECOMPOSITION]
    if stores := [path for path in layers if source.has_outlier_store(path)]:
        warnings.append(f"the 16-bit outlier columns of {len(stores)} layers are left out")
    return warnings


def _refuse_joined_weights(source: NativeCheckpoint, skeleton: Skeleton) -> None:
    """transformers takes experts that it joins when it loads them for quantized, whatever ``ignore`` says."""
    joined = [name for name, shape in skeleton.parameters.items() if len(shape) > 2 and name not in source.specs]
    if joined:
        raise UnsupportedModelError(
            f"{joined[0]} is put together from weights that stay in floating point; transformers reads "
            "compressed-tensors checkpoints of such a model only where these weights are quantized too"
        )


def _quantized(source: NativeCheckpoint, path: str) -> list[Entry]:
    return [
        stored(source, f"{path}.weight"),
        entry(f"{path}.weight_scale", source.scale(path)[:, None]),
    ]


def _config(ignore: list[str]) -> dict[str, Any]:
    symmetric_int8 = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "group_size": None,
        "block_structure": None,
        "actorder": None,
        "observer_kwargs": {},
    }
    weights = symmetric_int8 | {"strategy": "channel", "dynamic": False, "observer": "minmax"}
    activations = symmetric_int8 | {"strategy": "token", "dynamic": True, "observer": None}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
    }
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": {"group_0": group},
    }
