"""W4A16 of compressed-tensors (``pack-quantized``): 4-bit weights with a scale for each group of neighbours of a row.

A linear layer ``P`` of weight (N, K) has ``P.weight_packed`` int32 [N, K / 8], of which nibble i of word j is code
8 j + i plus 8; ``P.weight_scale`` [N, K / group] of 16 bits; and ``P.weight_shape`` int64 [2]. A weight is
``scale * code``, with codes from -8 to 7.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.compress.block_types import BlockType
from gossamer.compress.grid import Grid
from gossamer.compress.scale_search import search_scale

QUANT_METHOD = "compressed-tensors"
FORMAT = "pack-quantized"
GROUPS = (128, 32)  # weights that share a scale: the widest that divides all rows
_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int64)


@dataclass(frozen=True)
class PackQuantized(BlockType):
    """See the module.

    Attributes:
        scale_dtype: torch.bfloat16 or torch.float16.
    """

    scale_dtype: torch.dtype = torch.bfloat16

    def _fit(self, weight: Tensor, importance: Tensor | None) -> Grid:
        x = weight.unflatten(1, (-1, self.group))
        w = x.square() if importance is None else importance.unflatten(1, (-1, self.group))
        scale = search_scale(x, w, self.lowest, self.highest, positive=True).to(self.scale_dtype)
        return self._grid(scale.float(), None, {"scale": scale})

    def pack(self, grid: Grid, codes: Tensor) -> dict[str, Tensor]:
        nibbles = (codes.long() + 8).unflatten(1, (-1, 8)) << _NIBBLES
        return {
            "weight_packed": _signed(nibbles.sum(-1)),
            "weight_scale": grid.stored["scale"],
            "weight_shape": torch.tensor(codes.shape),
        }

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        codes = ((stored["weight_packed"].long()[..., None] >> _NIBBLES & 15) - 8).flatten(1)
        return codes.float() * stored["weight_scale"].float().repeat_interleave(self.group, dim=1)


def w4a16(group: int, scale_dtype: torch.dtype) -> PackQuantized:
    """The format with so many weights to a scale."""
    return PackQuantized("W4A16", group, group // 2 + 2, group, -8, 7, scale_dtype)


def quantization_config(group: int, ignore: Sequence[str]) -> dict[str, Any]:
    """``quantization_config`` of a checkpoint.

    Args:
        group: weights that share a scale.
        ignore: names of the linear layers that are not quantized.
    """
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "block_structure": None,
        "dynamic": False,
        "actorder": None,
        "observer": "mse",
        "observer_kwargs": {},
    }
    group_0 = {"targets": ["Linear"], "weights": weights, "input_activations": None, "output_activations": None}
    return {
        "quant_method": QUANT_METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": sorted(ignore),
        "config_groups": {"group_0": group_0 | {"format": FORMAT}},
    }


def _signed(words: Tensor) -> Tensor:
    """Unsigned 32-bit integers, in int64, as int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
