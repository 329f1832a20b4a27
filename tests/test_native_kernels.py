"""The native kernels against their references, on every instruction set that this processor can run."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.kernels.library import core, instruction_sets
from gossamer.native.weights import decomposition_of, pack_linear
from gossamer.nn import Int8Embedding, Int8Linear, Int8TiedHead
from gossamer.nn.int8_linear import Decomposition

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")

ISAS = instruction_sets()
RULES = [
    Decomposition(outliers=None),
    Decomposition(6.0, "relative", "token"),
    Decomposition(2.0, "absolute", "token"),
    Decomposition(2.0, "absolute", "batch"),
    Decomposition(4.0, "relative", "batch"),
    Decomposition(6.0, "relative", "static"),
]


def int8_layer(outputs: int, inputs: int, *, bias: bool, stored: int, rule: Decomposition) -> Int8Linear:
    linear = nn.Linear(inputs, outputs, bias=bias)
    columns = torch.randperm(inputs)[:stored].sort().values if stored else None
    return Int8Linear.from_linear(linear, decomposition=rule, outlier_columns=columns)


def activations(rows: int, inputs: int) -> Tensor:
    """Mostly of size 1, some entries far larger."""
    x = torch.randn(rows, inputs)
    return torch.where(torch.rand(rows, inputs) < 0.03, x * 20, x)


def close(found: Tensor, expected: Tensor, size: Tensor) -> bool:
    """Equal up to the rounding of fp32 sums of terms of this ``size``."""
    return bool(((found - expected).abs() <= 2e-6 * size + 1e-6).all())


@settings(max_examples=60, deadline=None)
@given(
    isa=st.sampled_from(ISAS or ["none"]),
    rows=st.sampled_from([1, 2, 3, 5, 8, 9, 17, 64, 257]),
    inputs=st.sampled_from([1, 3, 4, 31, 64, 130, 576]),
    outputs=st.sampled_from([1, 5, 31, 32, 33, 96, 200]),
    rule=st.sampled_from(RULES),
    bias=st.booleans(),
    store=st.sampled_from([0, 1, 3]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**32),
)
def test_int8_linear_is_the_op(
    isa: str, rows: int, inputs: int, outputs: int, rule: Decomposition, bias: bool, store: int, threads: int, seed: int
) -> None:
    torch.manual_seed(seed)
    stored = min(store, inputs)
    if rule.outliers == "static" and not stored:
        stored = 1
    layer = int8_layer(outputs, inputs, bias=bias, stored=stored, rule=rule)
    layer.weight[:1, :1] = -128  # which other programs write
    x = activations(rows, inputs)
    found = pack_linear([layer], isa, "float32")(x, threads=threads)
    size = x.abs() @ layer.dequantize().weight.abs().T + 1
    assert close(found, layer(x), size)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_rows_that_hold_nothing_or_nonsense(isa: str) -> None:
    layer = int8_layer(40, 50, bias=True, stored=2, rule=Decomposition())
    x = activations(6, 50)
    x[0] = 0
    x[1, 3] = math.nan
    x[2, 4] = math.inf
    x[3] = 1e-42  # denormal: the scale is rounded to almost nothing
    x[4] = 3e38 * torch.rand(50)
    found, expected = pack_linear([layer], isa, "float32")(x), layer(x)
    assert torch.equal(found[0], layer.bias.detach())
    assert not found[1:3].isfinite().any()
    assert close(found[3], expected[3], torch.ones(()))
    assert torch.allclose(found[4], expected[4], rtol=1e-4, equal_nan=True)
    assert close(found[5], expected[5], torch.tensor(100.0))
    alone = pack_linear([layer], isa, "float32")(x[5:])
    assert torch.equal(alone[0], found[5]), "a row depends on its neighbours"


@pytest.mark.parametrize("isa", ISAS)
def test_int8_product_is_exact_at_its_extremes(isa: str) -> None:
    """All codes at the ends of their range, so that the 32-bit sums come as far as they can."""
    inputs = 4099
    layer = int8_layer(33, inputs, bias=False, stored=0, rule=Decomposition(outliers=None))
    layer.scale.fill_(1.0)
    for weight, value in itertools.product((-128, -127, 127), (-1.0, 1.0)):
        layer.weight.fill_(weight)
        for rows in (3, 37):
            found = pack_linear([layer], isa, "float32")(torch.full((rows, inputs), value * 127))
            assert torch.equal(found, torch.full((rows, 33), float(weight * value * 127 * inputs)))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type_", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 576, 192), (7, 33, 65), (130, 3, 1), (300, 96, 40)])
def test_floating_point_linear(isa: str, type_: str, shape: tuple[int, int, int]) -> None:
    rows, inputs, outputs = shape
    layer = nn.Linear(inputs, outputs)
    x = torch.randn(rows, inputs)
    exact = x.double() @ layer.weight.double().T + layer.bias.double()
    size = x.abs() @ layer.weight.abs().T + 1
    error = (pack_linear([layer], isa, type_)(x).double() - exact).abs() / size
    assert error.max() < (1e-6 if type_ == "float32" else 2**-7)
    half = pack_linear([layer], isa, type_)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.allclose(half.double(), exact, atol=0.1, rtol=0.02)


def test_a_store_that_does_not_fit_is_refused_before_any_address_is_used() -> None:
    for damage in ("far", "negative", "short", "wide"):
        layer = int8_layer(8, 16, bias=False, stored=2, rule=Decomposition())
        assert layer.outlier_columns is not None and layer.outlier_weight is not None
        if damage in ("far", "negative"):
            layer.outlier_columns[1] = 16 if damage == "far" else -1
        else:
            layer.outlier_weight = layer.outlier_weight[:4] if damage == "short" else layer.outlier_weight.float()
        with pytest.raises(UnsupportedModelError, match="store"):
            pack_linear([layer], ISAS[0], "float32")
    empty = int8_layer(8, 16, bias=False, stored=0, rule=Decomposition())
    empty.outlier_columns, empty.outlier_weight = torch.zeros(0, dtype=torch.int64), torch.zeros(8, 0).half()
    assert pack_linear([empty], ISAS[0], "float32")(torch.ones(1, 16)).shape == (1, 8)


@pytest.mark.parametrize("outliers", ["static", "token", None])
def test_a_tied_head_has_no_store_and_so_no_static_outliers(outliers: Any) -> None:
    embedding = Int8Embedding.from_embedding(nn.Embedding(40, 16))
    head = Int8TiedHead(embedding, Decomposition(2.0, "absolute", outliers))
    assert (decomposition_of(head) is None) == (outliers == "static")
    x = activations(5, 16)
    assert torch.allclose(pack_linear([head], ISAS[0], "float32")(x), head(x), atol=1e-4)


def test_wrong_rows_are_refused() -> None:
    packed = pack_linear([nn.Linear(8, 4)], ISAS[0], "float32")
    for x in (torch.zeros(2, 7), torch.zeros(2, 8, dtype=torch.int64), torch.zeros(())):
        with pytest.raises(ConfigurationError, match="multiplies"):
            packed(x)
    assert packed(torch.zeros(0, 8)).shape == (0, 4)
    assert torch.equal(packed(torch.ones(8, 2).t()), packed(torch.ones(2, 8)))  # not contiguous


# --- attention -------------------------------------------------------------------------------------------------------


def quantize_rows(x: Tensor) -> Tensor:
    """(n, D) fp32 -> (n, D + 4) int8, as keys and values are stored: codes, then their scale."""
    scale = x.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(scale > 1.2e-38, x / scale, 0).round().to(torch.int8)
    return torch.cat([codes, scale.view(torch.int8)], -1)


def scales(stored: Tensor) -> Tensor:
    """(n, 1) fp32."""
    return stored[:, -4:].clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.float32)[:, None]


def entries(stored: Tensor) -> Tensor:
    """(n, D) fp64: the numbers that are stored."""
    if stored.dtype != torch.int8:
        return stored.double()
    return stored[:, :-4].double() * scales(stored).double()


@pytest.mark.parametrize("isa", ISAS)
def test_keys_and_values_in_int8(isa: str) -> None:
    library = core()
    assert library is not None
    for dim, size in itertools.product((2, 6, 16, 64, 80, 128, 250), (1.0, 1e-3, 1e-37, 1e30)):
        x = size * torch.randn(20, dim)
        x[3] = 0
        x[4] = 1e-40  # denormal: as good as zero
        x[5, 1], x[6, 0], x[7, 1] = torch.inf, torch.nan, -torch.inf
        found = torch.full((20, dim + 5), 99, dtype=torch.int8)
        for row, out in zip(x, found, strict=True):
            library.quantize(isa, row.data_ptr(), dim, out.data_ptr())
        assert (found[:, -1] == 99).all()
        found, expected = found[:, :-1].contiguous(), quantize_rows(x)
        scale, codes = scales(found)[:, 0], found[:, :-4].float()
        finite = torch.tensor([i not in (5, 6, 7) for i in range(20)])
        assert torch.equal(found[finite, -4:], expected[finite, -4:]) and scale[~finite].isnan().all()
        normal = finite & (scale > 1.2e-38)
        error = (codes * scale[:, None] - x).abs()[normal]
        assert (error <= scale[normal, None] * (0.5 + 1e-4)).all() and (codes.abs().amax(-1)[normal] == 127).all()
        assert (codes[finite & ~normal] == 0).all()


def attend(
    isa: str,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    *,
    head: int,
    group: int,
    start: int,
    window: int,
) -> tuple[Tensor, Tensor]:
    """(tokens, group, D) and log-sum-exp (tokens, group) of q (tokens, heads, D) over one head's keys (n, D)."""
    tokens, heads, dim = q.shape
    library = core()
    assert library is not None
    order = torch.arange(tokens, dtype=torch.int32)
    out, state = torch.full((tokens, heads, dim), 7.0), torch.full((tokens, heads, 2), 7.0)
    library.attend(
        isa, str(keys.dtype).removeprefix("torch."), dim, q.data_ptr(), heads * dim, order.data_ptr(),
        positions.data_ptr(), tokens, group, head, keys.data_ptr(), values.data_ptr(), len(keys), start, window,
        out[:, head:].data_ptr(), state[:, head:].data_ptr(), heads,
    )  # fmt: skip
    untouched = [h for h in range(heads) if not head <= h < head + group]
    assert (out[:, untouched] == 7.0).all() and (state[:, untouched] == 7.0).all()
    mine, state = out[:, head : head + group], state[:, head : head + group]
    return mine / state[..., 1:], (state[..., 0] + state[..., 1].log2()) * math.log(2)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type_", [torch.float32, torch.bfloat16, torch.int8])
