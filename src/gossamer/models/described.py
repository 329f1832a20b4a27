"""The model that a configuration describes, without memory for its weights, and whether a checkpoint can be it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from gossamer.errors import CheckpointError
from gossamer.models.shard_reader import ShardReader

_SPARE = 1 << 26  # entries that no checkpoint stores: tables of positions and the like
_PACKED = 16  # entries that one stored entry may hold, in 2-bit formats


def described_model(config: PreTrainedConfig, kind: Any = AutoModelForCausalLM) -> nn.Module:
    """Builds the model on the ``meta`` device.

    Args:
        config: says what it is.
        kind: one of transformers' auto classes.

    Raises:
        CheckpointError: no model can be built from these values.

    >>> from transformers import LlamaConfig
    >>> described_model(LlamaConfig(num_hidden_layers=1)).lm_head.weight.is_meta
    True
    """
    try:
        with torch.device("meta"):
            model: nn.Module = kind.from_config(config)
    except Exception as error:  # modules compute with the sizes: division by zero, overflow, any builtin error
        raise CheckpointError(f"no {config.model_type} model can be built from its config.json: {error}") from error
    return model


def check_layers(config: PreTrainedConfig, reader: ShardReader) -> None:
    """Refuses more layers than there are tensors, before any is made.

    Raises:
        CheckpointError: says how many there are.
    """
    layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", 0)
    if isinstance(layers, int) and layers > len(reader.specs):
        raise CheckpointError(
            f"config.json: num_hidden_layers is {layers}, and the weights have {len(reader.specs)} tensors in all"
        )


def check_size(model: nn.Module, reader: ShardReader) -> None:
    """Refuses a model far larger than its checkpoint, before memory is taken for it.

    Raises:
        CheckpointError: says how many entries the model and the files have.
    """
    wanted = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    there = sum(math.prod(spec.shape) for spec in reader.specs.values())
    if wanted > _PACKED * there + _SPARE:
        raise CheckpointError(
            f"config.json describes a model of {wanted:,} numbers, and the weights hold {there:,}: a size or the "
            "number of layers in it is wrong, or files are missing"
        )


def settle_ties(model: nn.Module, reader: ShardReader) -> bool:
    """Whether ties that the configuration declares are ties in the checkpoint.

    ``tie_word_embeddings`` is a claim; the weights decide. An output layer with weights of its own in the files, other
    than those of the embedding, is not tied, as transformers has it, too. ``model`` then says so, its configuration
    included.

    Args:
        model: of transformers, from the checkpoint's configuration, without weights.
        reader: of the checkpoint.

    Returns:
        Whether they are.
    """
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    untied = [target for target, source in ties.items() if _differ(reader, target, source, prefix)]
    config: Any = getattr(model, "config", None)
    for target in untied:
        del ties[target]
    if untied:
        untie(config)
    return not untied


def untie(config: PreTrainedConfig) -> None:
    """Say in a configuration that the output layer has weights of its own."""
    for part in (config, config.get_text_config(decoder=True)):
        part.tie_word_embeddings = False


def _differ(reader: ShardReader, target: str, source: str, prefix: str) -> bool:
    """Whether both ends of a tie are stored, with different content: codes, scales, or floating-point weights."""
    own, other = _stored(reader, target, prefix), _stored(reader, source, prefix)
    if not own or not other:
        return False
    if own.keys() != other.keys():
        return True
    pairs = ((reader.tensor(own[last]), reader.tensor(other[last])) for last in own)
    return not all(_same(left, right) for left, right in pairs)


def _stored(reader: ShardReader, weight: str, prefix: str) -> Mapping[str, str]:
    """The tensors that make up a weight, by the last part of their names.

    A checkpoint may have the module under its name in the model, under that in the model's body, or in a place that
    transformers renames; then its own name, the last part of the path, tells it.
    """
    modules: dict[str, dict[str, str]] = {}
    for name in reader.specs:
        path, _, last = name.rpartition(".")
        if last != "bias":
            modules.setdefault(path, {})[last] = name
    path = weight.rpartition(".")[0]
    alike = [each for each in modules if each.rpartition(".")[2] == path.rpartition(".")[2]]
    places = (path, path.removeprefix(prefix), *(alike if len(alike) == 1 else ()))
    return next((modules[place] for place in places if place in modules), {})


def _same(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape:
        return False
    return torch.equal(left, right) if left.dtype == right.dtype else torch.equal(left.float(), right.float())
