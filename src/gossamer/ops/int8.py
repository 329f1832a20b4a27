"""LLM.int8(): 8-bit matrix products with outliers in 16 bit (Dettmers et al. 2022, arXiv 2208.07339).

A linear layer ``y = x W^T + b`` is computed as (the paper's eq. 8, section 3.2)

    y = x[:, O] W[:, O]^T  +  s_x s_w^T * (X_i8 W_i8^T)  +  b

* ``O``, the outliers, are the few large entries of ``x``; their products run in floating point.
* Everything else runs in int8 with *vector-wise* scales: ``X_i8 = round(x / s_x)`` with ``s_x = absmax(row) / 127`` for
  every row of ``x`` without its outliers, ``W_i8 = round(W / s_w)`` with ``s_w = absmax(row) / 127`` for every output.
* The product of codes is an exact int32 matrix; the outer product of the scales turns it back into numbers.

What counts as an outlier (:func:`outlier_mask`) has two parts. The *criterion*: ``absolute``, ``|x| >= threshold``, is
the paper's; ``relative``, ``|x| > threshold * mean(|row|)``, adapts to layers whose inputs are small throughout. The
*extent*: ``batch`` takes whole columns in which any row has an outlier, as the paper does, so that a row's result
depends on its neighbours in the batch; ``token`` takes single entries, so that it does not, up to the rounding of fp32
sums; ``static`` takes a fixed set of columns.

**The weights of outliers.** The paper keeps them in 16 bit, which needs the columns to be known when the 16-bit weight
is dropped. bitsandbytes multiplies outliers with *dequantized int8* weights. Here both are possible: columns in the
*outlier store* (``outlier_columns``, ``outlier_weight``) are multiplied with their 16-bit weights, other columns with
dequantized ones.

This file is the reference in PyTorch; it defines the semantics and runs on any device (measured on CPUs only).

>>> import torch
>>> x, weight = torch.randn(4, 64), torch.randn(8, 64)
>>> codes, scale = quantize_rowwise(weight)
>>> error = int8_linear(x, codes, scale) - x @ weight.T
>>> bool(error.abs().max() < 0.02 * (x @ weight.T).abs().max())
True
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.options import Criterion, Outliers, check_decomposition

CODE_MAX = 127  # codes are symmetric: -128 is never produced, but accepted (other programs write it)
FLOAT_TYPES = (torch.float32, torch.bfloat16, torch.float16)

# Longest inner dimension whose sums fit into int32 for all codes: K * 128 * 128 < 2^31.
INT32_SAFE_K = 2**31 // 128**2 - 1
# Longest one whose sums fp32 represents exactly: K * 128 * 128 <= 2^24.
_FLOAT_SAFE_K = 2**24 // 128**2
# Dequantized pieces of a weight stay below this, so that no floating-point copy of a whole weight ever exists.
_PIECE_BYTES = 1 << 20


def quantize_rowwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax quantization of every row: ``codes = round(x / scale)``, ``scale = absmax(row) / 127``.

    Args:
        x: (..., K), fp32, bf16 or fp16.

    Returns:
        codes (..., K) int8 in [-127, 127], and scale (...) fp32. ``x ~= codes * scale[..., None]``, with an error of at
        most ``scale / 2`` per entry (denormal scales are rounded themselves). A row of zeros has scale 0 and codes 0. A
        row with NaN or infinity has that as its scale and codes 0, so that its product is NaN.

    Raises:
        ConfigurationError: x is not fp32, bf16 or fp16.

    >>> quantize_rowwise(torch.tensor([[1.0, -2.0], [0.0, 0.0]]))
    (tensor([[  64, -127],
            [   0,    0]], dtype=torch.int8), tensor([0.0157, 0.0000]))
    """
    _check_float("x", x)
    if x.dim() == 0:
        raise ConfigurationError("x must have at least one dimension, got a scalar")
    wide = x.float()
    # amax of nothing is an error in PyTorch; a row without entries is a row of zeros
    absmax = wide.abs().amax(-1) if x.shape[-1] else wide.new_zeros(x.shape[:-1])
    scale = absmax / CODE_MAX
    # 0 / 0 and inf / inf are NaN, which no integer can hold; the scale alone carries NaN and infinity on
    codes = (wide / scale[..., None]).round_().nan_to_num_(0.0, 0.0, 0.0).clamp_(-CODE_MAX, CODE_MAX)
    return codes.to(torch.int8), scale


