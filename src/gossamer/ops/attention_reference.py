"""Attention over one segment, written to be checked against the definition by eye.

For query row i and key j of the same head,

    s_ij = scale * q_i . k_j            (optionally softcap * tanh(s_ij / softcap))
    lse_i = log sum_j exp(s_ij)         over the keys row i may see
    out_i = sum_j exp(s_ij - lse_i) v_j

A row that sees no key has ``out = 0`` and ``lse = -inf``: the neutral element of the merge.
Everything runs in fp32 at least, fp64 for fp64 inputs, on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def visible_keys(
    num_queries: int,
    num_keys: int,
    *,
    causal: bool,
    window: int | None,
    query_start: int | None,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor | None:
    """Which keys each query sees: bool, (1 or B, 1, Lq, Lk), or ``None`` when all see all.

    Key j stands at position j, query i at ``query_start + i``. By default the queries are the *last* rows of the
    sequence (``query_start = Lk - Lq``); PyTorch's ``is_causal`` instead aligns the first query with the first key.
    """
    keys = torch.arange(num_keys, device=device)
    seen = None
    if causal or window is not None:
        start = num_keys - num_queries if query_start is None else query_start
        position = torch.arange(start, start + num_queries, device=device)[:, None]
        seen = keys <= position if causal else torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
        if window is not None:
            seen = seen & (keys > position - window)
        seen = seen[None, None]
    if key_lengths is not None:
        valid = (keys < key_lengths[:, None])[:, None, None]
        seen = valid.expand(-1, 1, num_queries, -1) if seen is None else seen & valid
    return seen


def scores(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """(B, Hq, Lq, D), (B, Hkv, Lk, D) -> (B, Hq, Lq, Lk). Query head h reads key/value head h // (Hq / Hkv)."""
    group = query.shape[1] // key.shape[1]
    result = query @ key.repeat_interleave(group, dim=1).transpose(-1, -2) * scale
    return result if softcap is None else softcap * torch.tanh(result / softcap)


def attend_reference(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The equations above. Returns ``out`` (B, Hq, Lq, Dv) and ``lse`` (B, Hq, Lq), fp32 (fp64 for fp64 inputs)."""
    wide = torch.promote_types(query.dtype, torch.float32)
    s = scores(query.to(wide), key.to(wide), scale, softcap)
    if seen is not None:
        s = s.masked_fill(~seen, -math.inf)
    lse = s.logsumexp(-1)
    weights = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])
    group = query.shape[1] // key.shape[1]
    return weights @ value.to(wide).repeat_interleave(group, dim=1), lse


def attend_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to query, key and value, from the states alone (Dao et al. 2022, arXiv 2205.14135, B.2).

    With P = exp(S - lse):  dV = P^T dO,  dS = P * (dO V^T - rowsum(dO * O) + dlse),
    dQ = scale dS K,  dK = scale dS^T Q;  a soft cap multiplies dS by 1 - (S / softcap)^2.
    """
    wide = lse.dtype
    q, k, v = query.to(wide), key.to(wide), value.to(wide)
    group = q.shape[1] // k.shape[1]
    s = scores(q, k, scale, softcap)
    p = torch.exp(s - lse.nan_to_num(neginf=0.0)[..., None])
    if seen is not None:
        p = p.masked_fill(~seen, 0.0)
    grad_out = grad_out.to(wide)
    grad_v = p.transpose(-1, -2) @ grad_out
    grad_p = grad_out @ v.repeat_interleave(group, dim=1).transpose(-1, -2)
    grad_s = p * (grad_p - (grad_out * out).sum(-1, keepdim=True) + grad_lse[..., None])
    if softcap is not None:
        grad_s = grad_s * (1 - (s / softcap) ** 2)
    grad_q = grad_s @ k.repeat_interleave(group, dim=1) * scale
    grad_k = grad_s.transpose(-1, -2) @ q * scale

    def sum_groups(grad: Tensor) -> Tensor:
        return grad.unflatten(1, (-1, group)).sum(2)

    return grad_q.to(query.dtype), sum_groups(grad_k).to(key.dtype), sum_groups(grad_v).to(value.dtype)
