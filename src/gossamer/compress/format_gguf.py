"""GGUF files with Q8_0 weights, for llama.cpp and what is built on it.

Q8_0 keeps 32 consecutive weights of a row as int8 codes and one float16 scale. Native weights have one scale per row,
so they are dequantized, exact outlier columns included, and quantized again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from gguf import (
    GGML_QUANT_SIZES,
    GGUF_DEFAULT_ALIGNMENT,
    MODEL_TENSOR,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFWriter,
    get_tensor_name_map,
)
from gguf.quants import quantize
from torch import Tensor
from transformers import PreTrainedConfig

from gossamer.compress.gguf_metadata import Architecture, add_metadata, find_architecture, rotary_factors
from gossamer.compress.gguf_tokenizer import add_tokenizer
from gossamer.compress.int8_checkpoint import NativeCheckpoint
from gossamer.compress.skeleton import build_skeleton
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.shards import Progress

_NO_DECOMPOSITION = (
    "GGUF has no decomposition: readers quantize activations in blocks of 32, outliers included; an outlier coarsens "
    "the 31 values beside it, and not the whole row"
)


class _Weight(NamedTuple):
    """A tensor of the file, and a function that computes its rows in float32 when their turn comes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def nbytes(self) -> int:
        block_size, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block_size * block_bytes


def export_gguf(source: NativeCheckpoint, output: Path, progress: Progress) -> list[str]:
    """Writes ``source`` as the GGUF file ``output``, which does not exist yet.

    Returns:
        What a reader will do differently, one sentence each.

    Raises:
        UnsupportedModelError: GGUF cannot express the architecture, a setting of it, or the tokenizer.
        CheckpointError: a tensor of ``source`` is wrong or missing.
    """
    config = source.model_config
    architecture = find_architecture(config)
    weights = _weights(source, config, architecture)
    writer = GGUFWriter(output, architecture.name)
    warnings = [_NO_DECOMPOSITION, *add_metadata(writer, config, source.directory.name)]
    warnings += add_tokenizer(writer, source.directory, config)
    _write_header(writer, weights)
    _write_data(output, weights, progress)
    if halves := [weight.name for weight in weights if weight.kind == GGMLQuantizationType.F16]:
        warnings.append(
            f"the rows of {len(halves)} tensors, among them {halves[0]}, are not a multiple of 32 long: they are F16"
        )
    return warnings


def _weights(source: NativeCheckpoint, config: PreTrainedConfig, architecture: Architecture) -> list[_Weight]:
    """All tensors, in the order of the model."""
    names = get_tensor_name_map(architecture.gguf, config.num_hidden_layers)
    weights = []
    for name, shape in build_skeleton(config).parameters.items():
        module, _, last = name.rpartition(".")
        gguf_name = names.get_name(module)
        if gguf_name is None or (last == "bias" and module.rpartition(".")[2] not in architecture.biases):
            raise UnsupportedModelError(f"{name} has no place in a GGUF file of the architecture {architecture.name}")
        if name not in source.specs or source.specs[name].shape != shape:
            found = list(source.specs[name].shape) if name in source.specs else "missing"
            raise CheckpointError(f"{name} is {found}; the model needs {list(shape)}")
        order = _row_order(gguf_name, shape, config) if architecture.rotary_pairs else None
        offset = architecture.norm_offset if gguf_name.endswith("norm") else 0.0
        weights.append(_Weight(f"{gguf_name}.{last}", _kind(shape), shape, _blocks(source, name, order, offset)))
    if (factors := rotary_factors(config)) is not None:
        name = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
        weights.append(_Weight(name, GGMLQuantizationType.F32, tuple(factors.shape), lambda: iter((factors,))))
    return weights


def _kind(shape: tuple[int, ...]) -> GGMLQuantizationType:
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    block_size, _ = GGML_QUANT_SIZES[GGMLQuantizationType.Q8_0]
    return GGMLQuantizationType.F16 if shape[-1] % block_size else GGMLQuantizationType.Q8_0


def _row_order(gguf_name: str, shape: tuple[int, ...], config: PreTrainedConfig) -> Tensor | None:
    """transformers rotates row i of a head with row i + half of it; ggml rotates neighbours."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        gguf_name.rpartition(".")[2]
    )
    return None if heads is None else torch.arange(shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()


def _blocks(source: NativeCheckpoint, name: str, order: Tensor | None, offset: float) -> Callable[[], Iterator[Tensor]]:
    return lambda: (block + offset if offset else block for block in source.row_blocks(name, order))


def _write_header(writer: GGUFWriter, weights: list[_Weight]) -> None:
    """Everything but the weights; the writer would want those in memory."""
    for weight in weights:
        writer.add_tensor_info(weight.name, weight.shape, np.dtype(np.float32), weight.nbytes, raw_dtype=weight.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _write_data(path: Path, weights: list[_Weight], progress: Progress) -> None:
    total = sum(weight.nbytes for weight in weights)
    done = 0
    with path.open("ab") as file:
        _pad(file)
        for weight in weights:
            for block in weight.blocks():
                data = quantize(block.numpy(), weight.kind)
                file.write(data.data)
                done += data.nbytes
                progress(done, total)
            _pad(file)


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