def quantize_columnwise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Absmax quantization of every column of x (K, N): codes (K, N) and scale (N). See :func:`quantize_rowwise`."""
    if x.dim() < 2:
        raise ConfigurationError(f"x must have at least two dimensions, got {tuple(x.shape)}")
    codes, scale = quantize_rowwise(x.transpose(-1, -2))
    return codes.transpose(-1, -2), scale


def int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """The exact product ``a @ b.T`` of int8 matrices, for every code from -128 to 127.

    Args:
        a: (M, K) int8, any strides.
        b: (N, K) int8, any strides.

    Returns:
        (M, N) int32.

    Raises:
        ConfigurationError: other types or shapes, or K so large that a sum might not fit into int32 (over 131,071).

    >>> int8_matmul(torch.full((1, 4096), -128, dtype=torch.int8), torch.full((1, 4096), -128, dtype=torch.int8))
    tensor([[67108864]], dtype=torch.int32)
    """
    if a.dtype != torch.int8 or b.dtype != torch.int8:
        raise ConfigurationError(f"int8_matmul multiplies int8 codes, got {a.dtype} and {b.dtype}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ConfigurationError(
            f"int8_matmul takes (M, K) and (N, K) with the same K, got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if a.shape[1] > INT32_SAFE_K:
        raise ConfigurationError(
            f"K is {a.shape[1]}; a sum of more than {INT32_SAFE_K} products of codes may not fit into int32. Split K "
            "and add the parts in a wider type."
        )
    if 0 in (*a.shape, b.shape[0]):
        return a.new_zeros(a.shape[0], b.shape[0], dtype=torch.int32)
    if a.shape[1] == 1:  # torch._int_mm would read past the end: oneDNN takes the row's stride for its length
        return a.int() * b.t().int()
    if _int_mm_is_fast(a.device):
        return torch._int_mm(_with_plain_strides(a), _with_plain_strides(b).t())
    return _matmul_in_fp32(a, b)


def dequantize(product: Tensor, row_scale: Tensor, column_scale: Tensor) -> Tensor:
    """``product * outer(row_scale, column_scale)``: (M, N), (M), (N) -> (M, N) fp32 (the paper's eq. 7)."""
    # the weight's scale first: codes times the scale of a row near the end of fp32's range would not fit
    return product.float() * column_scale.float() * row_scale[:, None]


def outlier_mask(x: Tensor, threshold: float, criterion: Criterion, outliers: Literal["batch", "token"]) -> Tensor:
    """Which entries of x are taken out of the int8 product.

    Args:
        x: (M, K) floating point.
        threshold: greater than 0.
        criterion: ``absolute``: ``|x| >= threshold``; ``relative``: ``|x| > threshold * mean(|row|)``.
        outliers: ``token``: these entries; ``batch``: all entries of the columns that have one.

    Returns:
        (M, K) bool. NaN is no outlier: it stays in the int8 part, and makes its row NaN.

    >>> outlier_mask(torch.tensor([[1.0, 9.0], [1.0, 2.0]]), 6.0, "absolute", "token").tolist()
    [[False, True], [False, False]]
    >>> outlier_mask(torch.tensor([[1.0, 9.0], [1.0, 2.0]]), 6.0, "absolute", "batch").tolist()
    [[False, True], [False, True]]
    """
    size = x.abs()
    # strict for "relative", so that a row of zeros has no outliers
    mask = size >= threshold if criterion == "absolute" else size > threshold * _mean(size)
    return mask.any(0, keepdim=True).expand_as(mask) if outliers == "batch" else mask


def int8_linear(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    threshold: float = 6.0,
    criterion: Criterion = "relative",
    outliers: Outliers | None = "token",
    *,
    outlier_columns: Tensor | None = None,
    outlier_weight: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias``, ``W ~= weight * scale[:, None]``, in int8 but for the outliers of x; see the module's text.

    Works under ``torch.compile(fullgraph=True)``: which entries are outliers stays inside of one op. The gradient is
    that of ``x @ W.T + bias`` (quantization of x counts as the identity); it reaches x and bias, not the weight.

    Args:
        x: (..., K), fp32, bf16 or fp16.
        weight: (N, K) int8 codes.
        scale: (N) fp32.
        bias: (N), any floating type, or ``None``.
        threshold: of the criterion; greater than 0.
        criterion: ``"absolute"`` (the paper: 6.0) or ``"relative"`` to the mean magnitude of the row.
        outliers: ``"batch"`` (the paper), ``"token"``, ``"static"`` (the columns of the store, for all rows; the
            threshold is not used), or ``None``: plain vector-wise int8.
        outlier_columns: (S) int64, columns whose weights are kept in 16 bit; without duplicates.
        outlier_weight: (N, S) the weights of these columns.

    Returns:
        (..., N) in the dtype of x; sums are in fp32. Rows of zeros give the bias. A row with NaN gives NaN, one with
        infinity gives NaN or infinity; other rows are not touched by it.

    Raises:
        ConfigurationError: types or shapes do not fit together, or a setting has no meaning.
    """
    check_decomposition(threshold, criterion, outliers)
    _check_operands(x, weight, scale, bias, outlier_columns, outlier_weight)
    if outliers == "static" and outlier_columns is None:
        raise ConfigurationError("outliers='static' needs outlier_columns and outlier_weight")
    arguments = (x, weight, scale, bias, float(threshold), criterion, outliers, outlier_columns, outlier_weight)
    differentiable = x.requires_grad or (bias is not None and bias.requires_grad)
    if torch.compiler.is_compiling() or x.is_meta or (differentiable and torch.is_grad_enabled()):
        result: Tensor = torch.ops.gossamer.int8_linear(*arguments)
        return result
    with torch.no_grad():  # scale and outlier_weight may be parameters
        return _forward(*arguments)


def dequantize_rows(
    codes: Tensor, scale: Tensor, outlier_columns: Tensor | None = None, outlier_weight: Tensor | None = None
) -> Tensor:
    """The weight (N, K) fp32 that codes (N, K) and scale (N) stand for, with the columns of the outlier store, if any.

    >>> dequantize_rows(torch.tensor([[2, -4]], dtype=torch.int8), torch.tensor([0.5]))
    tensor([[ 1., -2.]])
    """
    weight = codes.float() * scale.float()[:, None]
    if outlier_columns is not None and outlier_weight is not None:
        weight[:, outlier_columns] = outlier_weight.float()
    return weight


def piece_rows(columns: int) -> int:
    """How many rows of a weight with ``columns`` columns are handled in floating point at a time: about 1 MB."""
    return max(1, _PIECE_BYTES // (4 * max(columns, 1)))


# --- the op ----------------------------------------------------------------------------------------------------------


def _forward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    threshold: float,
    criterion: str,
    outliers: str | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
) -> Tensor:
    _check_columns(outlier_columns, x.shape[-1])
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1]).float()
    mask = _mask(rows, threshold, criterion, outliers, outlier_columns)
    codes, row_scale = quantize_rowwise(rows if mask is None else rows.masked_fill(mask, 0.0))
    out = _scaled_product(codes, weight, row_scale, scale)
    if mask is not None:
        _add_outliers(out, rows, mask, weight, scale, outlier_columns, outlier_weight)
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


_int8_linear = torch.library.custom_op("gossamer::int8_linear", _forward, mutates_args=())


@_int8_linear.register_fake
def _(x, weight, scale, bias, threshold, criterion, outliers, outlier_columns, outlier_weight):  # type: ignore[no-untyped-def]
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, weight, scale, bias, _, _, _, outlier_columns, outlier_weight = inputs
    ctx.save_for_backward(weight, scale, outlier_columns, outlier_weight)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):  # type: ignore[no-untyped-def]
    """dx = dy W, accumulated over pieces of W's rows; db = sum of dy."""
    weight, scale, columns, exact = ctx.saved_tensors
    rows = grad.reshape(grad.shape[:-1].numel(), grad.shape[-1]).float()
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = rows.new_zeros(rows.shape[0], weight.shape[1])
        step = piece_rows(weight.shape[1])
        for start in range(0, weight.shape[0], step):
            part = slice(start, start + step)
            piece = dequantize_rows(weight[part], scale[part], columns, None if exact is None else exact[part])
            grad_x += rows[:, part] @ piece
        grad_x = grad_x.to(ctx.x_dtype).reshape(*grad.shape[:-1], weight.shape[1])
    if ctx.bias_dtype is not None and ctx.needs_input_grad[3]:
        grad_bias = rows.sum(0).to(ctx.bias_dtype)
    return grad_x, None, None, grad_bias, None, None, None, None, None


_int8_linear.register_autograd(_backward, setup_context=_setup_context)


def _mask(
    rows: Tensor, threshold: float, criterion: str, outliers: str | None, columns: Tensor | None
) -> Tensor | None:
    """The entries of rows (M, K) that leave the int8 product, or ``None`` if there are none."""
    if outliers is None:
        return None
    if outliers == "static":
        assert columns is not None
        mask = torch.zeros(rows.shape[1], dtype=torch.bool, device=rows.device).index_fill_(0, columns, True)
        return mask.expand_as(rows) if len(columns) else None
    mask = outlier_mask(rows, threshold, criterion, outliers)  # type: ignore[arg-type]
    return mask if bool(mask.any()) else None


def _scaled_product(codes: Tensor, weight: Tensor, row_scale: Tensor, scale: Tensor) -> Tensor:
    """(M, N) fp32. An inner dimension that int32 cannot sum is split, and the parts are added in fp64."""
    if codes.shape[1] <= INT32_SAFE_K:
        return dequantize(int8_matmul(codes, weight), row_scale, scale)
    total = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.float64, device=codes.device)
    for a, b in zip(codes.split(INT32_SAFE_K, 1), weight.split(INT32_SAFE_K, 1), strict=True):
        total += int8_matmul(a, b)
    return dequantize(total, row_scale, scale)


def _add_outliers(
    out: Tensor,
    rows: Tensor,
    mask: Tensor,
    weight: Tensor,
    scale: Tensor,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
) -> None:
    """out += (rows * mask) @ W.T, over the columns that have an outlier, with 16-bit weights where they are kept."""
    used = mask.any(0)
    columns = used.nonzero().squeeze(1)
    values = torch.where(mask[:, columns], rows[:, columns], 0.0)
    kept = places = None
    if outlier_columns is not None:
        kept = used[outlier_columns].nonzero().squeeze(1)  # which of the store's columns are among them, and where
        places = torch.searchsorted(columns, outlier_columns[kept])
    step = piece_rows(len(columns))
    for start in range(0, weight.shape[0], step):
        stop = start + step
        piece = dequantize_rows(weight[start:stop, columns], scale[start:stop])
        if outlier_weight is not None:
            piece[:, places] = outlier_weight[start:stop, kept].float()
        out[:, start:stop].addmm_(values, piece.t())


def _with_plain_strides(a: Tensor) -> Tensor:
    """A copy if a is a view that torch._int_mm gets wrong: dimensions of size 1 or stride 0 (pytorch issue 195066)."""
    plain = a.stride(1) == 1 and a.stride(0) == a.shape[1]
    return a if plain else a.clone(memory_format=torch.contiguous_format)


def _int_mm_is_fast(device: torch.device) -> bool:
    """Whether torch._int_mm uses int8 instructions here; without VNNI it is a slow loop."""
    return device.type == "cpu" and torch.cpu._is_vnni_supported()


def _matmul_in_fp32(a: Tensor, b: Tensor) -> Tensor:
    """Exact for any device: fp32 holds the sum of 1024 products of codes, and int32 adds these.

    b, a weight, is converted piece by piece: a model that is watched while it loads must not need its weights in fp32.
    """
    out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.int32, device=a.device)
    step = piece_rows(min(a.shape[1], _FLOAT_SAFE_K))
    with torch.autocast(a.device.type, enabled=False):  # it would round the sums to 16 bit
        for codes, right in zip(a.split(_FLOAT_SAFE_K, 1), b.split(_FLOAT_SAFE_K, 1), strict=True):
            left = codes.float()
            for start in range(0, len(b), step):
                out[:, start : start + step] += (left @ right[start : start + step].float().t()).int()
    return out


