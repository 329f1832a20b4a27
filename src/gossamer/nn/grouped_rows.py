"""Rows of 4-bit blocks, made from what a checkpoint keeps in tensors of their own: codes, scales and zero points.

GPTQ, AWQ and compressed-tensors give every group of inputs a scale s and a zero point z; a weight is

    w_nk = s_ng (q_nk - z_ng),    g the group of input k, q_nk in 0 ... 15.

Blocks of 32 inputs (``G4F16``, ``G4BF16`` in :mod:`gossamer.nn.block_types`) repeat both, so that a row can be read
from its start to its end.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 32  # inputs
BLOCK_BYTES = 20  # a scale of 16 bit, a zero point of 16 bit, and 32 codes
BLOCK_TYPES = {torch.float16: "G4F16", torch.bfloat16: "G4BF16"}  # by the type of the scales


def input_order(groups: Tensor) -> Tensor | None:
    """The order of inputs in which each group fills blocks, or ``None`` where it does so by itself.

    Act-order (``desc_act``) quantizes inputs in the order of their activations, so that a group's inputs may stand
    anywhere.

    Args:
        groups: (K) int64, the group of each input; each has a multiple of 32 inputs.

    >>> input_order(torch.tensor([1] * 32 + [0] * 32)) is None
    True
    >>> input_order(torch.tensor([1, 0] * 32))[:4]
    tensor([1, 3, 5, 7])
    """
    blocks = groups.view(-1, BLOCK)
    return None if bool(blocks.eq(blocks[:, :1]).all()) else groups.argsort(stable=True)


class GroupedRows:
    """Rows of blocks (N, bytes) uint8 that are made when they are asked for, as an array would give them.

    Args:
        codes: gives the codes of a slice of rows, (n, K) uint8, inputs in the order of the model.
        scale: (N, G) float16 or bfloat16.
        zero: (N, G) uint8.
        groups: (K) int64, the group of each input.
        order: of the inputs in a row, where it differs: as :func:`input_order` gives it.

    >>> codes = torch.arange(32, dtype=torch.uint8).remainder(16).expand(2, 32)
    >>> one = torch.ones(2, 1)
    >>> rows = GroupedRows(lambda part: codes[part], one.half(), one.byte(), torch.zeros(32, dtype=torch.int64))
    >>> rows.shape, rows[:1].tolist()[0][:6]
    ((2, 20), [0, 60, 1, 0, 0, 17])
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)
    ndim = 2

    def __init__(
        self,
        codes: Callable[[slice], Tensor],
        scale: Tensor,
        zero: Tensor,
        groups: Tensor,
        order: Tensor | None = None,
    ) -> None:
        self._codes = codes
        self._scale = scale
        self._zero = zero
        self._order = order
        self._groups = (groups if order is None else groups[order])[::BLOCK]  # of each block
        self.shape: tuple[int, ...] = (len(scale), len(self._groups) * BLOCK_BYTES)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        if rows is Ellipsis:
            rows = slice(None)
        if not isinstance(rows, slice):
            whole: np.ndarray = self[:][rows]
            return whole
        codes = self._codes(rows)
        if self._order is not None:
            codes = codes.index_select(1, self._order)
        low, high = codes.view(len(codes), -1, 2, BLOCK // 2).unbind(2)
        scale = self._scale[rows][:, self._groups].contiguous().view(torch.uint8)
        zero = self._zero[rows][:, self._groups].to(torch.int16).view(torch.uint8)
        shape = *low.shape[:2], 2
        blocks = torch.cat([scale.view(shape), zero.view(shape), low | high << 4], dim=2)
        return blocks.flatten(1).numpy()
