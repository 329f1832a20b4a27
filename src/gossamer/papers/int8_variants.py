"""The int8 schemes that LLM.int8() is measured against (Dettmers et al. 2022, arXiv 2208.07339, sections 2.1 to 3.2).

These are references, to be checked against the paper by eye and to measure with: they print its Table 1 on a real model
(``scripts/table1.py``). What Gossamer runs is :func:`gossamer.ops.int8.int8_linear`.

All schemes write a matrix as integers times scales. They differ in how many scales there are, and in where zero lies:

    absmax      x ~= codes / s          s  = 127 / max|x|           codes = round(s x)
    zeropoint   x ~= (codes + zp) / nd  nd = 254 / (max x - min x)  codes = round(nd x) - zp

    scheme                  X has          W has
    absmax, zeropoint       one scale      one scale
    absmax row-wise         one per row    one scale
    absmax vector-wise      one per row    one per output: a column in the paper, a row of ``nn.Linear.weight``
    zeropoint vector-wise   one per row    one per output

**Row-wise.** The paper gives no formula; it cites FBGEMM. Which matrix has rows follows from section 4.3: row-wise and
vector-wise both "scale each hidden state sequence dimension", and where vector-wise is better, it is for "the enhanced
quantization precision of the model weights". So W has one scale for all. The author says the same in bitsandbytes'
issues 43 and 92.

**Zeropoint.** The paper prints ``zp = round(x min x)`` (eq. 2) and ``codes = round(nd x)`` (eq. 3); such codes leave
int8 when the range is not symmetric. The text around the equations says what is meant: the range is shifted until it
fills [-127, 127]. Hence ``zp = round(nd min x) + 127``, which is taken off the codes. Zero counts as part of the range,
so that it is always exact, and zp fits into int8 as well. The product is all in integers (eqs. 4 and 5):

    sum (a + za)(b + zb) = sum ab + za sum b + zb sum a + K za zb

**Decomposition** (eq. 8). Columns of X in which any ``|x| >= threshold`` (the paper: 6.0) are multiplied in floating
point with the *original* weight. The rest is quantized without them. W is quantized once and as a whole, since a real
program does not know the outliers beforehand.

>>> x, weight = torch.randn(4, 64), torch.randn(8, 64)
>>> error = linear_variant(x, weight, None, "absmax vector-wise") - x @ weight.T
>>> bool(error.abs().max() < 0.02 * (x @ weight.T).abs().max())
True
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional

from gossamer.errors import ConfigurationError
from gossamer.ops.int8 import CODE_MAX, FLOAT_TYPES, int8_matmul, outlier_mask, quantize_rowwise

Scheme = Literal["absmax", "zeropoint", "absmax row-wise", "absmax vector-wise", "zeropoint vector-wise"]


class Quantized(NamedTuple):
    """A matrix of integers: ``x ~= (codes + shift[:, None]) * scale[:, None]``.

    Attributes:
        codes: (M, K) int8 in [-127, 127].
        scale: (M) fp32; all the same if the matrix has one.
        shift: (M) int64 in [-127, 127], the paper's zp; ``None`` for absmax, which has none.
    """

    codes: Tensor
    scale: Tensor
    shift: Tensor | None = None


def quantize_absmax(x: Tensor, per_row: bool) -> Quantized:
    """x (M, K) with one scale, or one per row.

    >>> quantize_absmax(torch.tensor([[1.0, -2.0], [0.0, 0.5]]), per_row=False).codes
    tensor([[  64, -127],
            [   0,   32]], dtype=torch.int8)
    """
    codes, scale = quantize_rowwise(x if per_row else x.reshape(1, -1))
    return Quantized(codes.reshape(x.shape), scale.expand(x.shape[0]))


def quantize_zeropoint(x: Tensor, per_row: bool) -> Quantized:
    """x (M, K) with one scale and shift, or one per row. A range of zero only has scale 0 and codes 0.

    >>> quantize_zeropoint(torch.tensor([[0.0, 1.0, 2.0]]), per_row=True)
    Quantized(codes=tensor([[-127,    0,  127]], dtype=torch.int8), scale=tensor([0.0079]), shift=tensor([127]))
    """
    rows = (x if per_row else x.reshape(1, -1)).float()
    with_zero = functional.pad(rows, (0, 1))
    low, high = with_zero.amin(-1, keepdim=True), with_zero.amax(-1, keepdim=True)
    scale = (high - low) / (2 * CODE_MAX)  # 1 / nd
    # 0 / 0 and inf / inf are NaN, which no integer can hold; the scale alone carries NaN and infinity on
    shift = (low / scale).round().nan_to_num(0.0, 0.0, 0.0) + CODE_MAX * (scale > 0)
    codes = ((rows / scale).round() - shift).nan_to_num(0.0, 0.0, 0.0).clamp(-CODE_MAX, CODE_MAX)
    count = x.shape[0]
    return Quantized(
        codes.to(torch.int8).reshape(x.shape), scale[:, 0].expand(count), shift[:, 0].to(torch.int64).expand(count)
    )


def quantize_weight(weight: Tensor, scheme: Scheme) -> Quantized:
    """The weight (N, K) as a scheme has it, to be used many times.

    Raises:
        ConfigurationError: there is no such scheme, or the weight is no matrix of fp32, bf16 or fp16.
    """
    return _quantize(weight, scheme, per_row=scheme.endswith("vector-wise"), name="weight")


def quantize_input(x: Tensor, scheme: Scheme) -> Quantized:
    """The input (M, K) as a scheme has it.

    Raises:
        ConfigurationError: there is no such scheme, or x is no matrix of fp32, bf16 or fp16.
    """
    return _quantize(x, scheme, per_row=scheme.endswith("-wise"), name="x")


def integer_product(a: Quantized, b: Quantized) -> Tensor:
    """``sum_k (a + za)(b + zb)``, exact: (M, K) and (N, K) -> (M, N) int64 (eqs. 4 and 5).

    Raises:
        ConfigurationError: from :func:`gossamer.ops.int8.int8_matmul`.
    """
    product = int8_matmul(a.codes, b.codes).long()
    if a.shift is not None and b.shift is not None:
        product += a.shift[:, None] * b.codes.sum(1) + a.codes.sum(1)[:, None] * b.shift
        product += a.codes.shape[1] * a.shift[:, None] * b.shift
    return product


def linear_variant(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scheme: Scheme,
    threshold: float | None = None,
    *,
    quantized: Quantized | None = None,
) -> Tensor:
    """``x @ weight.T + bias`` by a scheme of the paper, without or with decomposition; see the module's text.

    Args:
        x: (..., K), fp32, bf16 or fp16. Its leading dimensions together are the rows, and the tensor, that scales and
            outlier columns are taken over.
        weight: (N, K), fp32, bf16 or fp16; what outliers are multiplied with.
        bias: (N), or ``None``.
        scheme: one of :data:`Scheme`.
        threshold: smallest magnitude of an outlier, greater than 0; ``None`` quantizes everything.
        quantized: ``quantize_weight(weight, scheme)``, if you have it.

    Returns:
        (..., N) in the dtype of x; sums of outliers are in fp32.

    Raises:
        ConfigurationError: there is no such scheme, the threshold is not greater than 0, types or shapes do not fit.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        shapes = f"{tuple(x.shape)} and {tuple(weight.shape)}"
        raise ConfigurationError(f"x must be (..., K) and weight (N, K), got {shapes}")
    if threshold is not None and not threshold > 0:
        raise ConfigurationError(f"threshold must be greater than 0, or None for no decomposition; got {threshold!r}")
    quantized = quantized or quantize_weight(weight, scheme)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if threshold is None:
        out = _product(quantize_input(rows, scheme), quantized)
    else:
        outliers = outlier_mask(rows, threshold, "absolute", "batch")
        out = _product(quantize_input(rows.masked_fill(outliers, 0.0), scheme), quantized)
        columns = outliers.any(0).nonzero().squeeze(1)
        out += rows[:, columns].float() @ weight[:, columns].float().t()
    if bias is not None:
        out += bias.float()
    return out.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def _product(a: Quantized, b: Quantized) -> Tensor:
    """The product in numbers again, (M, N) fp32 (eqs. 6 and 7)."""
    return integer_product(a, b).float() * a.scale[:, None] * b.scale


def _quantize(x: Tensor, scheme: Scheme, per_row: bool, name: str) -> Quantized:
    if scheme not in get_args(Scheme):
        raise ConfigurationError(f"scheme must be one of {', '.join(map(repr, get_args(Scheme)))}; got {scheme!r}")
    if x.dtype not in FLOAT_TYPES or x.dim() != 2:
        raise ConfigurationError(f"{name} must be a matrix of fp32, bf16 or fp16, got {x.dtype} {tuple(x.shape)}")
    return quantize_absmax(x, per_row) if scheme.startswith("absmax") else quantize_zeropoint(x, per_row)
