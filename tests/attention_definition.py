"""Attention defined in fp64, and problems of every shape, for the tests of attention states."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from gossamer.ops.attention import (
    AttentionState,
)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 4e-5, torch.bfloat16: 4e-5, torch.float16: 4e-5}
seeds = st.integers(0, 2**31 - 1)


def definition(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    query_start: int | None = None,
    key_lengths: Tensor | None = None,
) -> AttentionState:
    """Softmax over explicitly masked scores, in fp64, head by head: no code in common with the implementation."""
    (batch, heads, rows, dim), kv_heads, columns = query.shape, key.shape[1], key.shape[2]
    start = columns - rows if query_start is None else query_start
    q, k, v = query.double(), key.double(), value.double()
    out = torch.zeros(batch, heads, rows, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, rows), -math.inf, dtype=torch.float64)
    position, at = start + torch.arange(rows)[:, None], torch.arange(columns)[None]
    for b, h in itertools.product(range(batch), range(heads)):
        hidden = (at >= (columns if key_lengths is None else int(key_lengths[b]))).expand(rows, columns).clone()
        if causal:
            hidden |= at > position
        if window is not None:
            hidden |= at <= position - window
        kv = h // (heads // kv_heads)
        s = (dim**-0.5 if scale is None else scale) * (q[b, h] @ k[b, kv].T)
        s = (s if softcap is None else softcap * torch.tanh(s / softcap)).masked_fill(hidden, -math.inf)
        lively = ~hidden.all(1)
        out[b, h, lively] = torch.softmax(s[lively], -1) @ v[b, kv]
        lse[b, h, lively] = torch.logsumexp(s[lively], -1)
    return AttentionState(out, lse)


def assert_states_equal(actual: AttentionState, expected: AttentionState, tolerance: float = 4e-5) -> None:
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs.double(), rtol=tolerance, atol=tolerance)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "heads inside":  # (B, L, H, D) memory, as models project
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every second":
        return torch.stack([x, torch.full_like(x, 99.0)], -1).flatten(-2)[..., ::2]
    if layout == "inside a buffer":
        buffer = x.new_full((*x.shape[:2], x.shape[2] + 5, x.shape[3]), 99.0)
        buffer[:, :, 2 : 2 + x.shape[2]] = x
        return buffer[:, :, 2 : 2 + x.shape[2]]
    return x


@st.composite
def problems(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCE)
) -> tuple[list[Tensor], dict[str, Any]]:
    """Query, key, value and options of :func:`attend`, ugly shapes included."""
    generator = torch.Generator().manual_seed(draw(seeds))
    dtype = draw(st.sampled_from(dtypes))
    batch, kv_heads, group = draw(st.integers(0, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 4]))
    rows, columns = draw(st.sampled_from([0, 1, 1, 2, 5, 17])), draw(st.sampled_from([0, 1, 2, 7, 17, 40]))
    dim = draw(st.sampled_from([8, 13, 16, 64, 80, 256]))
    value_dim = draw(st.sampled_from([dim, dim, 1, 24]))
    layout = st.sampled_from(["contiguous", "heads inside", "every second", "inside a buffer"])
    shapes = [
        (batch, kv_heads * group, rows, dim),
        (batch, kv_heads, columns, dim),
        (batch, kv_heads, columns, value_dim),
    ]
    tensors = [lay_out((torch.randn(s, generator=generator)).to(dtype), draw(layout)) for s in shapes]
    options: dict[str, Any] = {
        "scale": draw(st.sampled_from([None, 0.05, 0.3])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([None, None, 1, 4, 100])),
        "softcap": draw(st.sampled_from([None, None, 2.0])),
        "query_start": draw(st.none() | st.integers(-rows - 3, columns + 5)),
    }
    if draw(st.booleans()):
        options["key_lengths"] = torch.tensor(
            draw(st.lists(st.integers(0, columns + 2), min_size=batch, max_size=batch)), dtype=torch.long
        )
    return tensors, options
