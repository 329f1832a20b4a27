"""Formats of blocks: how the scales of a weight are found and stored, and its codes packed into bytes.

GGUF's are those of ggml (ggml-common.h); a block is so many neighbours of a row. Fields in the order of the file, h is
float16:

    Q4_0   32   d h, 16 bytes of codes                           d (q - 8)
    Q5_0   32   d h, the fifth bits u32, 16 bytes of codes       d (q - 16)
    Q8_0   32   d h, int8 codes                                  d q
    Q4_K  256   d h, dmin h, 12 bytes of scales, 128 of codes    (d s) q - (dmin m), s and m of 6 bits for each 32
    Q5_K  256   as Q4_K, 32 bytes of fifth bits before the codes
    Q6_K  256   128 bytes of low bits, 64 of high ones, int8 scales for each 16, d h    (d s) (q - 32)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from torch import Tensor

from gossamer.compress.grid import Grid, join
from gossamer.compress.scale_search import search_scale, search_scale_and_offset
from gossamer.errors import CheckpointError

_PIECE = 1 << 20  # weights whose scales are searched at a time: temporaries stay in the caches
_SIX_BITS = 63
_TINY = 1e-30
_LARGEST = 65504.0  # of float16, in which scales are stored


@dataclass(frozen=True)
class BlockType(ABC):
    """A format.

    Attributes:
        name: as ggml calls it.
        block: weights of a block.
        block_bytes: its size.
        group: weights that share a scale.
        lowest, highest: codes.
    """

    name: str
    block: int
    block_bytes: int
    group: int
    lowest: int
    highest: int

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Grid:
        """The grid of a weight.

        Args:
            weight: (N, K) fp32, finite; K a multiple of ``block``.
            importance: (K) or (N, K) of each entry's squared error; by default larger entries count more.

        >>> weight = torch.arange(256.0).sin()[None]
        >>> grid = GGUF_TYPES["Q4_K"].fit(weight)
        >>> blocks = GGUF_TYPES["Q4_K"].pack(grid, grid.codes(weight))["blocks"]
        >>> tuple(blocks.shape), bool((grid.values(grid.codes(weight)) - weight).abs().max() < 0.08)
        ((1, 144), True)
        """
        rows = max(1, _PIECE // weight.shape[1])
        importance = None if importance is None else importance.expand_as(weight)
        return join(
            [
                self._fit(weight[i : i + rows], None if importance is None else importance[i : i + rows])
                for i in range(0, len(weight), rows)
            ],
            dim=0,
        )

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        return columns // self.block * self.block_bytes

    @abstractmethod
    def _fit(self, weight: Tensor, importance: Tensor | None) -> Grid: ...

    @abstractmethod
    def pack(self, grid: Grid, codes: Tensor) -> dict[str, Tensor]:
        """What is stored of codes (N, K) int8, by names of the format; for GGUF ``blocks`` (N, row bytes) uint8."""

    @abstractmethod
    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        """The weight (N, K) fp32 that is stored."""

    def _grid(self, scale: Tensor, offset: Tensor | None, stored: dict[str, Tensor]) -> Grid:
        return Grid(scale, offset, self.group, self.lowest, self.highest, stored)


class GGUFType(BlockType):
    """One of ggml's."""

    def pack(self, grid: Grid, codes: Tensor) -> dict[str, Tensor]:
        return {"blocks": self._blocks(grid, codes)}

    def unpack(self, stored: dict[str, Tensor]) -> Tensor:
        return torch.from_numpy(dequantize(stored["blocks"].numpy(), GGMLQuantizationType[self.name]))

    @abstractmethod
    def _blocks(self, grid: Grid, codes: Tensor) -> Tensor: ...