@settings(max_examples=60, deadline=None)
@given(
    dim=st.sampled_from([6, 16, 32, 64, 80, 96, 128, 256]),
    tokens=st.one_of(st.integers(1, 4), st.integers(5, 24)),  # the few of a decoding step have a way of their own
    group=st.sampled_from([1, 2, 3, 4]),
    n=st.sampled_from([1, 2, 15, 16, 17, 31, 33, 64, 255, 257, 600, 1100]),
    causal=st.booleans(),
    window=st.sampled_from([0, 0, 1, 5, 100]),
    seed=st.integers(0, 2**32),
)
def test_attention(
    isa: str, type_: torch.dtype, dim: int, tokens: int, group: int, n: int, causal: bool, window: int, seed: int
) -> None:
    torch.manual_seed(seed)
    heads, head, start = 2 * group, group, 3
    query_type = torch.float32 if type_ == torch.float32 else torch.bfloat16
    q = (3 * torch.randn(tokens, heads, dim)).to(query_type)
    stored = [torch.randn(n, dim) * torch.rand(n, 1) for _ in range(2)]
    stored = [quantize_rows(x) if type_ == torch.int8 else x.to(type_) for x in stored]
    keys, values = map(entries, stored)
    # bf16 ones are multiplied as they are, int8 ones perhaps in bf16; shares of the values perhaps in bf16
    bound, bound_lse = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (2e-2, 2e-3), torch.int8: (4e-2, 4e-2)}[type_]
    positions = start + (torch.randint(n, (tokens,)) if causal else torch.full((tokens,), n + 2))
    scale = dim**-0.5
    scaled = (q.float() * (scale / math.log(2))).to(query_type)
    found, lse = attend(isa, scaled, *stored, positions, head=head, group=group, start=start, window=window)

    places = start + torch.arange(n)
    seen = places <= positions[:, None]
    if window:
        seen &= places > positions[:, None] - window
    scores = scaled[:, head : head + group].double() * math.log(2) @ keys.T
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    some = seen.any(-1)
    exact = (scores.softmax(-1) @ values)[some]
    error = (found[some] - exact).abs().max() if some.any() else torch.tensor(0.0)
    assert error < bound
    assert torch.allclose(lse[some].double(), scores.logsumexp(-1)[some], atol=bound_lse)
    assert lse[~some].isnan().all() or (lse[~some] == -torch.inf).all()


