"""Matrices in quantized blocks, and the layers that compute with them."""

from __future__ import annotations

import mmap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from gossamer.errors import ConfigurationError
from gossamer.nn import StoredEmbedding, StoredLinear, StoredMatrix
from gossamer.nn.block_types import BLOCK_TYPES
from gossamer.nn.stored_matrix import Mapped
from stored_blocks import GGUF_TYPES, put_scale, random_blocks, random_rows


def bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def expected(type: str, rows: np.ndarray) -> np.ndarray:
    return gguf.quants.dequantize(rows, gguf.GGMLQuantizationType[type])


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_values_are_those_of_gguf_to_the_bit(type):
    rows = random_rows(type, (24, 512))
    matrix = StoredMatrix(type, 512, rows)
    values = expected(type, rows)
    assert matrix.shape == values.shape and values.min() < 0 < values.max() and np.abs(values).max() < 10
    for chosen in (slice(3, 20), slice(None), ..., 5, [7, 7, 0], np.array([[1, 2], [23, 0]]), slice(20, 99)):
        np.testing.assert_array_equal(bits(matrix.dequantize(chosen)), bits(values[chosen]))
    tensor = torch.tensor([[3, 1], [0, 9]])
    np.testing.assert_array_equal(bits(matrix.dequantize(tensor)), bits(values[tensor.numpy()]))


@pytest.mark.parametrize("type", GGUF_TYPES)
def test_an_order_of_rows_moves_whole_rows(type):
    rows = random_rows(type, (16, 256))
    order = np.random.default_rng(1).permutation(16)
    matrix = StoredMatrix(type, 256, rows, order)
    np.testing.assert_array_equal(bits(matrix.dequantize(slice(2, 9))), bits(expected(type, rows)[order][2:9]))
    np.testing.assert_array_equal(matrix.rows(), rows[order])
    in_place = StoredMatrix(type, 256, rows, np.arange(16))
    assert np.shares_memory(in_place.rows(), rows) and not np.shares_memory(matrix.rows(), rows)