class OneScale(GGUFType):
    """Q4_0, Q5_0 and Q8_0: a float16 scale for each block of 32."""

    def _fit(self, weight: Tensor, importance: Tensor | None) -> Grid:
        x = weight.unflatten(1, (-1, self.group))
        if self.highest == 127:  # so fine that nothing is gained by a search
            scale = x.abs().amax(-1) / 127
        else:
            w = x.square() if importance is None else importance.unflatten(1, (-1, self.group))
            scale = search_scale(x, w, self.lowest, self.highest)
        d = scale.half()
        return self._grid(d.float(), None, {"d": d})

    def _blocks(self, grid: Grid, codes: Tensor) -> Tensor:
        d = _bytes(grid.stored["d"])
        if self.highest == 127:
            return _joined(d, codes.unflatten(1, (-1, 32)).view(torch.uint8))
        q = (codes - self.lowest).view(torch.uint8).unflatten(1, (-1, 2, 16))
        nibbles = (q[:, :, 0] & 15) | (q[:, :, 1] & 15) << 4
        if self.highest == 7:
            return _joined(d, nibbles)
        return _joined(d, _bits(q.flatten(2) >> 4), nibbles)


class ScaleAndMin(GGUFType):
    """Q4_K and Q5_K: scales and mins of 6 bits for each 32, times two float16 ones for all 256."""

    def _fit(self, weight: Tensor, importance: Tensor | None) -> Grid:
        x = weight.unflatten(1, (-1, self.group))
        if importance is None:
            w = x.square().mean(-1, keepdim=True).sqrt() + x.abs()
        else:
            w = importance.unflatten(1, (-1, self.group))
        scale, offset = search_scale_and_offset(x, w, self.highest)
        d, s = _six_bits(scale)
        dmin, m = _six_bits(offset)
        s, m = self._polish(x, w, _spread(d), _spread(dmin), s, m)
        return self._grid(
            _spread(d) * s, _spread(dmin) * m, {"d": d, "dmin": dmin, "s": s.to(torch.uint8), "m": m.to(torch.uint8)}
        )

    def _polish(self, x: Tensor, w: Tensor, d: Tensor, dmin: Tensor, s: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
        """Rounding one of a pair moves where the other is best: of neighbouring scales, the one of least error."""
        total, inverse = w.sum(-1).clamp_min(_TINY), _inverse(dmin)
        best = torch.full_like(d, float("inf"))
        kept_s, kept_m = s, m
        for change in (0, -1, 1):
            near = (s + change).clamp(0, _SIX_BITS)
            scale, offset = (d * near)[..., None], (dmin * m)[..., None]
            codes = ((x + offset) * _inverse(scale)).round_().clamp_(0, self.highest)
            wanted = (w * (scale * codes - x)).sum(-1) / total
            fitted = (wanted * inverse).round_().clamp_(0, _SIX_BITS)
            offset = (dmin * fitted)[..., None]
            codes = ((x + offset) * _inverse(scale)).round_().clamp_(0, self.highest)
            error = (w * (scale * codes - offset - x).square()).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            kept_s, kept_m = torch.where(better, near, kept_s), torch.where(better, fitted, kept_m)
        return kept_s, kept_m

    def _blocks(self, grid: Grid, codes: Tensor) -> Tensor:
        s, m = (grid.stored[name].unflatten(1, (-1, 8)) for name in ("s", "m"))
        low = torch.cat([s[..., :4] | (s[..., 4:] >> 4) << 6, m[..., :4] | (m[..., 4:] >> 4) << 6], -1)
        scales = torch.cat([low, s[..., 4:] & 15 | (m[..., 4:] & 15) << 4], -1)
        q = codes.view(torch.uint8).unflatten(1, (-1, 4, 2, 32))
        nibbles = ((q[:, :, :, 0] & 15) | (q[:, :, :, 1] & 15) << 4).flatten(2)
        head = (_bytes(grid.stored["d"]), _bytes(grid.stored["dmin"]), scales)
        if self.highest == 15:
            return _joined(*head, nibbles)
        fifth = (q >> 4).flatten(2, 3) << torch.arange(8, dtype=torch.uint8)[:, None]
        return _joined(*head, fifth.sum(2, dtype=torch.uint8), nibbles)


class SignedScales(GGUFType):
    """Q6_K: int8 scales for each 16, times a float16 one for all 256."""

    def _fit(self, weight: Tensor, importance: Tensor | None) -> Grid:
        x = weight.unflatten(1, (-1, self.group))
        w = x.square() if importance is None else importance.unflatten(1, (-1, self.group))
        scale = search_scale(x, w, self.lowest, self.highest).unflatten(1, (-1, 16))
        extreme = scale.gather(-1, scale.abs().argmax(-1, keepdim=True))[..., 0]
        d = (extreme / -128).half()
        s = (scale * _inverse(d)[..., None]).round_().clamp_(-128, 127).to(torch.int8)
        return self._grid((d.float()[..., None] * s).flatten(1), None, {"d": d, "s": s.flatten(1)})

    def _blocks(self, grid: Grid, codes: Tensor) -> Tensor:
        q = (codes + 32).view(torch.uint8).unflatten(1, (-1, 2, 4, 32))
        low = q & 15
        ql = torch.cat([low[..., 0, :] | low[..., 2, :] << 4, low[..., 1, :] | low[..., 3, :] << 4], -1)
        qh = (q >> 4 << torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]).sum(3, dtype=torch.uint8)
        s = grid.stored["s"].unflatten(1, (-1, 16)).view(torch.uint8)
        return _joined(ql.flatten(2), qh.flatten(2), s, _bytes(grid.stored["d"]))


