"""Attention as an algebra of states: attend to segments separately, merge exactly.

Hydragen (Juravsky et al. 2024, arXiv 2402.05099, section 3) rests on two facts:

* **Decomposition** (eq. 5). Attention over concatenated keys is a weighted mean of the attentions over the parts, with
  weights ``exp(lse)``. So a part's result is the pair ``(out, lse)``: an :class:`AttentionState`.
* **Inter-sequence batching**. Sequences that share a prefix share its keys, so all their queries form one matrix, and
  the prefix is read once, by one pair of GEMMs, instead of once per sequence (:func:`attend_prefix`).

Shapes: query (B, Hq, Lq, D), key (B, Hkv, Lk, D), value (B, Hkv, Lk, Dv), Hq a multiple of Hkv (grouped-query
attention; query head h reads key/value head ``h // (Hq // Hkv)``). States are fp32
(fp64 for fp64 inputs); ``lse`` is natural log.

>>> import torch
>>> q, k, v = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 10, 8), torch.randn(2, 2, 10, 8)
>>> whole = attend(q, k, v)
>>> parts = merge_states([attend(q, k[:, :, :7], v[:, :, :7]), attend(q, k[:, :, 7:], v[:, :, 7:])])
>>> torch.allclose(whole.out, parts.out, atol=1e-6), torch.allclose(whole.lse, parts.lse, atol=1e-6)
(True, True)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.ops.attention_reference import attend_backward, attend_reference, visible_keys

SCORE_BYTES = 64 << 20  # the matmul path walks keys in blocks so that its score matrix stays below this


class AttentionState(NamedTuple):
    """Attention over some keys: ``out`` (B, Hq, Lq, Dv), normalized, and ``lse`` (B, Hq, Lq), log of the normalizer.

    A row that saw no key is ``(0, -inf)``, the neutral element of :func:`merge_states`.
    """

    out: Tensor
    lse: Tensor


def empty_state(query: Tensor, value_dim: int) -> AttentionState:
    """The state of ``query`` (B, Hq, Lq, D) over no keys at all."""
    wide = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:-1], value_dim, dtype=wide)
    return AttentionState(out, query.new_full(query.shape[:-1], -math.inf, dtype=wide))


def sink_state(sinks: Tensor, query: Tensor, value_dim: int) -> AttentionState:
    """Attention sinks (Hq,): one learned score per head that takes weight and adds no value (as in gpt-oss)."""
    state = empty_state(query, value_dim)
    return AttentionState(state.out, sinks.to(state.lse.dtype)[None, :, None].expand_as(state.lse))


def merge_states(states: Sequence[AttentionState]) -> AttentionState:
    """Combine attention over disjoint sets of keys into attention over their union (arXiv 2402.05099, eq. 5).

    With ``m = max_i lse_i`` and ``w_i = exp(lse_i - m)``: ``out = sum w_i out_i / sum w_i``, ``lse = m + log sum w_i``.
    Exact, associative and commutative up to rounding; runs in the states' dtype, in the order given. Differentiable.

    Args:
        states: at least one; all of the same shapes.

    Raises:
        ConfigurationError: there are no states, or their shapes differ.
    """
    if not states:
        raise ConfigurationError("merge_states needs at least one state")
    if any(s.out.shape != states[0].out.shape or s.lse.shape != states[0].lse.shape for s in states):
        raise ConfigurationError(f"states to merge differ in shape: {[tuple(s.out.shape) for s in states]}")
    if len(states) == 1:
        return states[0]
    lse = torch.stack([s.lse for s in states])
    # Rows that saw nothing in any state have a maximum of -inf; subtracting it would make NaN.
    top = lse.amax(0).detach().clamp_min(torch.finfo(lse.dtype).min)
    weights = torch.exp(lse - top)
    total = weights.sum(0)
    nonempty = total > 0
    total = torch.where(nonempty, total, 1.0)
    out = sum(w[..., None] * s.out for w, s in zip(weights, states, strict=True)) / total[..., None]
    return AttentionState(out, torch.where(nonempty, top + total.log(), -math.inf))


def attend(
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
    """Attention of ``query`` over one segment of keys.

    Args:
        query: (B, Hq, Lq, D), fp32, bf16, fp16 or fp64.
        key: (B, Hkv, Lk, D); Lk may be 0.
        value: (B, Hkv, Lk, Dv).
        scale: multiplies the scores; ``D ** -0.5`` by default.
        causal: query i sees keys at positions <= its own.
        window: query i sees only the last ``window`` positions, its own included (Mistral, Gemma).
        softcap: scores become ``softcap * tanh(score / softcap)`` (Gemma 2).
        query_start: position of the first query, relative to the first key. By default the queries are the last rows:
            ``Lk - Lq``. (PyTorch's ``is_causal`` aligns first with first.) It may be negative or beyond Lk.
        key_lengths: (B,) integers; keys at or beyond it are ignored (ragged batches).

    Returns:
        AttentionState: out (B, Hq, Lq, Dv) and lse (B, Hq, Lq); rows that see nothing are (0, -inf).

    Raises:
        ConfigurationError: shapes do not fit together, or ``window`` or ``softcap`` is not positive.
    """
    _check(query, key, value, window, softcap)
    if key_lengths is not None and key_lengths.shape != query.shape[:1]:
        raise ConfigurationError(
            f"key_lengths needs one length per sequence, {tuple(query.shape[:1])}, got {tuple(key_lengths.shape)}"
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key.shape[2] == 0 or query.shape[2] == 0 or query.shape[0] == 0:
        return empty_state(query, value.shape[-1])
    fresh = causal and key_lengths is None and query.shape[2] == key.shape[2] and query_start in (None, 0)
    if fresh and (window is None or window >= key.shape[2]):
        return AttentionState(*_run(query, key, value, None, True, scale, softcap))
    seen = visible_keys(
        query.shape[2],
        key.shape[2],
        causal=causal,
        window=window,
        query_start=query_start,
        key_lengths=key_lengths,
        device=query.device,
    )
    return AttentionState(*_run(query, key, value, seen, False, scale, softcap))


def attend_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    seen: Tensor | None = None,
) -> AttentionState:
    """Attention of many sequences over one shared prefix, read once (arXiv 2402.05099, section 3.2).

    The rows of all sequences, and of the query heads that share a key/value head, are folded into one matrix per
    key/value head. No causal mask is needed: every query comes after the prefix.

    Args:
        query: (B, Hq, Lq, D): B sequences with Lq new tokens each.
        key: (Hkv, P, D), without a batch dimension.
        value: (Hkv, P, Dv).
        scale, softcap: as in :func:`attend`.
        seen: bool (B, Lq, P): restricts what each row sees (sliding windows); ``None`` sees all.

    Returns:
        AttentionState: out (B, Hq, Lq, Dv) and lse (B, Hq, Lq).

    >>> import torch
    >>> q, k, v = torch.randn(5, 4, 1, 8), torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    >>> shared = attend_prefix(q, k, v)
    >>> copied = attend(q, k.expand(5, -1, -1, -1), v.expand(5, -1, -1, -1))
    >>> torch.allclose(shared.out, copied.out, atol=1e-6)
    True
    """
    if query.dim() != 4 or key.dim() != 3 or value.dim() != 3:
        raise ConfigurationError(
            f"a shared prefix needs query (B, Hq, Lq, D), key (Hkv, P, D) and value (Hkv, P, Dv), got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}"
        )
    batch, heads, length, dim = query.shape
    rows = query.transpose(0, 1).reshape(1, heads, batch * length, dim)
    key, value = key[None], value[None]
    _check(rows, key, value, None, softcap)
    scale = dim**-0.5 if scale is None else scale
    if key.shape[2] == 0 or rows.shape[2] == 0:
        return empty_state(query, value.shape[-1])
    mask = None if seen is None else seen.reshape(1, 1, batch * length, -1)
    out, lse = _run(rows, key, value, mask, False, scale, softcap)
    return AttentionState(
        out.view(heads, batch, length, -1).transpose(0, 1), lse.view(heads, batch, length).transpose(0, 1)
    )


def attend_ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
) -> AttentionState:
    """One new token per sequence over private keys of unequal lengths, all sequences in one call.

    Args:
        query: (B, Hq, 1, D).
        key: (B, Hkv, S, D), padded to the longest; what stands in the padding is arbitrary but finite.
        value: (B, Hkv, S, Dv).
        bias: (B, S), 0 where the sequence sees the key and -inf where not.
        scale, softcap: as in :func:`attend`.

    Returns:
        AttentionState: out (B, Hq, 1, Dv) and lse (B, Hq, 1).
    """
    _check(query, key, value, None, softcap)
    batch, heads, length, dim = query.shape
    if length != 1 or bias.shape != (batch, key.shape[2]):
        raise ConfigurationError(
            f"attend_ragged needs one query per sequence and a bias per key, got query {tuple(query.shape)}, "
            f"key {tuple(key.shape)}, bias {tuple(bias.shape)}"
        )
    kv_heads = key.shape[1]
    # Scores rounded to half precision would put errors of some percent into the weights of the merge.
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key, value = query.to(wide), key.to(wide), value.to(wide)
    rows = query.reshape(batch, kv_heads, heads // kv_heads, dim) * (dim**-0.5 if scale is None else scale)
    s = torch.matmul(rows, key.transpose(-1, -2))
    if softcap is not None:
        s = softcap * torch.tanh(s / softcap)
    s += bias[:, None, None]
    lse = s.logsumexp(-1, keepdim=True)
    weights = (s - lse.clamp_min(torch.finfo(wide).min)).exp_()  # a sequence that sees nothing gets weights of 0
    out = torch.matmul(weights, value)
    return AttentionState(out.view(batch, heads, 1, value.shape[-1]), lse.view(batch, heads, 1))


def _check(query: Tensor, key: Tensor, value: Tensor, window: int | None, softcap: float | None) -> None:
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise ConfigurationError(f"attention needs (B, H, L, D) tensors, got {shapes}")
    if key.shape[:3] != value.shape[:3] or key.shape[0] != query.shape[0] or key.shape[3] != query.shape[3]:
        raise ConfigurationError(f"batch, heads, length or head dimension do not fit together: {shapes}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ConfigurationError(f"query heads must be a multiple of key/value heads: {shapes}")
    if window is not None and window < 1:
        raise ConfigurationError(f"window must be at least 1, got {window}")
    if softcap is not None and softcap <= 0:
        raise ConfigurationError(f"softcap must be positive, got {softcap}")


def _run(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """The fast path directly, or through the registered op where autograd or a compiler has to see it."""
    grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    if grad or torch.compiler.is_compiling():
        out, lse = torch.ops.gossamer.attend(query, key, value, seen, causal, scale, softcap)
        return out, lse
    return _attend_fast(query, key, value, seen, causal, scale, softcap)


def _causal(query: Tensor, key: Tensor) -> Tensor:
    """What the first query sees is the first key, and so on: bool (1, 1, Lq, Lk)."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]


def _attend_fast(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = query.dtype
    flash = softcap is None and query.shape[-1] == value.shape[-1] and query.device.type == "cpu" and flash_works()
    if not flash:
        if causal:
            seen = _causal(query, key)
        return _attend_matmul(query, key, value, seen, scale, softcap)
    # The kernel reads along the head dimension without regard to its stride.
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    # The CPU kernel runs bf16 and fp16 slower than fp32 unless the CPU has matrix tiles (AMX), and a decode step's
    # keys convert in a fraction of the time saved; the state comes out in fp32 either way.
    if dtype in (torch.bfloat16, torch.float16):
        query, key, value = query.float(), key.float(), value.float()
    group = query.shape[1] // key.shape[1]
    if causal:  # rows must stay in order, so the group is not folded
        out, lse = _flash(query, key, value, None, True, scale)
        return out, lse
    batch, heads, length, dim = query.shape
    folded = query.reshape(batch, heads // group, group * length, dim)
    mask = None
    if seen is not None:
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, -math.inf)
        if group > 1 and length > 1:
            mask = mask.expand(-1, -1, length, -1).repeat(1, 1, group, 1)
    out, lse = _flash(folded, key, value, mask, False, scale)
    out, lse = out.reshape(batch, heads, length, dim), lse.reshape(batch, heads, length)
    if seen is not None:  # the kernel answers lse = 0 for a row that sees nothing
        lse = lse.masked_fill(~seen.any(-1), -math.inf)
    return out, lse


def _flash(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, causal, attn_mask=mask, scale=scale
    )
    return out, lse


def _attend_matmul(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """The reference in blocks of keys, so that memory stays bounded; any device, soft cap and value dimension."""
    batch, heads, length, _ = query.shape
    block = max(1, SCORE_BYTES // (batch * heads * length * 4))
    states = [
        AttentionState(
            *attend_reference(
                query,
                key[:, :, start : start + block],
                value[:, :, start : start + block],
                None if seen is None else seen[..., start : start + block],
                scale,
                softcap,
            )
        )
        for start in range(0, key.shape[2], block)
    ]
    return merge_states(states)


@functools.cache
def flash_works() -> bool:
    """Whether PyTorch's CPU flash kernel, a private op, is there and answers as expected (grouped heads included)."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, heads, 5, 16, generator=generator) for heads in (4, 2, 2))
    try:
        out, lse = _flash(query, key, value, None, True, 0.25)
    except (AttributeError, RuntimeError, TypeError):
        return False
    seen = torch.ones(5, 5, dtype=torch.bool).tril()[None, None]
    expected_out, expected_lse = attend_reference(query, key, value, seen, 0.25, None)
    return torch.allclose(out, expected_out, atol=1e-5) and torch.allclose(lse, expected_lse, atol=1e-5)


@torch.library.custom_op("gossamer::attend", mutates_args=())
def _attend_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    out, lse = _attend_fast(query, key, value, seen, causal, scale, softcap)
    return out.contiguous(), lse.contiguous()


@_attend_op.register_fake
def _(query, key, value, seen, causal, scale, softcap):  # type: ignore[no-untyped-def]
    wide = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(*query.shape[:-1], value.shape[-1], dtype=wide),
        query.new_empty(query.shape[:-1], dtype=wide),
    )


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    query, key, value, seen, causal, scale, softcap = inputs
    ctx.save_for_backward(query, key, value, seen, *output)
    ctx.causal, ctx.scale, ctx.softcap = causal, scale, softcap


def _backward(ctx, grad_out, grad_lse):  # type: ignore[no-untyped-def]
    query, key, value, seen, out, lse = ctx.saved_tensors
    if ctx.causal:
        seen = _causal(query, key)
    grads = attend_backward(query, key, value, seen, out, lse, grad_out, grad_lse, ctx.scale, ctx.softcap)
    return (*grads, None, None, None, None)


_attend_op.register_autograd(_backward, setup_context=_setup_context)