@pytest.mark.parametrize("isa", ISAS)
def test_attention_of_large_scores_does_not_overflow(isa: str) -> None:
    q, keys = torch.full((1, 1, 64), 90.0), torch.cat([torch.full((300, 64), -90.0), torch.full((3, 64), 90.0)])
    values = torch.arange(303.0)[:, None].expand(-1, 64).contiguous()
    found, lse = attend(isa, q, keys, values, torch.tensor([400]), head=0, group=1, start=0, window=0)
    assert torch.allclose(found, torch.full_like(found, 301.0))
    assert torch.allclose(lse, torch.tensor(90.0 * 90 * 64 * math.log(2) + math.log(3.0)))


# --- the rest --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("n", [1, 3, 16, 17, 100, 4099])
def test_argmax(isa: str, n: int) -> None:
    library = core()
    assert library is not None

    def find(x: Tensor) -> int:
        return int(library.argmax(isa, x.data_ptr(), n))

    x = torch.randn(n)
    assert find(x) == int(x.argmax())
    equal = torch.zeros(n)
    assert find(equal) == 0  # the first of them
    equal[-1] = math.nan
    assert find(equal) == -1
    assert find(torch.full((n,), -math.inf)) == -1
    x[n // 2] = math.inf
    assert find(x) == n // 2
