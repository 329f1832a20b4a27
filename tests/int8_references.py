"""Quantized layers to test with, and the layer as arXiv 2208.07339 writes it, in fp64 and int64: none of our code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gossamer.ops.int8 import int8_linear

EPS = 2.0**-23  # of fp32, in which the op adds


class Layer(NamedTuple):
    """A quantized layer, with the weights (N, K) it was made from."""

    original: Tensor
    weight: Tensor
    scale: Tensor
    bias: Tensor | None = None
    outlier_columns: Tensor | None = None
    outlier_weight: Tensor | None = None


class Expected(NamedTuple):
    """The result (M, N) fp64, and how far fp32 sums of the same terms may be from it."""

    result: Tensor
    tolerance: Tensor


def random_layer(
    generator: torch.Generator, inputs: int, outputs: int, *, bias: bool = False, kept: list[int] | None = None
) -> Layer:
    """Codes that use the whole range, scales of different sizes; ``kept``: the columns of the outlier store."""
    original = torch.randn(outputs, inputs, generator=generator) * torch.rand(outputs, 1, generator=generator)
    size = original.abs().amax(1) if inputs else torch.zeros(outputs)
    scale = size / 127
    codes = (original / scale[:, None]).round().nan_to_num(0.0).clamp(-127, 127).to(torch.int8)
    columns = None if kept is None else torch.tensor(kept, dtype=torch.int64)
    return Layer(
        original,
        codes,
        scale,
        torch.randn(outputs, generator=generator) if bias else None,
        columns,
        None if columns is None else original[:, columns].bfloat16(),
    )


def random_rows(generator: torch.Generator, *shape: int, share: float = 0.02, size: float = 25.0) -> Tensor:
    """Normal numbers, of which a share is larger by ``size``."""
    x = torch.randn(*shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < share, x * size, x)


def linear(x: Tensor, layer: Layer, *arguments: Any) -> Tensor:
    """The op, with all that the layer holds; ``arguments``: threshold, criterion, outliers."""
    kept = {"outlier_columns": layer.outlier_columns, "outlier_weight": layer.outlier_weight}
    return int8_linear(x, layer.weight, layer.scale, layer.bias, *arguments, **kept)


def expected_linear(
    x: Tensor, layer: Layer, threshold: float = 6.0, criterion: str = "relative", outliers: str | None = "token"
) -> Expected:
    """Eq. 8 over the rows of x (M, K): columns O are cut out, the rest is quantized and multiplied as integers.

    Per token it is the same, for a batch of one row at a time.
    """
    if outliers == "token":
        parts = [expected_linear(row[None], layer, threshold, criterion, "batch") for row in x]
        if not parts:
            return expected_linear(x, layer, outliers=None)
        return Expected(*(torch.cat(part) for part in zip(*parts, strict=True)))
    x = x.double()
    taken = torch.zeros(x.shape[1], dtype=torch.bool)
    if outliers == "static":
        assert layer.outlier_columns is not None
        taken[layer.outlier_columns] = True
    elif outliers == "batch" and len(x):
        limit = threshold if criterion == "absolute" else threshold * x.abs().mean(1, keepdim=True)
        taken = ((x.abs() >= limit) if criterion == "absolute" else (x.abs() > limit)).any(0)
    # floating-point part: 16-bit weights where they are kept
    dequantized = layer.weight.double() * layer.scale.double()[:, None]
    if layer.outlier_columns is not None and layer.outlier_weight is not None:
        dequantized[:, layer.outlier_columns] = layer.outlier_weight.double()
    left, right = x[:, taken], dequantized[:, taken].T
    # int8 part; scale and quotient are fp32 numbers by definition, so that codes can be compared at all
    rest = x[:, ~taken]
    size = rest.abs().amax(1, keepdim=True) if rest.shape[1] else rest.new_zeros(len(rest), 1)
    scale = (size / 127).float().double()
    codes = (rest / scale).float().round().nan_to_num(0.0).clamp(-127, 127).long()
    integers = (codes @ layer.weight[:, ~taken].long().T).double() * scale * layer.scale.double()
    offset = torch.zeros(1, dtype=torch.float64) if layer.bias is None else layer.bias.double()
    magnitude = integers.abs() + left.abs() @ right.abs() + offset.abs()
    return Expected(left @ right + integers + offset, (int(taken.sum()) + 8) * EPS * magnitude)


def assert_as_expected(actual: Tensor, expected: Expected) -> None:
    """Equal up to the rounding of fp32 sums, and of the result to its own type."""
    own = torch.finfo(actual.dtype)
    tolerance = expected.tolerance + (0.0 if own.bits == 32 else own.eps) * expected.result.abs() + own.tiny
    error = (actual.double() - expected.result).abs()
    assert actual.shape == expected.result.shape
    assert bool((error <= tolerance).all()), f"off by {(error / tolerance).max():.3g} times the tolerance"