def _mean(size: Tensor) -> Tensor:
    """The mean of every row (M, 1), the same for any number of rows and any strides: fp32 sums would differ."""
    return size.mean(-1, keepdim=True, dtype=torch.float64).float()


# --- checks ----------------------------------------------------------------------------------------------------------


def _check_float(name: str, x: Tensor) -> None:
    if x.dtype not in FLOAT_TYPES:
        raise ConfigurationError(
            f"{name} must be float32, bfloat16 or float16, got {str(x.dtype).removeprefix('torch.')}"
        )


def _check_operands(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outlier_columns: Tensor | None,
    outlier_weight: Tensor | None,
) -> None:
    _check_float("x", x)
    if weight.dtype != torch.int8 or weight.dim() != 2:
        raise ConfigurationError(f"weight must be int8 (N, K), got {weight.dtype} {tuple(weight.shape)}")
    outputs, inputs = weight.shape
    if x.dim() == 0 or x.shape[-1] != inputs:
        raise ConfigurationError(
            f"x must be (..., {inputs}) for a weight of {tuple(weight.shape)}, got {tuple(x.shape)}"
        )
    if scale.shape != (outputs,) or not scale.is_floating_point():
        raise ConfigurationError(f"scale must be floating point ({outputs},), got {scale.dtype} {tuple(scale.shape)}")
    if bias is not None and (bias.shape != (outputs,) or not bias.is_floating_point()):
        raise ConfigurationError(f"bias must be floating point ({outputs},), got {bias.dtype} {tuple(bias.shape)}")
    if (outlier_columns is None) != (outlier_weight is None):
        raise ConfigurationError("outlier_columns and outlier_weight go together; one of them is missing")
    if outlier_columns is None or outlier_weight is None:
        return
    if outlier_columns.dtype != torch.int64 or outlier_columns.dim() != 1:
        raise ConfigurationError(
            f"outlier_columns must be int64 (S,), got {outlier_columns.dtype} {tuple(outlier_columns.shape)}"
        )
    if outlier_weight.shape != (outputs, len(outlier_columns)) or not outlier_weight.is_floating_point():
        raise ConfigurationError(
            f"outlier_weight must be floating point {(outputs, len(outlier_columns))}, got {outlier_weight.dtype} "
            f"{tuple(outlier_weight.shape)}"
        )


def _check_columns(outlier_columns: Tensor | None, inputs: int) -> None:
    """Reads the numbers themselves, so it stands inside of the op, where torch.compile does not look."""
    if outlier_columns is not None and len(outlier_columns):
        low, high = torch.stack(outlier_columns.aminmax()).tolist()
        if low < 0 or high >= inputs:
            raise ConfigurationError(f"outlier_columns must lie in 0 to {inputs - 1}, got {low if low < 0 else high}")
