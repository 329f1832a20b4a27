"""GGUF files, for llama.cpp and what is built on it.

Weights are quantized while they are written: rounded to the nearest points of the grid that fits them best. Those that
were rounded before, on a grid of their own, are given as blocks. Native int8 weights have one scale per row, so they
are dequantized, exact outlier columns included, and quantized again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
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

from gossamer.compress.block_types import GGUF_TYPES, check_weight
from gossamer.compress.gguf_metadata import Architecture, add_metadata, find_architecture, rotary_factors
from gossamer.compress.gguf_tokenizer import add_tokenizer
from gossamer.compress.mixtures import MIXTURES, Mixture, Place
from gossamer.compress.skeleton import Skeleton, build_skeleton
from gossamer.compress.source import Source
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.shards import Progress


class Blocks(NamedTuple):
    """A weight that is rounded already: (N, bytes of a row) uint8 of a type of ggml, rows in the model's order."""

    type: str
    rows: Tensor


class _Weight(NamedTuple):
    """A tensor of the file, and a function that gives its rows as they are stored when their turn comes."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    blocks: Callable[[], Iterator[np.ndarray]]

    @property
    def nbytes(self) -> int:
        block_size, block_bytes = GGML_QUANT_SIZES[self.kind]
        return prod(self.shape) // block_size * block_bytes


def export_gguf(
    source: Source,
    output: Path,
    progress: Progress,
    mixture: Mixture = MIXTURES["q8_0"],
    rounded: Mapping[str, Blocks] | None = None,
    keys: Mapping[str, str] | None = None,
) -> list[str]:
    """Writes ``source`` as the GGUF file ``output``, which does not exist yet.

    Args:
        source: the model.
        output: the file.
        progress: called after each block of rows.
        mixture: types of the weights.
        rounded: weights by name that are written as they are.
        keys: further texts in the file, by name.

    Returns:
        What a reader will do differently, one sentence each.

    Raises:
        UnsupportedModelError: GGUF cannot express the architecture, a setting of it, or the tokenizer.
        CheckpointError: a tensor of ``source`` is wrong or missing.
    """
    config = source.model_config
    architecture = find_architecture(config)
    weights = _weights(source, config, architecture, mixture, rounded or {})
    writer = GGUFWriter(output, architecture.name)
    warnings = add_metadata(writer, config, source.directory.name, mixture.file_type)
    warnings += add_tokenizer(writer, source.directory, config)
    for key, text in (keys or {}).items():
        writer.add_string(key, text)
    _write_header(writer, weights)
    _write_data(output, weights, progress)
    if halves := [weight.name for weight in weights if weight.kind == GGMLQuantizationType.F16]:
        warnings.append(
            f"the rows of {len(halves)} tensors, among them {halves[0]}, are not a multiple of 32 long: they are F16"
        )
    return warnings


def check_exportable(source: Source) -> None:
    """Refuses before any work what :func:`export_gguf` would refuse of the model and its tokenizer.

    Raises:
        UnsupportedModelError: GGUF cannot express it.
    """
    architecture = find_architecture(source.model_config)
    writer = GGUFWriter(None, architecture.name)
    add_metadata(writer, source.model_config, source.directory.name, MIXTURES["q8_0"].file_type)
    add_tokenizer(writer, source.directory, source.model_config)
    _weights(source, source.model_config, architecture, MIXTURES["q8_0"], {})


def weight_types(config: PreTrainedConfig, mixture: Mixture) -> dict[str, GGMLQuantizationType]:
    """The type of each weight of a model by its name.

    Raises:
        UnsupportedModelError: the architecture cannot be exported.
    """
    architecture = find_architecture(config)
    skeleton = build_skeleton(config)
    return {
        name: mixture.type_of(_place(_gguf_name(name, architecture, config), skeleton, config), shape)
        for name, shape in skeleton.parameters.items()
    }


def _weights(
    source: Source,
    config: PreTrainedConfig,
    architecture: Architecture,
    mixture: Mixture,
    rounded: Mapping[str, Blocks],
) -> list[_Weight]:
    """All tensors, in the order of the model."""
    skeleton = build_skeleton(config)
    weights = []
    for name, shape in skeleton.parameters.items():
        gguf_name = _gguf_name(name, architecture, config)
        if name not in source.specs or source.specs[name].shape != shape:
            found = list(source.specs[name].shape) if name in source.specs else "missing"
            raise CheckpointError(f"{name} is {found}; the model needs {list(shape)}")
        module = gguf_name.rpartition(".")[0]
        order = _row_order(module, shape, config) if architecture.rotary_pairs else None
        if name in rounded:
            kind = GGMLQuantizationType[rounded[name].type]
            blocks = partial(_rounded_blocks, rounded[name].rows, order)
        else:
            kind = mixture.type_of(_place(gguf_name, skeleton, config), shape)
            offset = architecture.norm_offset if module.endswith("norm") else 0.0
            blocks = partial(_encoded_blocks, source, name, order, offset, kind)
        weights.append(_Weight(gguf_name, kind, shape, blocks))
    if (factors := rotary_factors(config)) is not None:
        name = f"{TENSOR_NAMES[MODEL_TENSOR.ROPE_FREQS]}.weight"
        shape = tuple(factors.shape)
        weights.append(_Weight(name, GGMLQuantizationType.F32, shape, lambda: iter((factors.numpy(),))))
    return weights


def _gguf_name(name: str, architecture: Architecture, config: PreTrainedConfig) -> str:
    """``blk.0.attn_q.weight``, for example.

    Raises:
        UnsupportedModelError: the file has no place for it.
    """
    module, _, last = name.rpartition(".")
    found = get_tensor_name_map(architecture.gguf, config.num_hidden_layers).get_name(module)
    if found is None or (last == "bias" and module.rpartition(".")[2] not in architecture.biases):
        raise UnsupportedModelError(f"{name} has no place in a GGUF file of the architecture {architecture.name}")
    return f"{found}.{last}"


def _place(gguf_name: str, skeleton: Skeleton, config: PreTrainedConfig) -> Place:
    parts = gguf_name.split(".")
    role, layer = parts[-2], int(parts[1]) if parts[0] == "blk" else 0
    if role == "token_embd" and skeleton.tied:
        role = "output"
    return Place(role, layer, config.num_hidden_layers)


def _row_order(gguf_name: str, shape: tuple[int, ...], config: PreTrainedConfig) -> Tensor | None:
    """transformers rotates row i of a head with row i + half of it; ggml rotates neighbours."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}.get(
        gguf_name.rpartition(".")[2]
    )
    return None if heads is None else torch.arange(shape[0]).view(heads, 2, -1).transpose(1, 2).flatten()


def _rounded_blocks(rows: Tensor, order: Tensor | None) -> Iterator[np.ndarray]:
    yield (rows if order is None else rows[order]).contiguous().numpy()


def _encoded_blocks(
    source: Source, name: str, order: Tensor | None, offset: float, kind: GGMLQuantizationType
) -> Iterator[np.ndarray]:
    for block in source.row_blocks(name, order):
        yield _encode(block + offset if offset else block, kind, name)


def _encode(rows: Tensor, kind: GGMLQuantizationType, name: str) -> np.ndarray:
    if kind.name not in GGUF_TYPES or kind == GGMLQuantizationType.Q8_0:  # of which a search would gain nothing
        return quantize(rows.numpy(), kind)
    check_weight(rows, name)
    grid = GGUF_TYPES[kind.name].fit(rows)
    return GGUF_TYPES[kind.name].pack(grid, grid.codes(rows))["blocks"].numpy()


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
            for data in weight.blocks():
                file.write(data.data)
                done += data.nbytes
                progress(done, total)
            _pad(file)


def _pad(file: IO[bytes]) -> None:
    file.write(bytes(-file.tell() % GGUF_DEFAULT_ALIGNMENT))