@pytest.mark.parametrize(("type", "dtype"), [("G4F16", torch.float16), ("G4BF16", torch.bfloat16)])
def test_groups_with_a_zero_point(type, dtype):
    blocks = random_blocks(type, 50)
    for block, values in zip(blocks, StoredMatrix(type, 32, blocks).dequantize(), strict=True):
        scale = torch.from_numpy(block[:2].copy()).view(dtype).float().item()
        zero = int(block[2]) + 256 * int(block[3])
        codes = [int(byte) & 15 for byte in block[4:]] + [int(byte) >> 4 for byte in block[4:]]
        assert values.tolist() == pytest.approx([scale * (code - zero) for code in codes], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("type", [name for name, block in BLOCK_TYPES.items() if block.scale_format == "float16"])
def test_a_scale_that_is_no_finite_number_is_found(type):
    block = BLOCK_TYPES[type]
    matrix = StoredMatrix(type, 512, random_rows(type, (8, 512)))
    assert matrix.first_bad_block() is None
    for offset in block.scales:
        for value in (np.nan, np.inf, -np.inf):
            blocks = random_blocks(type, 8 * 512 // block.weights)
            put_scale(blocks[9:10], offset, value)
            assert StoredMatrix(type, 512, blocks.reshape(8, -1)).first_bad_block() == 9 * block.bytes
        for value in (65504.0, -65504.0, 6e-8, 0.0):
            blocks = random_blocks(type, 8 * 512 // block.weights)
            put_scale(blocks[9:10], offset, value)
            assert StoredMatrix(type, 512, blocks.reshape(8, -1)).first_bad_block() is None


@pytest.mark.parametrize("exponent", range(256))
def test_scales_that_are_powers_of_two(exponent):
    blocks = random_blocks("MXFP4", 4)
    blocks[2, 0], blocks[2, 1] = exponent, 7  # the largest code
    matrix = StoredMatrix("MXFP4", 32, blocks)
    with np.errstate(over="ignore"):
        finite = bool(matrix.dequantize().isfinite().all())
    assert (matrix.first_bad_block() is None) == (finite and exponent != 255)


def test_bfloat16_scales():
    blocks = random_blocks("G4BF16", 3)
    for scale, bad in ((0x7F7F, False), (0x7F80, True), (0xFF80, True), (0x7FC0, True), (0x7F00, False)):
        blocks[1, :2] = scale & 255, scale >> 8
        assert (StoredMatrix("G4BF16", 32, blocks).first_bad_block() == 20) == bad


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigurationError, match="'Q9_K' is not a type of blocks"):
        StoredMatrix("Q9_K", 32, np.zeros((1, 18), np.uint8))
    for inputs, data in ((32, np.zeros((1, 17), np.uint8)), (48, np.zeros((1, 27), np.uint8)), (32, np.zeros((1, 18)))):
        with pytest.raises(ConfigurationError, match="blocks hold 32 in 18 bytes"):
            StoredMatrix("Q4_0", inputs, data)


def test_pages_that_are_released_are_read_again(tmp_path: Path):
    rows = random_rows("Q8_0", (300, 256))
    (tmp_path / "file").write_bytes(b"head" + rows.tobytes())
    with (tmp_path / "file").open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    data = np.frombuffer(mapping, np.uint8, rows.nbytes, 4).reshape(rows.shape)
    matrix = StoredMatrix("Q8_0", 256, data, mapped=Mapped(mapping, 4, rows.nbytes))
    assert matrix.mapped and np.shares_memory(matrix.rows(), data)
    before = matrix.dequantize()
    matrix.release()
    assert torch.equal(matrix.dequantize(), before)
    moved = StoredMatrix("Q8_0", 256, data, np.arange(300)[::-1], Mapped(mapping, 4, rows.nbytes))
    assert not moved.mapped and torch.equal(moved.dequantize(), before.flip(0))
    StoredMatrix("Q8_0", 256, rows).release()


@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_computes_what_a_linear_layer_would(bias):
    matrix = StoredMatrix("Q4_K", 512, random_rows("Q4_K", (1200, 512)))
    plain = nn.Linear(512, 1200, bias)
    with torch.no_grad():
        plain.weight.copy_(matrix.dequantize())
    layer = StoredLinear(matrix, nn.Parameter(plain.bias.detach().clone()) if bias else None)
    for shape in ((512,), (3, 512), (2, 5, 512), (0, 512)):
        x = torch.randn(shape)
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-4, atol=1e-3)
        half = layer.to(torch.bfloat16)(x.bfloat16())
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), plain(x), rtol=0.05, atol=0.3)
        layer.float()
    x = torch.randn(2, 512, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, plain.weight.sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_an_embedding_looks_rows_up():
    matrix = StoredMatrix("Q6_K", 256, random_rows("Q6_K", (40, 256)))
    ids = torch.tensor([[3, 39], [0, 3]])
    plain = nn.Embedding.from_pretrained(matrix.dequantize())
    assert torch.equal(StoredEmbedding.in_place_of(plain, matrix)(ids), plain(ids))
    scaled = Gemma3TextScaledWordEmbedding(40, 256, None, embed_scale=256**0.5)
    scaled.weight.data = matrix.dequantize()
    embedding = StoredEmbedding.in_place_of(scaled, matrix)
    assert embedding.multiplier == 16.0 and torch.equal(embedding(ids), scaled(ids))
    with pytest.raises(ConfigurationError, match="max_norm"):
        StoredEmbedding.in_place_of(nn.Embedding(40, 256, max_norm=1.0), matrix)


def test_a_stored_weight_is_no_other():
    layer = StoredLinear(StoredMatrix("Q8_0", 32, random_rows("Q8_0", (4, 32))))
    layer.weight = layer.stored
    assert layer.weight is layer.stored and layer.weight.shape == (4, 32)
    with pytest.raises(ConfigurationError, match="no other weight"):
        layer.weight = torch.zeros(4, 32)
