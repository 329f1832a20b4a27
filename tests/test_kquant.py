"""Encoders of blocks: every byte means to gguf-py what the encoder says, and scales are found at least as well."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.compress.block_types import GGUF_TYPES, check_weight
from gossamer.compress.grid import join
from gossamer.compress.mixtures import MIXTURES, Place
from gossamer.compress.pack_quantized import w4a16
from gossamer.compress.scale_search import search_scale, search_scale_and_offset
from gossamer.errors import CheckpointError

ALL = [*GGUF_TYPES.values(), w4a16(32, torch.bfloat16), w4a16(128, torch.float16)]


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = torch.exp(torch.randn(rows, 1, generator=generator))
    return torch.randn(rows, columns, generator=generator) * size


def read(name: str, blocks: Tensor) -> np.ndarray:
    return dequantize(blocks.numpy(), GGMLQuantizationType[name])


@pytest.mark.parametrize("kind", GGUF_TYPES.values(), ids=list(GGUF_TYPES))
class TestBlocks:
    def test_sizes_are_ggmls(self, kind):
        assert (kind.block, kind.block_bytes) == GGML_QUANT_SIZES[GGMLQuantizationType[kind.name]]

    @given(seed=st.integers(0, 10**6), data=st.data())
    @settings(max_examples=15, deadline=None)
    def test_any_codes_and_scales_are_read_back_to_the_bit(self, kind, seed, data):
        generator = torch.Generator().manual_seed(seed)
        rows, columns = data.draw(st.integers(1, 5)), kind.block * data.draw(st.integers(1, 3))
        weight = weights(rows, columns, seed) * 10.0 ** data.draw(st.integers(-6, 3))
        grid = kind.fit(weight, torch.rand(columns, generator=generator))
        codes = torch.randint(kind.lowest, kind.highest + 1, weight.shape, generator=generator).to(torch.int8)
        stored = kind.pack(grid, codes)
        assert stored["blocks"].shape == (rows, kind.row_bytes(columns))
        assert np.array_equal(read(kind.name, stored["blocks"]), grid.values(codes).numpy())
        assert torch.equal(kind.unpack(stored), grid.values(codes))

    def test_zeros_stay_zero(self, kind):
        weight = torch.zeros(2, 2 * kind.block)
        grid = kind.fit(weight)
        assert not read(kind.name, kind.pack(grid, grid.codes(weight))["blocks"]).any()

    def test_each_entry_is_at_its_nearest_point(self, kind):
        weight = weights(4, 2 * kind.block)
        grid = kind.fit(weight)
        codes = grid.codes(weight)
        error = (grid.values(codes) - weight).abs()
        for change in (-1, 1):
            other = (codes.int() + change).clamp(kind.lowest, kind.highest)
            assert ((grid.values(other) - weight).abs() >= error - 1e-6 * weight.abs().amax()).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q5_0"])
@pytest.mark.parametrize("seed", range(3))
def test_a_search_beats_the_plain_scale_of_the_largest_entry(name, seed):
    weight = weights(32, 256, seed)
    kind = GGUF_TYPES[name]
    grid = kind.fit(weight, torch.ones(256))
    plain = dequantize(quantize(weight.numpy(), GGMLQuantizationType[name]), GGMLQuantizationType[name])
    assert (grid.values(grid.codes(weight)) - weight).square().sum() < 0.95 * np.square(plain - weight.numpy()).sum()


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.name}-{kind.group}")
def test_errors_fall_where_they_count(kind):
    weight = weights(64, 512)
    importance = torch.where(torch.arange(512) % 8 == 0, 100.0, 1.0)
    plain, weighted = kind.fit(weight, torch.ones(512)), kind.fit(weight, importance)
    before, after = (
        ((grid.values(grid.codes(weight)) - weight).square() * importance).sum() for grid in (plain, weighted)
    )
    assert after <= before if kind.name != "Q8_0" else after == before


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: f"{kind.name}-{kind.group}")
def test_rows_and_blocks_are_fitted_alone(kind):
    weight, importance = weights(6, 1024), torch.rand(1024, generator=torch.Generator().manual_seed(1))
    whole = kind.fit(weight, importance)
    rows = join([kind.fit(weight[:2], importance), kind.fit(weight[2:], importance)], 0)
    columns = join([kind.fit(weight[:, :256], importance[:256]), kind.fit(weight[:, 256:], importance[256:])], 1)
    for other in (rows, columns):
        assert torch.equal(whole.scale, other.scale)
        assert all(torch.equal(whole.stored[name], other.stored[name]) for name in whole.stored)


def test_points_of_a_grid_are_found_again():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (50, 32), generator=generator).float()
    codes[:, 0], codes[:, 1] = 0, 15
    scale, offset = search_scale_and_offset(0.3 * codes - 1.7, torch.ones(32), 15)
    assert torch.allclose(scale, torch.tensor(0.3), rtol=1e-4) and torch.allclose(offset, torch.tensor(1.7), rtol=1e-4)
    codes = torch.randint(-8, 8, (50, 32), generator=generator).float()
    codes[:, 0] = -8
    assert torch.allclose(search_scale(0.3 * codes, torch.ones(32), -8, 7), torch.tensor(0.3), rtol=1e-4)


def test_scales_of_pack_quantized_are_positive_and_its_nibbles_in_order():
    kind = w4a16(32, torch.bfloat16)
    weight = weights(8, 64)
    grid = kind.fit(weight)
    assert (grid.scale > 0).all()
    stored = kind.pack(grid, grid.codes(weight))
    assert stored["weight_packed"].dtype == torch.int32 and stored["weight_packed"].shape == (8, 8)
    assert stored["weight_scale"].dtype == torch.bfloat16 and stored["weight_shape"].tolist() == [8, 64]
    words = stored["weight_packed"].numpy().view(np.uint32)
    codes = np.stack([(words >> 4 * i & 15).astype(np.int8) - 8 for i in range(8)], -1).reshape(8, 64)
    assert np.array_equal(codes, grid.codes(weight).numpy())
    assert torch.equal(kind.unpack(stored), grid.values(grid.codes(weight)))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf"), 1e6])
def test_what_no_scale_can_hold_is_refused_with_its_place(wrong):
    weight = weights(2, 32)
    check_weight(weight, "some.weight")
    weight[1, 3] = wrong
    with pytest.raises(CheckpointError, match=r"some\.weight.*\[1, 3\]"):
        check_weight(weight, "some.weight")


def test_the_mixture_is_llama_cpps():
    kinds = [MIXTURES["q4_k_m"].type_of(Place("attn_v", layer, 28), (256, 1536)).name for layer in range(28)]
    wide = [layer for layer, kind in enumerate(kinds) if kind == "Q6_K"]
    assert wide == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 24, 25, 26, 27]
    for role, kind in {"attn_q": "Q4_K", "ffn_up": "Q4_K", "output": "Q6_K", "token_embd": "Q4_K"}.items():
        assert MIXTURES["q4_k_m"].type_of(Place(role, 0, 28), (512, 512)).name == kind
    assert MIXTURES["q4_k_m"].type_of(Place("attn_q", 0, 28), (512, 576)).name == "Q5_0"
    assert MIXTURES["q4_0"].type_of(Place("ffn_down", 0, 28), (512, 576)).name == "Q4_0"
