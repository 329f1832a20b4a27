"""The weights of a checkpoint directory, checked against its configuration and handed to transformers by name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.config_fields import check_fields
from gossamer.models.described import check_layers, check_size, described_model, settle_ties, untie
from gossamer.models.foreign_int4 import int4_format, read_int4
from gossamer.models.foreign_int8 import foreign_format, read_foreign
from gossamer.models.int8_quantizer import reading
from gossamer.models.json_file import read_object
from gossamer.models.mxfp4 import is_mxfp4, read_mxfp4
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.int8_linear import Int8Linear
from gossamer.nn.stored_linear import StoredLinear

GENERATION_CONFIG = "generation_config.json"


@contextmanager
def open_checkpoint(
    directory: Path,
    config: PreTrainedConfig,
    kind: Any = AutoModelForCausalLM,
    skip: Sequence[str] | None = None,
    *,
    as_stored: bool = False,
) -> Iterator[tuple[ShardReader, dict[str, Any]]]:
    """The reader of a directory, and its weights for ``from_pretrained(None, state_dict=...)``, unread.

    transformers by itself would read every tensor of every file, whatever the index says; so it is given the tensors.
    ``config`` is brought in line with the files: ties that are none, and formats of other projects that are translated.

    Args:
        directory: the checkpoint.
        config: of it.
        kind: transformers' auto class of the model.
        skip: layers that will not be quantized while they are read, and the other linear layers will be; ``None`` if
            none will be.
        as_stored: 4-bit weights are given as :class:`gossamer.nn.StoredMatrix`, and not in floating point.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, or far from what ``config`` describes.
        UnsupportedModelError: the weights are in a format that cannot be read exactly.
    """
    with ShardReader(directory) as reader, reading(reader):
        check_layers(config, reader)
        model = described_model(config, kind)
        check_size(model, reader)
        if not settle_ties(model, reader):
            untie(config)
        yield reader, _weights(reader, config, model, skip, as_stored)


def _weights(
    reader: ShardReader, config: PreTrainedConfig, model: nn.Module, skip: Sequence[str] | None, as_stored: bool
) -> dict[str, Any]:
    if int4 := int4_format(config):
        return read_int4(reader, config, int4, model, skip, as_stored=as_stored)
    if is_mxfp4(config):
        return read_mxfp4(reader, config, model, as_stored=as_stored)
    if as_stored:
        raise UnsupportedModelError(
            "none of the weights is in 4-bit blocks that could be computed with as they are stored; leave weights out"
        )
    int8 = foreign_format(config)
    return read_foreign(reader, config, int8, model) if int8 else reader.slices()


def check_loaded(model: PreTrainedModel, info: dict[str, Any], reader: ShardReader | None, where: Path) -> None:
    """Refuses a model that was not filled, and tensors of its layers that it has no place for.

    transformers fills what is missing with random numbers, and drops what is too much. Tensors of modules that the
    model does not have, such as further heads, stay unread.

    Args:
        model: as it was loaded.
        info: transformers' ``loading_info``.
        reader: of the checkpoint, if it is one of safetensors.
        where: it came from, for messages.

    Raises:
        CheckpointError: names a tensor.
    """
    # a pooling layer, which many checkpoints of encoders lack, comes last of all and has no say in reports
    if missing := sorted(name for name in info["missing_keys"] if not name.startswith("pooler.")):
        raise CheckpointError(f"the weights in {where} lack {len(missing)} tensors, among them {missing[0]}")
    layers = {name for name, module in model.named_modules() if _takes_all(module)}
    layers |= {f"{model.base_model_prefix}.{name}" for name in layers}
    for name in sorted(info["unexpected_keys"]):
        known = name.rpartition(".")[0] in layers
        if known and (reader is None or name not in reader.specs or bool(reader.tensor(name).any())):
            raise CheckpointError(
                f"the weights in {where} hold {name}, for which the model of its config.json has no place; it would be "
                "another model without. A setting that announces it may be missing in config.json."
            )


def _takes_all(module: nn.Module) -> bool:
    """Whether all tensors that a checkpoint has under a module's name belong to what it computes."""
    plain = isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm, Conv1D, Int8Linear, StoredLinear))
    return plain or type(module).__name__.endswith("RMSNorm")


def load_generation_config(model: PreTrainedModel, directory: Path) -> None:
    """Give a model the generation settings of a checkpoint: ``generation_config.json``, where there is one.

    Raises:
        CheckpointError: the file is damaged, or a value in it has no meaning.
    """
    file = directory / GENERATION_CONFIG
    if not model.can_generate() or not file.exists():
        return
    check_fields(fields := read_object(file), file)
    try:
        model.generation_config = GenerationConfig.from_dict(fields)
    except Exception as error:  # transformers checks the fields with assorted builtin errors
        raise CheckpointError(f"{file} has a value that is not understood: {error}") from error
