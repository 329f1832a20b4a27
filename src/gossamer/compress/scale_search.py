"""Scales for groups of weights: several are tried, and the one of least weighted squared error is kept.

For codes l that are fixed, the best scale is a least-squares fit, ``s = sum(w x l) / sum(w l^2)``, and with an offset
the two by two system of it. The codes are found by rounding with scales around the one that just covers the group; what
a fit gains is compared among them, as in llama.cpp (ggml-quants.c, make_qx_quants and make_qkx3_quants).
"""

from __future__ import annotations

import torch
from torch import Tensor

_TINY = 1e-30
_STEP = 0.1  # between the codes that the extreme entry of a group has for the scales that are tried


def search_scale(
    x: Tensor, weight: Tensor, lowest: int, highest: int, *, positive: bool = False, tries: int = 21
) -> Tensor:
    """Scales s for ``x`` about ``s * code``.

    Args:
        x: (..., group) fp32.
        weight: of each squared error, broadcastable to ``x``, not negative.
        lowest, highest: codes; the extreme one of them is the negative one.
        positive: no scale is negative; otherwise its sign is such that the largest entry has a negative code, of which
            there is one more.
        tries: scales that are tried.

    Returns:
        (...), fp32.

    >>> x = torch.tensor([0.5, -1.0, 1.5])
    >>> search_scale(x, torch.ones(3), -8, 7), search_scale(x, torch.ones(3), -8, 7, positive=True)
    (tensor(-0.1888), tensor(0.2115))
    """
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    if positive:
        largest = -largest.abs()
    inverse_largest = torch.where(largest.abs() < _TINY, 0.0, 1 / largest)
    weighted = weight * x
    best = torch.full(x.shape[:-1], -1.0)
    scale = torch.zeros(x.shape[:-1])
    for step in range(tries):
        extreme = lowest - _STEP * (step - tries // 2)
        codes = (x * (extreme * inverse_largest)).round_().clamp_(lowest, highest)
        product = (weighted * codes).sum(-1)
        square = (weight * codes.square()).sum(-1)
        gain = product.square() / square.clamp_min(_TINY)
        better = gain > best
        best = torch.where(better, gain, best)
        scale = torch.where(better, product / square.clamp_min(_TINY), scale)
    return scale


def search_scale_and_offset(x: Tensor, weight: Tensor, highest: int, tries: int = 21) -> tuple[Tensor, Tensor]:
    """Scales s and offsets o, neither negative, for ``x`` about ``s * code - o`` with codes from 0.

    Args:
        x: (..., group) fp32.
        weight: of each squared error, broadcastable to ``x``, not negative.
        highest: code.
        tries: scales that are tried.

    Returns:
        Both (...), fp32.

    >>> scale, offset = search_scale_and_offset(torch.tensor([-1.0, 0.0, 2.0, 1.0]), torch.ones(4), 15)
    >>> round(float(scale), 3), round(float(offset), 3)
    (0.2, 1.0)
    """
    weight = weight.expand_as(x)
    low = x.amin(-1, keepdim=True).clamp_max(0)
    span = x.amax(-1, keepdim=True) - low
    inverse_span = torch.where(span < _TINY, 0.0, 1 / span)
    sum_w, sum_x = weight.sum(-1), (weight * x).sum(-1)
    best = torch.full(x.shape[:-1], float("inf"))
    scale, offset = torch.zeros(x.shape[:-1]), -low[..., 0]
    for step in range(tries):
        inverse = (highest - 1 + _STEP * step) * inverse_span
        codes = ((x - low) * inverse).round_().clamp_(0, highest)
        weighted = weight * codes
        sum_l, sum_l2, sum_xl = weighted.sum(-1), (weighted * codes).sum(-1), (weighted * x).sum(-1)
        determinant = sum_w * sum_l2 - sum_l.square()
        solvable = determinant > _TINY
        safe = determinant.clamp_min(_TINY)
        s = torch.where(solvable, (sum_w * sum_xl - sum_x * sum_l) / safe, 0.0)
        o = torch.where(solvable, (sum_l * sum_xl - sum_l2 * sum_x) / safe, -low[..., 0])
        negative = o < 0  # the format has no such offsets: fit the scale alone
        s = torch.where(negative, sum_xl / sum_l2.clamp_min(_TINY), s).clamp_min_(0)
        o = o.clamp_min_(0)
        error = (weight * (s[..., None] * codes - o[..., None] - x).square()).sum(-1)
        better = error < best
        best = torch.where(better, error, best)
        scale, offset = torch.where(better, s, scale), torch.where(better, o, offset)
    return scale, offset
