"""LLM.int8() checkpoints of bitsandbytes, written.

A linear layer ``P`` has ``P.weight`` int8 [N, K], ``P.SCB`` float32 [N] with the largest magnitude of each row, and
``P.weight_format`` uint8 [], 0 for rows. So a weight is about ``weight * SCB[:, None] / 127``. It is the only foreign
format that carries the decomposition's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.quantizers_utils import should_convert_module

from gossamer.compress.int8_checkpoint import NativeCheckpoint
from gossamer.compress.safetensors_export import Entry, entry, stored, translate, unquantized, write_directory
from gossamer.compress.skeleton import Skeleton, build_skeleton
from gossamer.errors import UnsupportedModelError
from gossamer.models.bitsandbytes_int8 import PAPER_THRESHOLD, QUANT_METHOD, ROW_FORMAT
from gossamer.models.shards import Progress


def export_bitsandbytes(source: NativeCheckpoint, output: Path, progress: Progress) -> list[str]:
    """Writes ``source`` as a bitsandbytes checkpoint into the empty directory ``output``.

    Returns:
        What the reader will do differently, one sentence each.

    Raises:
        UnsupportedModelError: an int8 layer is of a kind that transformers would not load as int8.
        CheckpointError: a tensor of ``source`` is wrong.
    """
    skeleton = build_skeleton(source.model_config)
    # Subclasses of nn.Linear are left alone by transformers.
    linears = {path for path, kind in skeleton.linears.items() if kind is nn.Linear or issubclass(kind, Conv1D)}
    entries, layers = translate(source, skeleton, linears, lambda path: _quantized(source, path))
    skip = unquantized(source, skeleton, linears, layers)
    _check_skip(skip, skeleton, layers)
    write_directory(source, output, entries, _config(source.quantization, skip), progress)
    return _warnings(source, layers)


def _quantized(source: NativeCheckpoint, path: str) -> list[Entry]:
    return [
        stored(source, f"{path}.weight"),
        entry(f"{path}.SCB", source.scale(path) * 127),
        entry(f"{path}.weight_format", torch.tensor(ROW_FORMAT, dtype=torch.uint8)),
    ]


def _check_skip(skip: list[str], skeleton: Skeleton, layers: list[str]) -> None:
    """transformers takes names to skip as patterns and as endings, so a name might skip more than itself."""
    patterns = [*skip, *skeleton.kept_in_fp32]
    if lost := [path for path in layers if not should_convert_module(path, patterns)]:
        raise UnsupportedModelError(
            f"bitsandbytes' configuration cannot say that {lost[0]} is int8 while the layers {', '.join(skip[:5])} are "
            "not: the name of one is the end of the other. Quantize both or none of them."
        )


def _threshold(quantization: Mapping[str, Any]) -> float:
    """bitsandbytes' threshold: 0 means no decomposition; a relative one cannot be expressed."""
    if quantization.get("outliers") is None:
        return 0.0
    if quantization.get("criterion") == "absolute":
        return float(quantization.get("threshold", PAPER_THRESHOLD))
    return PAPER_THRESHOLD


def _config(quantization: Mapping[str, Any], skip: list[str]) -> dict[str, Any]:
    return {
        "quant_method": QUANT_METHOD,
        "_load_in_8bit": True,
        "_load_in_4bit": False,
        "load_in_8bit": True,
        "load_in_4bit": False,
        "llm_int8_threshold": _threshold(quantization),
        "llm_int8_skip_modules": skip,
        "llm_int8_enable_fp32_cpu_offload": False,
        "llm_int8_has_fp16_weight": False,
        # Settings of the 4-bit format, which transformers writes and expects in any case.
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
    }


def _warnings(source: NativeCheckpoint, layers: list[str]) -> list[str]:
    quantization = source.quantization
    criterion, outliers = quantization.get("criterion"), quantization.get("outliers")
    warnings = []
    if outliers is not None and criterion != "absolute":
        warnings.append(
            f"bitsandbytes knows absolute thresholds only: llm_int8_threshold is {PAPER_THRESHOLD}, in place of "
            f"{quantization.get('threshold')} times the mean magnitude of a token"
        )
    if outliers is not None and outliers != "batch":
        warnings.append(
            "bitsandbytes takes a column as an outlier for all tokens of a batch if it is one for any of them, so its "
            "results depend on what else is in the batch"
        )
    stores = [path for path in layers if source.has_outlier_store(path)]
    if stores:
        warnings.append(
            f"bitsandbytes multiplies outliers by the int8 weights: the 16-bit columns of {len(stores)} layers are "
            "left out"
        )
    return warnings
