"""Types of blocks that quantized files store weights in: so many weights in so many bytes, with a scale or several.

The layouts are those of ggml (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h). ``G4F16`` and
``G4BF16`` hold what GPTQ, AWQ and compressed-tensors store: 4-bit codes with a scale and a zero point per group.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import gguf
import numpy as np

ScaleFormat = Literal["float16", "bfloat16", "e8m0"]
_LARGEST_E8M0 = 252  # 2^(252 - 128) * 12 is the largest product that float32 holds


@dataclass(frozen=True)
class BlockType:
    """How a block of weights is stored.

    Attributes:
        name: of the type, as gguf-py spells it.
        weights: in a block.
        bytes: of a block.
        scales: byte offsets of the floating-point scales within a block.
        scale_format: of these.
        dequantize: blocks (n, bytes) uint8 -> weights (n, weights) float32.
    """

    name: str
    weights: int
    bytes: int
    scales: tuple[int, ...]
    scale_format: ScaleFormat
    dequantize: Callable[[np.ndarray], np.ndarray]

    def row_bytes(self, inputs: int) -> int:
        """Bytes of a row of weights.

        >>> BLOCK_TYPES["Q4_K"].row_bytes(1536)
        864
        """
        return inputs // self.weights * self.bytes

    def first_bad_block(self, blocks: np.ndarray) -> int | None:
        """The first of ``blocks`` (n, bytes) with a scale that is NaN or infinite, or would make weights infinite."""
        bad = np.zeros(len(blocks), dtype=bool)
        for offset in self.scales:
            bad |= self._bad_scales(blocks, offset)
        return int(bad.argmax()) if bad.any() else None

    def _bad_scales(self, blocks: np.ndarray, offset: int) -> np.ndarray:
        if self.scale_format == "e8m0":
            return np.greater(blocks[:, offset], _LARGEST_E8M0)
        high = blocks[:, offset + 1]  # the sign and the exponent, or its larger part
        if self.scale_format == "float16":
            return np.equal(high & 0x7C, 0x7C)
        return np.equal(high & 0x7F, 0x7F) & np.greater_equal(blocks[:, offset], 0x80)


def _ggml(name: str, *scales: int, scale_format: ScaleFormat = "float16") -> BlockType:
    kind = gguf.GGMLQuantizationType[name]
    weights, size = gguf.GGML_QUANT_SIZES[kind]

    def dequantize(blocks: np.ndarray) -> np.ndarray:
        return gguf.quants.dequantize(blocks, kind)

    return BlockType(name, weights, size, scales, scale_format, dequantize)


def _groups(name: str, scale_format: ScaleFormat) -> BlockType:
    """Scale (16 bit), zero point (uint16), 16 bytes of codes: byte j holds code j, and code 16 + j in its high half."""

    def dequantize(blocks: np.ndarray) -> np.ndarray:
        heads = np.ascontiguousarray(blocks[:, :4]).view("<u2")
        if scale_format == "float16":
            scale = heads[:, :1].view(np.float16).astype(np.float32)
        else:
            scale = (heads[:, :1].astype(np.uint32) << 16).view(np.float32)
        zero = heads[:, 1:].astype(np.float32)
        codes = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return scale * codes.astype(np.float32) - scale * zero

    return BlockType(name, 32, 20, (0,), scale_format, dequantize)


BLOCK_TYPES = {
    each.name: each
    for each in (
        _ggml("Q4_0", 0),
        _ggml("Q4_1", 0, 2),
        _ggml("Q5_0", 0),
        _ggml("Q5_1", 0, 2),
        _ggml("Q8_0", 0),
        _ggml("Q2_K", 80, 82),
        _ggml("Q3_K", 108),
        _ggml("Q4_K", 0, 2),
        _ggml("Q5_K", 0, 2),
        _ggml("Q6_K", 208),
        _ggml("IQ4_NL", 0),
        _ggml("IQ4_XS", 0),
        _ggml("MXFP4", 0, scale_format="e8m0"),
        _groups("G4F16", "float16"),
        _groups("G4BF16", "bfloat16"),
    )
}
