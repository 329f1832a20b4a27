"""Products with weights in quantized blocks, against gguf-py's values and sums of integers in higher precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gossamer.errors import UnsupportedModelError
from gossamer.kernels.library import core, instruction_sets
from gossamer.native import few_rows
from gossamer.native.weights import _BLOCK_IDS, PackedLinear, check_linear, pack_linear, refer_to
from gossamer.nn import StoredLinear
from gossamer.nn.block_types import BLOCK_TYPES
from gossamer.nn.stored_matrix import StoredMatrix
from stored_blocks import random_blocks

TYPES = sorted(BLOCK_TYPES)
pytestmark = pytest.mark.skipif(core() is None, reason="without the native kernels")


@pytest.fixture(params=instruction_sets() if core() is not None else [])
def isa(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def random_rows(kind: str, outputs: int, inputs: int, seed: int = 0) -> np.ndarray:
    return random_blocks(kind, outputs * inputs // BLOCK_TYPES[kind].weights, seed).reshape(outputs, -1)


def stored(kind: str, outputs: int, inputs: int, seed: int = 0) -> StoredMatrix:
    return StoredMatrix(kind, inputs, random_rows(kind, outputs, inputs, seed))


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows (T, K) as int8 in blocks of 32, in fp64."""
    blocks = x.reshape(len(x), -1, 32)
    scale = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    codes = np.rint(np.divide(blocks, scale, out=np.zeros_like(blocks), where=scale > 0))
    return (codes.astype(np.float64) * scale).reshape(x.shape)


def check(result: torch.Tensor, x: np.ndarray, weight: np.ndarray) -> None:
    """Within what fp32 sums of exact integers, one for each 16 or 32 weights, may be off, by the sizes of these."""
    exact = rounded(x) @ weight.astype(np.float64).T
    size = np.abs(rounded(x)) @ np.abs(weight.astype(np.float64)).T
    assert (np.abs(result.numpy() - exact) <= (x.shape[1] / 16 + 4) * 2**-24 * size + 1e-30).all()


@pytest.mark.parametrize("kind", TYPES)
def test_a_packed_weight_gives_its_values_back_to_the_bit(kind: str, isa: str) -> None:
    matrix = stored(kind, 37, 512)
    packed = pack_linear([StoredLinear(matrix)], isa, "float32")
    table = refer_to(matrix, isa)
    row = torch.empty(512)
    for place in (0, 7, 8, 16, 31, 32, 36):
        for weight in (packed, table):
            weight.handle.look_up(place, row.data_ptr())
            assert torch.equal(row.view(torch.int32), matrix.dequantize(place).view(torch.int32))


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("inputs", [256, 768])
def test_products_of_any_number_of_rows_are_exact_sums_and_the_same(kind: str, inputs: int, isa: str) -> None:
    matrix = stored(kind, 75, inputs, seed=inputs)
    packed = pack_linear([StoredLinear(matrix)], isa, "float32")
    x = np.random.default_rng(1).normal(size=(67, inputs)).astype(np.float32)
    x[3] *= 1e4  # rows of any size, an outlier, zeros
    x[5, 17] = 300
    x[6] = 0
    whole = packed(torch.from_numpy(x))
    check(whole, x, matrix.dequantize().numpy())
    for packed.handle.few_rows in (0, 4, 8):
        for rows in (1, 2, 3, 4, 5, 7, 8, 9, 16, 33):
            assert torch.equal(packed(torch.from_numpy(x[:rows])), whole[:rows])


