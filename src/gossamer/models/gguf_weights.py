"""The weights of a GGUF file under the names transformers gives them, dequantized when they are asked for, by rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    Gemma2TensorProcessor,
    LlamaTensorProcessor,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from gossamer.errors import CheckpointError
from gossamer.models.convert import check_magic, gguf_alone
from gossamer.models.quiet import quiet_transformers
from gossamer.nn.int8_weight import linear_weight
from gossamer.nn.quantize import find_skipped
from gossamer.ops.int8 import piece_rows

# What these do to a matrix of the file is at most a permutation of its rows; others transpose it or take it apart.
_STREAMABLE = (TensorProcessor, LlamaTensorProcessor, Gemma2TensorProcessor)


class GGUFMatrix:
    """A matrix (N, K) of a GGUF file: ``matrix[a:b]`` dequantizes these rows to fp32.

    transformers materializes what it loads with ``[...]`` and ``to``. The weight of a linear layer stays as it is
    then, so that it reaches the quantizer unread; other matrices, such as an embedding or a skipped layer, are read.
    """

    def __init__(self, tensor: gguf.ReaderTensor, order: np.ndarray, linear: bool) -> None:
        self._tensor = tensor
        self._order = order
        self._linear = linear
        inputs, outputs = (int(size) for size in tensor.shape)  # GGUF lists the fastest dimension first
        self.shape = torch.Size((outputs, inputs))

    def __getitem__(self, rows: Any) -> Any:
        if rows is Ellipsis:
            return self if self._linear else self._read()
        data = self._tensor.data[self._order[rows]]
        return torch.from_numpy(gguf.quants.dequantize(data, self._tensor.tensor_type).astype(np.float32, copy=False))

    def to(self, **kwargs: Any) -> GGUFMatrix:
        return self

    def _read(self) -> Tensor:
        """All of it, with little memory beside the result."""
        result = torch.empty(self.shape)
        step = piece_rows(self.shape[1])
        for start in range(0, self.shape[0], step):
            result[start : start + step] = self[start : start + step]
        return result


class GGUFTensor:
    """A tensor of a GGUF file that is no matrix of plain rows; ``[...]`` dequantizes it."""

    def __init__(self, tensor: gguf.ReaderTensor, processor: TensorProcessor) -> None:
        self._tensor = tensor
        self._processor = processor

    def __getitem__(self, rows: Any) -> Tensor:
        weights = gguf.quants.dequantize(self._tensor.data, self._tensor.tensor_type)
        return torch.from_numpy(np.array(self._processor.process(weights, self._tensor.name).weights))


def can_stream(path: Path) -> bool:
    """Whether the weights of a file can be read by rows: that depends on its architecture."""
    check_magic(path)
    try:
        field = gguf.GGUFReader(path).fields["general.architecture"]
    except (ValueError, KeyError, OSError, IndexError) as error:
        raise CheckpointError(f"{path} cannot be read; it may be damaged or incomplete: {error}") from error
    return _processor_of(field.contents()) in _STREAMABLE


def read_gguf(path: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """Configuration and tokenizer of a GGUF file.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: transformers does not know the file's architecture.
    """
    with gguf_alone(path) as options, quiet_transformers():
        return AutoConfig.from_pretrained(**options), AutoTokenizer.from_pretrained(**options)


def open_weights(path: Path, config: PreTrainedConfig, skip: Sequence[str] = ()) -> dict[str, GGUFMatrix | GGUFTensor]:
    """The weights of a file by transformers' names; nothing of them is read yet.

    Args:
        path: the file; :func:`can_stream` is true of it.
        config: the model's.
        skip: layers that will not be quantized, as in :func:`gossamer.models.quantize.quantize`.
    """
    reader = gguf.GGUFReader(path)
    processor = _processor_of(reader.fields["general.architecture"].contents())(config=config.to_dict())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    names = get_gguf_hf_weights_map(model, processor)
    skipped = find_skipped(model, skip)
    linear = {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if linear_weight(layer) is not None and name not in skipped
    }
    result: dict[str, GGUFMatrix | GGUFTensor] = {}
    for tensor in reader.tensors:
        name = names.get(tensor.name)
        if name is not None:
            order = _row_order(tensor, processor)
            result[name] = GGUFTensor(tensor, processor) if order is None else GGUFMatrix(tensor, order, name in linear)
    return result


def _processor_of(architecture: str) -> type[TensorProcessor]:
    return TENSOR_PROCESSORS.get(architecture, TensorProcessor)


def _row_order(tensor: gguf.ReaderTensor, processor: TensorProcessor) -> np.ndarray | None:
    """Which row of the file each row of the weight is, or ``None`` if the weight is not the file's rows in some order.

    The processor is asked what it does to a matrix of one column that holds the numbers of its rows.
    """
    if len(tensor.shape) != 2:
        return None
    numbers = np.arange(int(tensor.shape[1]), dtype=np.int64)
    moved = processor.process(numbers[:, None].copy(), tensor.name).weights
    rows = moved is not None and moved.shape == (len(numbers), 1) and np.array_equal(np.sort(moved[:, 0]), numbers)
    return moved[:, 0] if rows else None
