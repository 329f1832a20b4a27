"""Attention as a kernel product, against attention in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gossamer import KernelAttention, merge_states
from gossamer.errors import ConfigurationError
from gossamer.ops.attention import AttentionState, attend


def head(n_q: int, n_k: int, d: int = 32, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in groups, and queries that look for some of them: peaked, as heads are that look something up."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.8 * torch.randn(max(1, n_k // 40), d, generator=generator)
    keys = centres[torch.randint(len(centres), (n_k,), generator=generator)]
    queries = centres[torch.randint(len(centres), (n_q,), generator=generator)]
    noise = torch.randn(n_q + n_k, d, generator=generator)
    values = torch.randn(n_k, 16, generator=generator) + 2.0
    return queries + 0.3 * noise[:n_q], keys + 0.3 * noise[n_q:], values


def exact(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> AttentionState:
    return attend(*(part.double()[None, None] for part in (q, k, v)), causal=causal)


def errors(found: AttentionState, wanted: AttentionState, v: Tensor) -> float:
    """Root mean square error of out and lse together, in the unit of eps."""
    spread = (v - v.mean(0)).square().sum(1).mean().sqrt().clamp_min(1e-3)
    of_out = (found.out - wanted.out).square().sum(-1)
    return float((of_out + (spread * (found.lse - wanted.lse)).square()).mean().sqrt() / spread)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("n_q, n_k", [(1, 1), (50, 80), (80, 80)])
def test_few_keys_are_exact(n_q: int, n_k: int, causal: bool) -> None:
    q, k, v = head(n_q, n_k)
    product = KernelAttention(q, k, causal).apply(v, 0.1)
    assert product.report.mode == "exact" and product.report.entries == pytest.approx(1)
    assert errors(product.state, exact(q, k, v, causal), v) < 1e-5


@pytest.mark.parametrize("n_q, n_k, causal", [(4200, 4200, False), (4200, 9000, False), (4200, 12_600, True)])
def test_within_the_tolerance(n_q: int, n_k: int, causal: bool) -> None:
    q, k, v = head(n_q, n_k)
    product = KernelAttention(q, k, causal).apply(v, 0.1)
    error = errors(product.state, exact(q, k, v, causal), v)
    assert product.report.mode == "sampled" and error <= 0.1
    assert 0 < product.report.near < product.report.entries <= 1  # of all parts together
    if error > 0.03:
        assert 0.6 < product.report.error / error < 1.6


def test_states_merge() -> None:
    q, k, v = head(4200, 8400)
    first = KernelAttention(q, k[:4200]).apply(v[:4200], 0.05)
    second = KernelAttention(q, k[4200:]).apply(v[4200:], 0.05)
    merged = merge_states([first.state, second.state])
    assert errors(merged, exact(q, k, v), v) < 0.1


def test_a_constant_in_the_values_makes_no_difference() -> None:
    q, k, v = head(4200, 4200)
    attention = KernelAttention(q, k)
    plain, shifted = attention.apply(v, 0.2), attention.apply(v + 1000.0, 0.2)
    assert torch.allclose(plain.state.out + 1000.0, shifted.state.out, atol=2e-2)


def test_bad_input() -> None:
    q, k, v = head(10, 20)
    with pytest.raises(ConfigurationError, match=r"got \(10, 32\) and \(20, 31\)"):
        KernelAttention(q, k[:, 1:])
    with pytest.raises(ConfigurationError, match="20 causal queries"):
        KernelAttention(k, q, causal=True)
    with pytest.raises(ConfigurationError, match="row 3, column 2"):
        spoilt = k.clone()
        spoilt[3, 2] = torch.nan
        KernelAttention(q, spoilt)
    with pytest.raises(ConfigurationError, match=r"values are \(20, d_v\)"):
        KernelAttention(q, k).apply(v[:7], 0.1)
    with pytest.raises(ConfigurationError, match="backend"):
        KernelAttention(q, k, backend="tree")


def test_tensors_are_copied_and_their_gradients_are_not_lost_in_silence() -> None:
    q, k, v = head(50, 80)
    attention = KernelAttention(q, k)
    before = attention.apply(v, 0.1).state.out
    q.mul_(2)
    k.add_(1)
    assert torch.equal(attention.apply(v, 0.1).state.out, before)
    with pytest.raises(ConfigurationError, match="values requires a gradient"):
        attention.apply(v.clone().requires_grad_(), 0.1)
    with pytest.raises(ConfigurationError, match="keys requires a gradient"):
        KernelAttention(q, k.clone().requires_grad_())
