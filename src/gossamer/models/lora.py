"""LoRA adapters (arXiv 2106.09685) in PEFT's directories: what they add to the linear layers of a model.

An adapter adds ``scale * B A x`` to the product ``W x`` of a layer. Neither W nor its format changes, so an adapter
works on top of any of them, and stays in floating point.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gossamer.errors import AdapterError, CheckpointError, ModelNotFoundError
from gossamer.models.lora_config import ALL_LINEAR, CONFIG, LoraConfig
from gossamer.models.shard_reader import ShardReader

WEIGHTS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_PARTS = {".lora_A.weight": "down", ".lora_B.weight": "up"}


@dataclass(frozen=True)
class LowRank:
    """What an adapter adds to ``x W^T``: ``x down^T up^T``.

    Attributes:
        down: (r, K) fp32, A.
        up: (N, r) fp32, B times the scale.
    """

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return len(self.down)


@dataclass(frozen=True)
class Adapter:
    """An adapter of one model.

    Attributes:
        name: by which requests ask for it.
        layers: by the name of the linear layer, as transformers calls it.
        base: the model that it was trained on, as its author called it; ``None`` if that is not said.
    """

    name: str
    layers: Mapping[str, LowRank]
    base: str | None


def load_adapter(name: str, directory: str | Path, network: nn.Module) -> Adapter:
    """Read an adapter of a model.

    Args:
        name: by which requests ask for it.
        directory: with ``adapter_config.json`` and ``adapter_model.safetensors``, as PEFT's ``save_pretrained`` writes.
        network: the model, of transformers. Only the names and sizes of its layers are looked at.

    Raises:
        ModelNotFoundError: there is no such directory.
        CheckpointError: a file is missing or damaged, or its weights are pickled.
        AdapterError: it has a setting that cannot be computed here, or belongs to another model; says which layer.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ModelNotFoundError(f"the adapter {name!r}: there is no directory {directory}")
    config = LoraConfig.read(directory / CONFIG)
    file = directory / WEIGHTS
    if not file.exists() and (directory / _PICKLE).exists():
        raise CheckpointError(
            f"{directory} holds pickled weights ({_PICKLE}), and reading a pickle can run any code, so Gossamer never "
            "does. Convert them: load the adapter with PEFT where you trust it, then `save_pretrained(...)`."
        )
    layers = _targets(config, network, directory)
    with ShardReader([file]) as reader:
        names = _tensor_names(reader, file)
        if others := sorted(names.keys() - layers.keys()):
            raise AdapterError(
                f"{file} has weights for {others[0]}, which {_why_not(others[0], network)}; "
                f"is it an adapter of another model? {_trained_on(config)}"
            )
        return Adapter(
            name,
            {
                layer: _low_rank(layer, size, names.get(layer, {}), config, reader, file)
                for layer, size in layers.items()
            },
            config.base,
        )


def _targets(config: LoraConfig, network: nn.Module, directory: Path) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of the layers that the configuration names."""
    modules = {name: module for name, module in network.named_modules() if name}
    linear = {name: size for name, module in modules.items() if (size := _linear_size(module)) is not None}
    ends = {name for name, module in modules.items() if _is_end(module, network)}
    where = directory / CONFIG
    if config.targets == ALL_LINEAR:
        config = replace(config, targets=tuple(linear.keys() - ends))
    if unknown := config.unknown_targets(modules):
        raise AdapterError(
            f"{where}: target_modules has {unknown[0]!r}, and the model has no such layer; is it an adapter of another "
            f"model? {_trained_on(config)}"
        )
    chosen = [name for name in modules if config.adapts(name)]
    for name in chosen:
        if name in ends:
            raise AdapterError(
                f"{where}: target_modules has {name}, which reads tokens or writes logits; adapters of the linear "
                "layers between the two can be served"
            )
        if name not in linear:
            kind = type(modules[name]).__name__
            raise AdapterError(f"{where}: target_modules has {name}, a {kind}; only linear layers can be adapted here")
        if "experts" in name.split("."):
            raise AdapterError(
                f"{where}: target_modules has {name}; adapters of experts, which see only some tokens, cannot be served"
            )
    if not chosen:
        raise AdapterError(f"{where}: no layer of the model is left by target_modules and what restricts them")
    return {name: linear[name] for name in chosen}


def _linear_size(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    inputs, outputs = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return (inputs, outputs) if isinstance(inputs, int) and isinstance(outputs, int) else None


def _is_end(module: nn.Module, network: Any) -> bool:
    return module is network.get_input_embeddings() or module is network.get_output_embeddings()


def _tensor_names(reader: ShardReader, file: Path) -> dict[str, dict[str, str]]:
    """The names of the two tensors of each layer."""
    names: dict[str, dict[str, str]] = {}
    for tensor in reader.specs:
        end = next((each for each in _PARTS if tensor.endswith(each)), None)
        if end is None or not tensor.startswith(_PREFIX):
            raise AdapterError(
                f"{file} has {tensor}; only tensors called {_PREFIX}LAYER.lora_A.weight and "
                f"{_PREFIX}LAYER.lora_B.weight can be served"
            )
        names.setdefault(tensor[len(_PREFIX) : -len(end)], {})[_PARTS[end]] = tensor
    return names


def _low_rank(
    layer: str, size: tuple[int, int], names: Mapping[str, str], config: LoraConfig, reader: ShardReader, file: Path
) -> LowRank:
    rank, (inputs, outputs) = config.rank_of(layer), size
    for end, part in _PARTS.items():
        if part not in names:
            raise CheckpointError(f"{file} lacks {_PREFIX}{layer}{end}, which target_modules asks for")
    down = _matrix(names["down"], (rank, inputs), reader, file, config)
    up = _matrix(names["up"], (outputs, rank), reader, file, config)
    return LowRank(down, up * config.scale_of(layer))


def _matrix(name: str, shape: tuple[int, int], reader: ShardReader, file: Path, config: LoraConfig) -> Tensor:
    spec = reader.specs[name]
    if tuple(spec.shape) != shape:
        raise AdapterError(
            f"{file}: {name} is {tuple(spec.shape)}, and the model and the rank ask for {shape}; is it an adapter of "
            f"another model? {_trained_on(config)}"
        )
    if not spec.dtype.is_floating_point:
        raise CheckpointError(f"{file}: {name} has the dtype {spec.dtype}; it has to be a floating-point type")
    matrix = reader.tensor(name).to(torch.float32, copy=True)
    if not bool(matrix.isfinite().all()):
        raise CheckpointError(f"{file}: {name} holds numbers that are not finite; the file is damaged")
    return matrix


def _why_not(layer: str, network: nn.Module) -> str:
    known = any(name == layer for name, _ in network.named_modules())
    return "target_modules leaves out" if known else "the model does not have"


def _trained_on(config: LoraConfig) -> str:
    return f"It was trained on {config.base}." if config.base else "It does not say which it was trained on."
