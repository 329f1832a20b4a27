"""A weight of a quantized file, in floating point, a block of rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.nn.int8_weight import linear_weight
from gossamer.nn.quantize import find_skipped
from gossamer.ops.int8 import piece_rows


class DequantizedRows:
    """A matrix (N, K): ``matrix[a:b]`` dequantizes these rows to fp32.

    transformers materializes what it loads with ``[...]`` and ``to``. The weight of a linear layer that will be
    quantized stays as it is then, so that it reaches the quantizer unread; other matrices are read.

    Args:
        shape: (N, K).
        read: what gives the rows of a slice.
        kept: whether the quantizer will read it by itself.
        transposed: the model has it as (K, N), as GPT-2 does.

    >>> matrix = DequantizedRows((4, 2), lambda rows: torch.ones(4, 2)[rows], kept=False)
    >>> matrix[1:3].shape, matrix[...].shape
    (torch.Size([2, 2]), torch.Size([4, 2]))
    """

    def __init__(
        self, shape: Sequence[int], read: Callable[[Any], Tensor], kept: bool, *, transposed: bool = False
    ) -> None:
        self.shape = torch.Size(shape)
        self._read = read
        self._kept = kept
        self._transposed = transposed

    def __getitem__(self, rows: Any) -> Any:
        if rows is Ellipsis:
            return self if self._kept else self._whole()
        return self._read(rows)

    def to(self, **kwargs: Any) -> DequantizedRows:
        return self

    def _whole(self) -> Tensor:
        """All of it, with little memory beside the result."""
        result = torch.empty(self.shape)
        step = piece_rows(self.shape[1])
        for start in range(0, self.shape[0], step):
            result[start : start + step] = self._read(slice(start, start + step))
        return result.t() if self._transposed else result


def quantized_weights(model: nn.Module, skip: Sequence[str] | None) -> set[str]:
    """Names of the weights that the quantizer will read by itself.

    Args:
        model: without weights.
        skip: layers that will not be quantized, as in :func:`gossamer.models.quantize.quantize`; ``None`` if none will.
    """
    if skip is None:
        return set()
    skipped = find_skipped(model, skip)
    linear = (name for name, layer in model.named_modules() if linear_weight(layer) is not None and name not in skipped)
    return {f"{name}.weight" for name in linear}