def test_how_many_rows_are_few_is_measured_for_each_mixture(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    """A clock that says which way is faster: up to 3 rows the packed one, and for Q8_0 never."""
    monkeypatch.setattr(few_rows, "_measured", {})
    now = 0.0

    class Weight:
        def __init__(self, packed: PackedLinear, most: int) -> None:
            self.bytes, self.few_rows, self.most = packed.handle.bytes, 0, most

        def multiply(self, x: int, rows: int, *_: object) -> None:
            nonlocal now
            assert 0 < rows <= few_rows.MOST_ROWS
            now += 1.0 + ((rows <= self.few_rows) != (rows <= self.most))

    def weights(kinds: list[str], most: int) -> PackedLinear:
        packed = pack_linear([StoredLinear(stored(kind, 32, 256)) for kind in kinds], isa, "float32")
        return replace(packed, handle=Weight(packed, most))

    monkeypatch.setattr(few_rows.time, "perf_counter", lambda: now)
    made = [weights(["Q4_K"], 3), weights(["Q8_0"], 1), weights(["Q6_K", "Q4_K", "Q4_K"], 8), weights(["Q4_K"], 3)]
    made.append(pack_linear([torch.nn.Linear(32, 32)], isa, "float32"))
    expected = {("Q4_K",): 3, ("Q8_0",): 1, ("Q4_K", "Q6_K"): 8}
    for _ in range(2):
        assert few_rows.choose_few_rows(made, isa, 1) == expected
        assert [weight.handle.few_rows for weight in made[:-1]] == [3, 1, 8, 3]
        monkeypatch.setattr(few_rows, "_seconds", lambda *_: pytest.fail("measured twice"))


def test_measuring_leaves_products_as_they_are(isa: str) -> None:
    packed = pack_linear([StoredLinear(stored("Q5_0", 75, 256))], isa, "float32")
    x = torch.randn(5, 256)
    before = packed(x)
    (few,) = few_rows.choose_few_rows([packed], isa, 2).values()
    assert 1 <= few <= few_rows.MOST_ROWS and packed.handle.few_rows == few
    assert torch.equal(packed(x), before)


@pytest.mark.parametrize("kind", TYPES)
def test_the_largest_codes_and_activations_do_not_overflow(kind: str, isa: str) -> None:
    """Every byte 0xff or 0x00 but the scales, rows of the largest code of either sign."""
    block = BLOCK_TYPES[kind]
    for byte in (0x00, 0x7F, 0x80, 0xFF):
        data = np.full((32, block.row_bytes(512)), byte, np.uint8)
        usual = random_rows(kind, 32, 512, seed=2).reshape(32, -1, block.bytes)
        blocks = data.reshape(32, -1, block.bytes)
        width = 1 if block.scale_format == "e8m0" else 4 if kind.startswith("G4") else 2  # the zero point has limits
        for place in block.scales:
            blocks[..., place : place + width] = usual[..., place : place + width]
        matrix = StoredMatrix(kind, 512, data)
        packed = pack_linear([StoredLinear(matrix)], isa, "float32")
        x = np.ones((6, 512), np.float32)
        x[1], x[2, ::2], x[4, 256:] = -1, -1, -1
        check(packed(torch.from_numpy(x)), x, matrix.dequantize().numpy())
        check(packed(torch.from_numpy(x[:1])), x[:1], matrix.dequantize().numpy())
        many = np.tile(x, (3, 1))
        assert torch.equal(packed(torch.from_numpy(many)), packed(torch.from_numpy(x)).repeat(3, 1))


def test_layers_of_different_types_are_one_product(isa: str) -> None:
    layers = [StoredLinear(stored(kind, rows, 256)) for kind, rows in (("Q4_K", 48), ("Q8_0", 16), ("Q6_K", 21))]
    layers[1].bias = torch.nn.Parameter(torch.randn(16))
    packed = pack_linear(layers, isa, "float32")
    x = torch.randn(9, 256)
    apart = [pack_linear([layer], isa, "float32")(x) for layer in layers]
    assert torch.equal(packed(x), torch.cat(apart, dim=1))


@pytest.mark.parametrize("outputs", [32, 48])
def test_a_gate_and_its_factor_may_be_of_different_types(outputs: int, isa: str) -> None:
    gate, factor = StoredLinear(stored("Q4_K", outputs, 256)), StoredLinear(stored("Q6_K", outputs, 256))
    packed = pack_linear([gate, factor], isa, "float32", gated=True)
    row = torch.empty(256)
    for place, layer in enumerate((gate, factor)):
        for output in range(outputs):
            packed.handle.look_up(output // 16 * 32 + place * 16 + output % 16, row.data_ptr())
            assert torch.equal(row, layer.stored.dequantize(output))


def test_rows_that_are_not_numbers_stay_so(isa: str) -> None:
    packed = pack_linear([StoredLinear(stored("Q4_K", 32, 256))], isa, "float32")
    x = torch.randn(3, 256)
    x[1, 5] = float("nan")
    result = packed(x)
    assert result[1].isnan().all() and result[[0, 2]].isfinite().all()


def test_inputs_in_another_order(isa: str) -> None:
    order = torch.randperm(256)
    matrix = StoredMatrix("Q4_0", 256, random_rows("Q4_0", 32, 256), input_order=order)
    x = torch.randn(2, 256)
    packed = pack_linear([StoredLinear(matrix)], isa, "float32")
    assert torch.allclose(
        packed(x), x @ matrix.dequantize().T, rtol=0, atol=0.05 * float((x @ matrix.dequantize().T).std())
    )


def test_what_cannot_be_one_product_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no multiple of 16"):
        check_linear([StoredLinear(stored("Q4_K", 24, 256)), StoredLinear(stored("Q6_K", 24, 256))])
    with pytest.raises(UnsupportedModelError, match="partly"):
        check_linear([StoredLinear(stored("Q4_K", 16, 256)), torch.nn.Linear(256, 16)])
    library = core()
    assert library is not None
    with pytest.raises(ValueError, match="whole blocks"):
        library.Weight.of_blocks(instruction_sets()[0], [_BLOCK_IDS["Q4_K"]] * 2, 32, 288, False)
    with pytest.raises(ValueError, match="no such type"):
        library.Weight.of_blocks(instruction_sets()[0], [77, 77], 32, 256, False)
