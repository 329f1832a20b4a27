"""Random quantized blocks, and GGUF files whose weights are stored in them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

from gguf_files import rewrite
from gossamer.nn.block_types import BLOCK_TYPES

GGUF_TYPES = [name for name in BLOCK_TYPES if not name.startswith("G4")]
# The largest weight without an offset, over the scale.
_LARGEST = {
    "Q4_0": 8,
    "Q5_0": 16,
    "Q8_0": 127,
    "Q2_K": 45,
    "Q3_K": 128,
    "Q4_K": 945,
    "Q5_K": 1953,
    "Q6_K": 4064,
    "IQ4_NL": 127,
    "IQ4_XS": 4064,
    "Q4_1": 15,
    "Q5_1": 31,
}
# What llama.cpp writes for rows that are no multiple of 256.
_FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0", "IQ4_XS": "IQ4_NL"}


def random_blocks(type: str, count: int, seed: int = 0, size: float = 0.2) -> np.ndarray:
    """Blocks (count, bytes) whose weights are about as large as ``size``, of both signs."""
    block = BLOCK_TYPES[type]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (count, block.bytes), dtype=np.uint8)
    if block.scale_format == "e8m0":
        blocks[:, 0] = draw.integers(118, 124, count)
        return blocks
    if block.scale_format == "bfloat16" or type == "G4F16":
        scale = (draw.uniform(0.5, 1.0, count) * size / 15).astype(np.float32)
        bits = scale.astype(np.float16).view(np.uint16) if type == "G4F16" else (scale.view(np.uint32) >> 16)
        blocks[:, :2] = bits.astype("<u2")[:, None].view(np.uint8)
        blocks[:, 2:4] = draw.integers(0, 16, (count, 1)).astype("<u2").view(np.uint8)
        return blocks
    scale = draw.uniform(0.5, 1.0, (count, 1)) * size / _LARGEST[type]
    put_scale(blocks, block.scales[0], scale)
    if len(block.scales) == 2:  # the offset halves the range: minus in k-quants, plus in Q4_1 and Q5_1
        middle = scale * _LARGEST[type] / 2
        put_scale(blocks, block.scales[1], -middle if type.endswith("_1") else middle / (15 if type == "Q2_K" else 63))
    return blocks


def put_scale(blocks: np.ndarray, offset: int, scale: np.ndarray | float) -> None:
    values = np.broadcast_to(np.asarray(scale, np.float16), (len(blocks), 1))
    blocks[:, offset : offset + 2] = np.ascontiguousarray(values).view(np.uint8)


def random_rows(type: str, shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(N, bytes of a row)."""
    outputs, inputs = shape
    block = BLOCK_TYPES[type]
    return random_blocks(type, outputs * inputs // block.weights, seed).reshape(outputs, -1)


def store(source: Path, target: Path, types: Callable[[str], str] | str) -> Path:
    """A copy of a GGUF file, with random blocks in the places of matrices.

    Args:
        source: any GGUF file.
        target: the copy.
        types: of the blocks by the name of the matrix, or one for all.
    """
    tensors = {}
    for place, tensor in enumerate(GGUFReader(source).tensors):
        if len(tensor.shape) != 2:
            continue
        inputs, outputs = map(int, tensor.shape)
        name = types if isinstance(types, str) else types(tensor.name)
        if inputs % 256:
            name = _FALLBACKS.get(name, name)
        tensors[tensor.name] = (random_rows(name, (outputs, inputs), place), GGMLQuantizationType[name])
    return rewrite(source, target, tensors=tensors)


def q4_k_m(name: str) -> str:
    """Types as they are mixed in such files: of q, k and v of one layer, of the output and so on."""
    if name in ("token_embd.weight", "output.weight"):
        return "Q6_K"
    special = {"attn_v": "Q6_K", "attn_k": "Q5_0", "ffn_down": "Q5_K", "ffn_up": "Q8_0"}
    return special.get(name.split(".")[2], "Q4_K")


def values_in(file: Path) -> dict[str, np.ndarray]:
    """What gguf-py makes of the tensors."""
    return {each.name: gguf.quants.dequantize(each.data, each.tensor_type) for each in GGUFReader(file).tensors}
