"""What surrounds the arithmetic of the int8 op: the compiler, gradients, and arguments that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear as plain_linear

from gossamer.errors import ConfigurationError
from gossamer.ops import int8
from gossamer.ops.int8 import dequantize_rows, int8_linear, int8_matmul, quantize_columnwise, quantize_rowwise
from int8_references import EPS, Layer, linear, random_layer, random_rows

MODES = ("batch", "token", "static", None)
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def dequantized(layer: Layer) -> Tensor:
    """The weight the layer stands for, written as a loop over its kept columns."""
    weight = torch.stack([row * scale for row, scale in zip(layer.weight.float(), layer.scale, strict=True)])
    if layer.outlier_columns is not None and layer.outlier_weight is not None:
        for column, exact in zip(layer.outlier_columns.tolist(), layer.outlier_weight.float().T, strict=True):
            weight[:, column] = exact
    return weight


@pytest.fixture
def layer() -> Layer:
    return random_layer(torch.Generator().manual_seed(0), 48, 12, bias=True, kept=[40, 7])


@pytest.fixture
def x() -> Tensor:
    return random_rows(torch.Generator().manual_seed(1), 2, 5, 48, share=0.05)


# --- torch.library and torch.compile ---------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
def test_the_op_keeps_what_torch_library_asks_of_it(
    layer: Layer, x: Tensor, mode: str | None, dtype: torch.dtype
) -> None:
    """Schema, fake implementation, autograd registration and tracing with dynamic shapes."""
    for bias, columns, exact in ((layer.bias, layer.outlier_columns, layer.outlier_weight), (None, None, None)):
        if mode == "static" and columns is None:
            continue
        for values in (x.to(dtype), x.to(dtype).requires_grad_(), x[0, 0].to(dtype), x[:0].to(dtype)):
            arguments = (values, layer.weight, layer.scale, bias, 6.0, "relative", mode, columns, exact)
            torch.library.opcheck(torch.ops.gossamer.int8_linear.default, arguments)


def test_the_op_and_the_function_are_the_same(layer: Layer, x: Tensor) -> None:
    for mode in MODES:
        arguments = (x, layer.weight, layer.scale, layer.bias, 6.0, "relative", mode)
        op = torch.ops.gossamer.int8_linear(*arguments, layer.outlier_columns, layer.outlier_weight)
        assert torch.equal(op, linear(x, layer, 6.0, "relative", mode))


def test_shapes_without_numbers(layer: Layer, x: Tensor) -> None:
    meta = Layer(*(None if part is None else part.to("meta") for part in layer))
    for mode in MODES:
        result = linear(x.to("meta", torch.bfloat16), meta, 6.0, "relative", mode)
        assert (result.shape, result.dtype, result.device.type) == ((2, 5, 12), torch.bfloat16, "meta")


@pytest.mark.parametrize("mode", MODES)
def test_compiled_code_is_one_graph_whatever_the_outliers_are(layer: Layer, x: Tensor, mode: str | None) -> None:
    """As many outliers as there may be, or none: nothing is traced again."""
    graphs = 0

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return graph.forward

    def run(x: Tensor) -> Tensor:
        return linear(x.tanh() * 10, layer, 3.0, "relative", mode).relu()

    compiled = torch.compile(run, backend=count, fullgraph=True, dynamic=False)
    for inputs in (x, x * 0.01, x * 0, x.flip(-1), torch.full_like(x, 3.0)):
        assert torch.equal(compiled(inputs), run(inputs))
    assert graphs == 1


def test_compiled_by_inductor_with_gradients(layer: Layer) -> None:
    """Two layers with different settings, a varying number of rows, forward and backward."""
    generator = torch.Generator().manual_seed(2)
    second = random_layer(generator, 12, 6, kept=[1])

    def run(x: Tensor) -> Tensor:
        return linear(linear(x, layer, 6.0, "relative", "token").relu(), second, 3.0, "absolute", "batch")

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for rows, share in ((4, 0.0), (9, 0.2), (17, 0.05)):
        x = random_rows(generator, rows, 48, share=share)
        eager_x, compiled_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        eager, result = run(eager_x), compiled(compiled_x)
        torch.testing.assert_close(result, eager, rtol=1e-5, atol=1e-5)
        eager.square().sum().backward()
        result.square().sum().backward()
        torch.testing.assert_close(compiled_x.grad, eager_x.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_autocast_changes_nothing(layer: Layer, x: Tensor, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(int8, "_int_mm_is_fast", lambda device: fast)
    plain = linear(x, layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear(x, layer), plain)
        assert torch.equal(linear(x.clone().requires_grad_(), layer), plain)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("piece", [1, 5, 10**6])  # rows of the weight at a time
def test_the_gradient_is_that_of_the_dequantized_layer(
    layer: Layer, x: Tensor, mode: str | None, dtype: torch.dtype, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(int8, "piece_rows", lambda columns: piece)
    assert layer.bias is not None
    own = layer._replace(bias=layer.bias.to(dtype).requires_grad_())
    values = x.to(dtype).requires_grad_()
    result = linear(values, own, 6.0, "relative", mode)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(3)).to(dtype)
    grad_x, grad_bias = torch.autograd.grad(result, [values, own.bias], upstream)

    x64, bias64 = x.double().requires_grad_(), layer.bias.double().requires_grad_()
    expected = torch.autograd.grad(
        plain_linear(x64, dequantized(layer).double(), bias64), [x64, bias64], upstream.double()
    )
    assert grad_x.dtype == grad_bias.dtype == dtype
    rounding = 32 * EPS if dtype == torch.float32 else torch.finfo(dtype).eps
    for actual, exact in zip((grad_x, grad_bias), expected, strict=True):
        torch.testing.assert_close(actual.double(), exact, rtol=rounding, atol=rounding * float(exact.abs().max()))


def test_the_gradient_predicts_small_steps(layer: Layer, x: Tensor) -> None:
    """Against differences of the op itself: steps of many codes, so that rounding to codes averages out."""
    values = x.flatten(0, 1).requires_grad_()
    direction = torch.randn(values.shape, generator=torch.Generator().manual_seed(4))
    weights = torch.randn(12, generator=torch.Generator().manual_seed(5))
    (grad,) = torch.autograd.grad((linear(values, layer) @ weights).sum(), values)
    with torch.no_grad():
        ahead = (linear(values + direction, layer) @ weights).sum()
        behind = (linear(values - direction, layer) @ weights).sum()
    assert float((ahead - behind) / 2) == pytest.approx(float((grad * direction).sum()), rel=0.02)


def test_gradients_reach_the_input_and_the_bias_only(layer: Layer, x: Tensor) -> None:
    assert layer.bias is not None and layer.outlier_weight is not None
    frozen = layer._replace(
        scale=layer.scale.clone().requires_grad_(), outlier_weight=layer.outlier_weight.clone().requires_grad_()
    )
    assert not linear(x, frozen).requires_grad
    result = linear(x.clone().requires_grad_(), frozen)
    parts = [frozen.scale, frozen.outlier_weight]
    assert torch.autograd.grad(result.sum(), parts, allow_unused=True) == (None, None)
    # and each of the two without the other
    bias = layer.bias.clone().requires_grad_()
    (grad,) = torch.autograd.grad(linear(x, layer._replace(bias=bias)).sum(), bias)
    assert torch.equal(grad, torch.full((12,), 10.0))
    with torch.no_grad():
        assert not linear(x.clone().requires_grad_(), layer).requires_grad
    with torch.inference_mode():
        assert torch.equal(linear(x, layer), linear(x.clone(), layer))


def test_the_second_derivative_is_that_of_a_linear_layer(layer: Layer, x: Tensor) -> None:
    values = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(linear(values, layer).square().sum() / 2, values, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), values)
    weight = dequantized(layer)
    expected = (weight.T @ weight).sum(0).expand_as(x)
    torch.testing.assert_close(second, expected, rtol=1e-4, atol=1e-4)


def test_dequantized_rows(layer: Layer) -> None:
    assert torch.equal(dequantize_rows(*layer[1:3], *layer[4:6]), dequantized(layer))


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", MODES)
def test_scales_biases_and_kept_weights_may_have_other_floating_types(
    layer: Layer, x: Tensor, dtype: torch.dtype, mode: str | None
) -> None:
    """A model that was cast as a whole still works; sums stay in fp32."""
    cast = layer._replace(**{name: getattr(layer, name).to(dtype) for name in ("scale", "bias", "outlier_weight")})
    rounded = cast._replace(**{name: getattr(cast, name).float() for name in ("scale", "bias", "outlier_weight")})
    values = x.clone().requires_grad_()
    result = linear(values, cast, 6.0, "relative", mode)
    torch.testing.assert_close(result, linear(x, rounded, 6.0, "relative", mode), rtol=8 * EPS, atol=8 * EPS)
    assert torch.autograd.grad(result.sum(), values)[0].isfinite().all()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "threshold of 0": ({"threshold": 0}, "threshold"),
    "negative threshold": ({"threshold": -1.0}, "threshold"),
    "threshold that is not a number": ({"threshold": float("nan")}, "threshold"),
    "truth for a threshold": ({"threshold": True}, "threshold"),
    "text for a threshold": ({"threshold": "6"}, "threshold"),
    "no threshold": ({"threshold": None}, "outliers=None"),
    "unknown criterion": ({"criterion": "both"}, "'absolute' or 'relative'"),
    "unknown extent": ({"outliers": "row"}, "'batch', 'token', 'static' or None"),
    "static without a store": (
        {"outliers": "static", "outlier_columns": None, "outlier_weight": None},
        "outlier_columns and outlier_weight",
    ),
    "columns without weights": ({"outlier_weight": None}, "one of them is missing"),
    "weights without columns": ({"outlier_columns": None}, "one of them is missing"),
    "columns of int32": ({"outlier_columns": torch.tensor([40, 7], dtype=torch.int32)}, "int64"),
    "columns in two dimensions": ({"outlier_columns": torch.tensor([[40, 7]])}, "int64"),
    "column before the first": ({"outlier_columns": torch.tensor([-1, 7])}, "-1"),
    "column after the last": ({"outlier_columns": torch.tensor([7, 48])}, "48"),
    "kept weights of another shape": ({"outlier_weight": torch.zeros(12, 3)}, "outlier_weight"),
    "kept weights the other way round": ({"outlier_weight": torch.zeros(2, 12)}, "outlier_weight"),
    "kept weights that are integers": ({"outlier_weight": torch.zeros(12, 2, dtype=torch.int8)}, "outlier_weight"),
    "x of float64": ({"x": torch.zeros(3, 48, dtype=torch.float64)}, "float32, bfloat16 or float16"),
    "x of integers": ({"x": torch.zeros(3, 48, dtype=torch.int8)}, "float32, bfloat16 or float16"),
    "x of complex numbers": ({"x": torch.zeros(3, 48, dtype=torch.complex64)}, "float32, bfloat16 or float16"),
    "x with other columns": ({"x": torch.zeros(3, 47)}, "48"),
    "x without dimensions": ({"x": torch.tensor(1.0)}, "48"),
    "weight of floats": ({"weight": torch.zeros(12, 48)}, "int8"),
    "weight of uint8": ({"weight": torch.zeros(12, 48, dtype=torch.uint8)}, "int8"),
    "weight in one dimension": ({"weight": torch.zeros(48, dtype=torch.int8)}, "int8"),
    "weight in three dimensions": ({"weight": torch.zeros(1, 12, 48, dtype=torch.int8)}, "int8"),
    "weight the other way round": ({"weight": torch.zeros(48, 12, dtype=torch.int8)}, "12"),
    "scale as a column": ({"scale": torch.zeros(12, 1)}, "scale"),
    "scale of another length": ({"scale": torch.zeros(48)}, "scale"),
    "one scale for all": ({"scale": torch.tensor(1.0)}, "scale"),
    "scale of integers": ({"scale": torch.zeros(12, dtype=torch.int32)}, "scale"),
    "bias of another length": ({"bias": torch.zeros(1)}, "bias"),
    "bias of integers": ({"bias": torch.zeros(12, dtype=torch.int64)}, "bias"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["", "with gradients"])
@pytest.mark.parametrize("case", BAD)
def test_arguments_that_do_not_fit(layer: Layer, case: str, grad: bool) -> None:
    changes, words = BAD[case]
    arguments: dict[str, Any] = {"x": torch.ones(3, 48), **layer._asdict()}
    del arguments["original"]
    arguments |= changes
    if grad and arguments["x"].is_floating_point():
        arguments["x"] = arguments["x"].clone().requires_grad_()
    with pytest.raises(ConfigurationError, match=words):
        int8_linear(**arguments)


@pytest.mark.parametrize(
    ("left", "right", "words"),
    [
        (torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int8), "int8 codes"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.uint8), "int8 codes"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(3, 2, dtype=torch.int8), "same K"),
        (torch.zeros(3, dtype=torch.int8), torch.zeros(2, 3, dtype=torch.int8), "same K"),
        (torch.zeros(2, 3, dtype=torch.int8), torch.zeros(1, 2, 3, dtype=torch.int8), "same K"),
        (torch.zeros(0, 131_072, dtype=torch.int8), torch.zeros(0, 131_072, dtype=torch.int8), "131071"),
    ],
)
def test_codes_that_do_not_fit(left: Tensor, right: Tensor, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        int8_matmul(left, right)


@pytest.mark.parametrize("quantize", [quantize_rowwise, quantize_columnwise])
@pytest.mark.parametrize(
    "x", [torch.tensor(1.0), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.int32)], ids=str
)
def test_numbers_that_cannot_be_quantized(quantize: Callable[[Tensor], tuple[Tensor, Tensor]], x: Tensor) -> None:
    with pytest.raises(ConfigurationError):
        quantize(x)
