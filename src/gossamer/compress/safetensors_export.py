"""What the exports to safetensors checkpoints share: which tensor becomes which, and writing the directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.compress.int8_checkpoint import LAYER_TENSORS, NativeCheckpoint
from gossamer.compress.skeleton import Skeleton
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.checkpoint import WEIGHTS_INDEX
from gossamer.models.manifest import MANIFEST
from gossamer.models.shards import Progress, ShardWriter, TensorSpec

_NOT_COPIED_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".gguf")
_NOT_COPIED = ("config.json", WEIGHTS_INDEX, MANIFEST)


class Entry(NamedTuple):
    """A tensor to write: what it is, and a function that computes its blocks of rows when their turn comes."""

    spec: TensorSpec
    blocks: Callable[[], Iterator[Tensor]]


def entry(name: str, tensor: Tensor) -> Entry:
    """A tensor that exists already, or is a view of a file."""
    return Entry(TensorSpec(name, tensor.dtype, tuple(tensor.shape)), lambda: iter((tensor,)))


def stored(source: NativeCheckpoint, name: str) -> Entry:
    """A tensor of the checkpoint, which is read when its turn comes: it may have to be expanded."""
    return Entry(source.specs[name], lambda: iter((source.tensor(name),)))


def translate(
    source: NativeCheckpoint,
    skeleton: Skeleton,
    linears: Collection[str],
    quantized: Callable[[str], list[Entry]],
) -> tuple[list[Entry], list[str]]:
    """Decides what becomes of every tensor of a native checkpoint.

    Quantized linear layers go through ``quantized``. Quantized embeddings are dequantized to the checkpoint's dtype: no
    other project reads int8 embeddings. Weights that the model ties to another one are left out. The rest stays.

    Args:
        source: the native checkpoint.
        skeleton: its model.
        linears: paths of the layers that the format can hold as int8.
        quantized: gives the tensors of a linear layer, but for its bias, from its path.

    Returns:
        The tensors to write, and the paths of the layers that stay int8.

    Raises:
        UnsupportedModelError: an int8 weight belongs to a kind of module that the format cannot hold.
        CheckpointError: an int8 weight belongs to no module of the model.
    """
    entries: list[Entry] = []
    layers: list[str] = []
    for name in source.specs:
        path, _, last = name.rpartition(".")
        if last in LAYER_TENSORS and skeleton.tied.get(f"{path}.weight") in source.specs:
            continue
        if path not in source.layers or last not in LAYER_TENSORS:
            entries.append(entry(name, source.tensor(name)))
        elif last == "weight" and path in linears:
            entries += quantized(path)
            layers.append(path)
        elif last == "weight":
            entries.append(_dequantized(source, skeleton, path))
    return entries, layers


def unquantized(source: NativeCheckpoint, skeleton: Skeleton, linears: Collection[str], layers: list[str]) -> list[str]:
    """Names of the layers that stay in floating point, sorted: what readers would else take for quantized.

    Beside those of the model's own modules, these are names under which the checkpoint stores parts of a module, such
    as the experts that transformers joins when it loads them; other readers may have a layer for each.
    """
    stored = {name.rpartition(".")[0] for name, spec in source.specs.items() if len(spec.shape) == 2}
    return sorted((stored | set(linears)).difference(layers, skeleton.embeddings))


def _dequantized(source: NativeCheckpoint, skeleton: Skeleton, path: str) -> Entry:
    if path in skeleton.linears:
        kind = skeleton.linears[path].__name__
        raise UnsupportedModelError(f"{path} is a {kind}; this format holds no int8 weights of such a module")
    if path not in skeleton.embeddings:
        raise CheckpointError(f"{path}.weight is int8, but the model has no linear layer or embedding {path}")
    dtype = source.model_config.dtype or torch.float16
    spec = TensorSpec(f"{path}.weight", dtype, source.specs[f"{path}.weight"].shape)
    return Entry(spec, lambda: (block.to(dtype) for block in source.row_blocks(spec.name)))


def write_directory(
    source: NativeCheckpoint, output: Path, entries: list[Entry], quantization: dict[str, Any], progress: Progress
) -> None:
    """Writes a Hugging Face checkpoint; the tokenizer and all other small files are copied from ``source``.

    Args:
        source: the checkpoint that is exported.
        output: an empty directory.
        entries: the tensors.
        quantization: the ``quantization_config`` of ``config.json``.
        progress: called after each block.
    """
    for path in source.directory.iterdir():
        if path.is_file() and path.suffix not in _NOT_COPIED_SUFFIXES and path.name not in _NOT_COPIED:
            shutil.copyfile(path, output / path.name)
    config = source.config | {"quantization_config": quantization}
    (output / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    total = sum(entry.spec.nbytes for entry in entries)
    done = 0
    with ShardWriter(output, [entry.spec for entry in entries]) as writer:
        for spec, blocks in entries:
            for block in blocks():
                writer.write(spec.name, block)
                done += block.nbytes
                progress(done, total)
