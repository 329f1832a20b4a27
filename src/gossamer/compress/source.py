"""What exports read: a model's configuration, tokenizer files and weights by their names, in float32 and by rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from gguf import GGML_QUANT_SIZES
from torch import Tensor
from transformers import PreTrainedConfig

from gossamer.errors import ConfigurationError, ModelNotFoundError
from gossamer.models.checkpoint import check_directory
from gossamer.models.described import described_model, settle_ties, untie
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.load import load_config
from gossamer.models.shard_reader import ShardReader
from gossamer.models.shards import TensorSpec

_BLOCK_BYTES = 4 << 20  # small enough for the caches


class Source(Protocol):
    """A model to export.

    Attributes:
        directory: where its tokenizer is.
        model_config: its configuration, as transformers understands it.
        specs: dtype and shape of its weights by name.
    """

    @property
    def directory(self) -> Path: ...

    @property
    def model_config(self) -> PreTrainedConfig: ...

    @property
    def specs(self) -> Mapping[str, TensorSpec]: ...

    def row_blocks(self, name: str, order: Tensor | None = None) -> Iterator[Tensor]:
        """The weight called ``name`` in float32, in blocks of whole rows.

        Args:
            name: of a tensor of at least one dimension.
            order: the rows wanted, int64; all of them in their own order by default.

        Yields:
            ``[n, ...]``: at most 4 MB, or one row.
        """


class FloatCheckpoint(ShardReader):
    """A directory with weights in floating point; a context manager.

    Args:
        directory: the checkpoint.

    Attributes:
        directory: the checkpoint.
        model_config: of it.

    Raises:
        ModelNotFoundError: there is no such directory.
        ConfigurationError: its weights are quantized.
        CheckpointError: a file or tensor is missing or damaged.
        UnsupportedModelError: the model type or a dtype is unknown here.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is no directory; give the directory of a checkpoint")
        self.directory = directory
        self.model_config = load_config(directory)
        refuse_quantized(directory, self.model_config)
        check_directory(directory)
        super().__init__(directory)
        try:
            if not settle_ties(described_model(self.model_config), self):
                untie(self.model_config)
        except BaseException:
            self.close()
            raise

    def row_blocks(self, name: str, order: Tensor | None = None) -> Iterator[Tensor]:
        """See :class:`Source`."""
        return row_blocks(self.tensor(name), order)


class LoadedModel:
    """A model in memory.

    Args:
        network: a model of transformers, not quantized.
        directory: where its tokenizer is.
    """

    def __init__(self, network: Any, directory: Path) -> None:
        self.directory, self.model_config = directory, network.config
        self._parameters = dict(network.named_parameters())
        self.specs = {
            name: TensorSpec(name, value.dtype, tuple(value.shape)) for name, value in self._parameters.items()
        }

    def row_blocks(self, name: str, order: Tensor | None = None) -> Iterator[Tensor]:
        """See :class:`Source`."""
        return row_blocks(self._parameters[name].detach(), order)


def row_blocks(tensor: Tensor, order: Tensor | None = None) -> Iterator[Tensor]:
    """Rows of a tensor in float32; see :class:`Source`."""
    if order is None:
        order = torch.arange(tensor.shape[0])
    per_block = max(1, _BLOCK_BYTES // max(1, 4 * tensor[:1].numel()))
    return (tensor[rows].float() for rows in order.split(per_block))  # indexing copies


def refuse_quantized(path: Path, config: PreTrainedConfig) -> None:
    """Refuses what was quantized before: rounding it again would add one error to another.

    Raises:
        ConfigurationError: names the format.
    """
    if stored := getattr(config, "quantization_config", None):
        method = stored.get("quant_method") if isinstance(stored, dict) else type(stored).__name__
        raise ConfigurationError(f"{path} is quantized already ({method}); give the original checkpoint")


def refuse_quantized_gguf(path: Path) -> None:
    """Refuses a GGUF file whose layers have fewer than 8 bits a weight.

    Raises:
        ConfigurationError: names a tensor and its type.
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: a tensor is stored in a way that is unknown here.
    """
    for name, tensor in GGUFFile(path).tensors.items():
        block, block_bytes = GGML_QUANT_SIZES[tensor.type]
        if len(tensor.shape) > 1 and name.startswith("blk.") and block_bytes < block:
            raise ConfigurationError(
                f"{path} is quantized already: {name}, at byte {tensor.mapped.offset} of the file, is "
                f"{tensor.type.name}, {8 * block_bytes / block:.3g} bits a weight; give the original checkpoint"
            )
