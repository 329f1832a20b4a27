"""A weight becomes int8 codes piece by piece, so that no second floating-point copy of it ever exists."""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.ops.int8 import FLOAT_TYPES, piece_rows, quantize_rowwise


class Rows(Protocol):
    """A matrix that can be read a block of rows at a time: a tensor, perhaps mapped from a file, or a reader of one."""

    @property
    def shape(self) -> torch.Size: ...

    def __getitem__(self, rows: slice, /) -> Tensor: ...


class Int8Weight(NamedTuple):
    """A quantized weight: ``W ~= codes * scale[:, None]``.

    Attributes:
        codes: (N, K) int8 in [-127, 127].
        scale: (N) fp32.
        relative_error: Frobenius norm of the error over that of W; 0 for a weight of zeros.
    """

    codes: Tensor
    scale: Tensor
    relative_error: float


def quantize_weight(weight: Rows, name: str = "the weight") -> Int8Weight:
    """Row-wise absmax quantization (see :func:`gossamer.ops.int8.quantize_rowwise`), about 1 MB at a time.

    Args:
        weight: (N, K), fp32, bf16 or fp16.
        name: of the weight, for errors.

    Raises:
        ConfigurationError: another type, or an entry that is NaN or infinite.

    >>> quantize_weight(torch.tensor([[1.0, -2.0]])).codes
    tensor([[  64, -127]], dtype=torch.int8)
    """
    outputs, inputs = weight.shape
    codes, scale = torch.empty(outputs, inputs, dtype=torch.int8), torch.empty(outputs)
    error = norm = 0.0
    step = piece_rows(inputs)
    for start in range(0, outputs, step):
        piece = weight[start : start + step]
        if piece.dtype not in FLOAT_TYPES:
            raise ConfigurationError(f"{name} is {piece.dtype}; float32, bfloat16 and float16 can be quantized")
        piece = piece.float()
        part, part_scale = quantize_rowwise(piece)
        if not bool(part_scale.isfinite().all()):
            raise ConfigurationError(f"{name} has an entry that is NaN or infinite; it cannot be quantized")
        codes[start : start + step], scale[start : start + step] = part, part_scale
        error += float((piece - part.float() * part_scale[:, None]).square().sum())
        norm += float(piece.square().sum())
    return Int8Weight(codes, scale, math.sqrt(error / norm) if norm else 0.0)


def linear_weight(layer: nn.Module) -> Tensor | None:
    """The weight of a linear layer as (N, K), or ``None`` if the layer is of another kind.

    Besides ``nn.Linear`` this knows the ``Conv1D`` of transformers (GPT-2), which is a linear layer with its weight
    transposed. Subclasses are not linear layers: what they add would be lost.
    """
    if type(layer) is nn.Linear:
        return layer.weight
    return layer.weight.t() if is_conv1d(layer) else None  # type: ignore[operator]


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D; told by its name, so that this does not import transformers."""
    return type(layer).__name__ == "Conv1D" and type(layer).__module__ == "transformers.pytorch_utils"