def check_weight(weight: Tensor, name: str) -> None:
    """Refuses a weight that no grid comes close to.

    Raises:
        CheckpointError: an entry is not finite, or too large for scales in float16.
    """
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    if not largest <= _LARGEST:
        at = (~(weight.abs() <= _LARGEST)).nonzero()[0].tolist()
        raise CheckpointError(
            f"{name} holds {float(weight[tuple(at)])} at {at}; quantized weights have scales in float16, which end at "
            f"{_LARGEST:.0f}, and know no infinity"
        )


def _six_bits(values: Tensor) -> tuple[Tensor, Tensor]:
    """float16 (N, B) and integers to 63 (N, 8 B) whose product is about ``values`` (N, 8 B), which are not negative."""
    d = (values.unflatten(1, (-1, 8)).amax(-1) / _SIX_BITS).half()
    return d, (values * _inverse(_spread(d))).round_().clamp_(0, _SIX_BITS)


def _spread(d: Tensor) -> Tensor:
    """(N, 8 B) fp32 from one value for each block."""
    return d.float().repeat_interleave(8, dim=1)


def _inverse(d: Tensor) -> Tensor:
    return torch.where(d == 0, 0.0, 1 / d.float())


def _bytes(half: Tensor) -> Tensor:
    """(N, B) float16 as (N, B, 2) uint8."""
    return half.contiguous().view(torch.uint8).unflatten(1, (-1, 2))


def _bits(flags: Tensor) -> Tensor:
    """(N, B, 32) of 0 and 1 as (N, B, 4) uint8, the first in the lowest bit."""
    return torch.from_numpy(np.packbits(flags.numpy(), axis=-1, bitorder="little"))


def _joined(*fields: Tensor) -> Tensor:
    """(N, B, bytes) each, one behind the other."""
    return torch.cat(fields, -1).flatten(1)


GGUF_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        OneScale("Q4_0", 32, 18, 32, -8, 7),
        OneScale("Q5_0", 32, 22, 32, -16, 15),
        OneScale("Q8_0", 32, 34, 32, -128, 127),
        ScaleAndMin("Q4_K", 256, 144, 32, 0, 15),
        ScaleAndMin("Q5_K", 256, 176, 32, 0, 31),
        SignedScales("Q6_K", 256, 210, 16, -32, 31),
    )
}
