"""A linear layer with int8 weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.int8_weight import Int8Weight, Rows, linear_weight, quantize_weight
from gossamer.ops.int8 import dequantize_rows, int8_linear, piece_rows
from gossamer.options import Criterion, Outliers, check_decomposition


@dataclass(frozen=True)
class Decomposition:
    """Which entries of its input a layer multiplies in floating point; see :mod:`gossamer.ops.int8`.

    Raises:
        ConfigurationError: a setting has no meaning.
    """

    threshold: float = 6.0
    criterion: Criterion = "relative"
    outliers: Outliers | None = "token"

    def __post_init__(self) -> None:
        check_decomposition(self.threshold, self.criterion, self.outliers)


class Int8Linear(nn.Module):
    """``y = x W^T + b`` as LLM.int8() computes it (:func:`gossamer.ops.int8.int8_linear`).

    Input of any of fp32, bf16 and fp16 gives output of the same type. Training and evaluation mode compute the same.
    ``.to(dtype)`` changes the bias only: scale and outlier weights keep the precision they have.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        decomposition: what is an outlier.
        num_outlier_columns: S, columns of the outlier store.
        device: of all tensors; ``"meta"`` allocates nothing.
        dtype: of the bias, and of the outlier weights if it has 16 bit; they are fp16 otherwise.

    Attributes:
        weight: buffer (N, K) int8.
        scale: buffer (N) fp32; ``W ~= weight * scale[:, None]``.
        bias: parameter (N), or ``None``.
        outlier_columns: buffer (S) int64, or ``None``: columns whose weights are kept in 16 bit.
        outlier_weight: buffer (N, S), or ``None``: these weights.

    >>> layer = Int8Linear.from_linear(nn.Linear(16, 4))
    >>> layer(torch.randn(2, 16)).shape, layer.weight.dtype
    (torch.Size([2, 4]), torch.int8)
    """

    weight: Tensor
    scale: Tensor
    outlier_columns: Tensor | None
    outlier_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        decomposition: Decomposition | None = None,
        num_outlier_columns: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.decomposition = decomposition or Decomposition()
        self._register_codes(device)
        self.register_buffer("scale", torch.zeros(out_features, dtype=torch.float32, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None
        self.register_buffer("outlier_columns", None)
        self.register_buffer("outlier_weight", None)
        if num_outlier_columns:
            self.outlier_columns = torch.arange(num_outlier_columns, device=device)
            half = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
            self.outlier_weight = torch.zeros(out_features, num_outlier_columns, device=device, dtype=half)

    def _register_codes(self, device: torch.device | str | None) -> None:
        codes = torch.zeros(self.out_features, self.in_features, dtype=torch.int8, device=device)
        self.register_buffer("weight", codes)

    def _take_rest(self, other: Int8Linear) -> None:
        """Share everything but the codes."""
        self.scale, self.bias = other.scale, other.bias
        self.outlier_columns, self.outlier_weight = other.outlier_columns, other.outlier_weight

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, decomposition: Decomposition | None = None, outlier_columns: Tensor | None = None
    ) -> Self:
        """Quantize an ``nn.Linear`` (or transformers' ``Conv1D``).

        Args:
            linear: weights fp32, bf16 or fp16. It is left as it is; the bias is shared with it.
            decomposition: what is an outlier.
            outlier_columns: (S) columns whose weights are kept in 16 bit as well.

        Raises:
            ConfigurationError: it is no linear layer, or its weight cannot be quantized.
        """
        weight = linear_weight(linear)
        if weight is None:
            raise ConfigurationError(f"a {type(linear).__name__} is no linear layer; from_linear takes nn.Linear")
        return cls.from_weight(
            quantize_weight(weight.detach()),
            linear.bias,  # type: ignore[arg-type]
            decomposition=decomposition,
            outlier_columns=outlier_columns,
            source=weight.detach(),
        )

    @classmethod
    def from_weight(
        cls,
        quantized: Int8Weight,
        bias: nn.Parameter | None = None,
        *,
        decomposition: Decomposition | None = None,
        outlier_columns: Tensor | None = None,
        source: Rows | None = None,
    ) -> Self:
        """A layer of a quantized weight; ``source`` (N, K) is the weight that ``outlier_columns`` are taken from."""
        outputs, inputs = quantized.codes.shape
        layer = cls(inputs, outputs, bias=False, decomposition=decomposition, device="meta")
        layer.weight, layer.scale, layer.bias = quantized.codes, quantized.scale, bias
        if outlier_columns is not None and len(outlier_columns) and source is not None:
            layer.keep_columns(outlier_columns, source)
        return layer

    def keep_columns(self, columns: Tensor, source: Rows) -> None:
        """Put the weights of ``columns`` (S), taken from ``source`` (N, K), into the outlier store, in 16 bit."""
        columns = columns.sort().values
        step = piece_rows(self.in_features)
        pieces = [source[start : start + step][:, columns] for start in range(0, self.out_features, step)]
        exact = torch.cat(pieces) if pieces else torch.zeros(0, len(columns))
        self.outlier_columns = columns.to(self.scale.device)
        self.outlier_weight = (exact if exact.dtype.itemsize == 2 else in_16_bit(exact)).to(self.scale.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x."""
        settings = self.decomposition
        return int8_linear(
            x,
            self.weight,
            self.scale,
            self.bias,
            settings.threshold,
            settings.criterion,
            settings.outliers,
            outlier_columns=self.outlier_columns,
            outlier_weight=self.outlier_weight,
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An ``nn.Linear`` with the weight that the codes stand for, and exact columns where they are kept."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        codes = self.weight
        weight = torch.empty(self.out_features, self.in_features, dtype=dtype, device=codes.device)
        step = piece_rows(self.in_features)
        for start in range(0, self.out_features, step):
            part = slice(start, start + step)
            exact = None if self.outlier_weight is None else self.outlier_weight[part]
            weight[part] = dequantize_rows(codes[part], self.scale[part], self.outlier_columns, exact)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype), requires_grad=False)
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale, exact = self.scale, self.outlier_weight
        super()._apply(fn, recurse)
        self.scale = keep_type(scale, self.scale)
        if exact is not None and self.outlier_weight is not None:
            self.outlier_weight = keep_type(exact, self.outlier_weight)
        return self

    def extra_repr(self) -> str:
        store = 0 if self.outlier_columns is None else len(self.outlier_columns)
        settings = self.decomposition
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"threshold={settings.threshold:g}, criterion={settings.criterion}, outliers={settings.outliers}, "
            f"outlier_columns={store}"
        )


def in_16_bit(weight: Tensor) -> Tensor:
    """fp16, which is closer to fp32 than bf16 is, unless a value is too large for it."""
    half = weight.to(torch.float16)
    return half if bool(half.isfinite().all()) else weight.to(torch.bfloat16)


def keep_type(before: Tensor, after: Tensor) -> Tensor:
    """``after``, or ``before`` on its device if ``module.to(dtype)`` has made ``after`` another type."""
    return after if after.dtype == before.dtype else before.to(after.device)


def is_int8(module: Any) -> bool:
    """Whether a module has been quantized already, by Gossamer or by another library (its weight is int8)."""
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dtype == torch.int8
