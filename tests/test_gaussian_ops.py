"""Tiles of kernel matrices: every instruction set, and PyTorch's way, against fp64."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.kernels.library import instruction_sets
from gossamer.ops.gaussian import PANEL, UNIT, Keys, Queries, Sample, entries, products, sums


def cut(n: int, most: int, generator: torch.Generator) -> Tensor:
    """Sizes of at least 1 that add up to n."""
    sizes = []
    while n:
        sizes.append(min(n, int(torch.randint(1, most + 1, (1,), generator=generator))))
        n -= sizes[-1]
    return torch.tensor(sizes)


def wide(queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
    row = None if queries.row is None else queries.row.double()
    return (
        Queries(queries.points.double(), row, queries.starts),
        Keys(keys.panels.double(), keys.counted.double(), keys.starts, keys.place),
    )


def make(seed: int, n_q: int, n_k: int, d: int, scores: bool) -> tuple[Queries, Keys, torch.Generator]:
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(n_q, d, generator=generator) / d**0.5, torch.randn(n_k, d, generator=generator) / d**0.5
    tiles = torch.cat([torch.zeros(1, dtype=torch.int64), cut(n_q, 60, generator).cumsum(0)])
    row = torch.randn(n_q, generator=generator) - 2 if scores else None
    keys = Keys.pack(k, cut(n_k, 50, generator), torch.randperm(n_k, generator=generator))
    return Queries(q, row, tiles), keys, generator


shapes = {
    "n_q": st.sampled_from([1, 5, 12, 47, 48, 49, 130]),
    "n_k": st.sampled_from([1, 31, 32, 33, 200, 700]),
    "d": st.sampled_from([1, 3, 16, 64, 65]),
    "scores": st.booleans(),
    "seed": st.integers(0, 10_000),
}


@pytest.mark.parametrize("isa", [*instruction_sets(), "reference"])
@settings(max_examples=25, deadline=None)
@given(columns=st.sampled_from([1, 2, 5, 6, 7, 13]), **shapes)
def test_exact_products(isa: str, columns: int, n_q: int, n_k: int, d: int, scores: bool, seed: int) -> None:
    queries, keys, generator = make(seed, n_q, n_k, d, scores)
    x = torch.randn(n_k, columns, generator=generator)
    tiles = len(queries.starts) - 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        y, variance = products(queries, keys, keys.spread(x), keys.everything(tiles))
    points = keys.rows(0, len(keys.panels))[keys.place].double()
    exact = entries(wide(queries, keys)[0], points)
    assert ((y - exact @ x.double()).abs() <= 3e-6 * (exact @ x.abs().double())).all()
    assert not variance.any()


@pytest.mark.parametrize("isa", [*instruction_sets(), "reference"])
@settings(max_examples=20, deadline=None)
@given(**shapes)
def test_sums_over_blocks(isa: str, n_q: int, n_k: int, d: int, scores: bool, seed: int) -> None:
    queries, keys, _ = make(seed, n_q, n_k, d, scores)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        total, squares = sums(queries, keys)
        patch.setenv("GOSSAMER_ISA", "reference")
        exact, exact_squares = sums(*wide(queries, keys))
    torch.testing.assert_close(total, exact, rtol=3e-6, atol=0)
    torch.testing.assert_close(squares, exact_squares, rtol=6e-6, atol=0)


def a_sample(
    queries: Queries, keys: Keys, x: Tensor, generator: torch.Generator
) -> tuple[Sample, tuple[Tensor, Tensor]]:
    """A random choice of what is near, and of shares and rates."""
    tiles, blocks = len(queries.starts) - 1, len(keys.starts) - 1
    near = torch.rand(tiles, blocks, generator=generator) < 0.3
    ranges = [[int(keys.starts[b]), int(keys.starts[b + 1])] for t in range(tiles) for b in range(blocks) if near[t, b]]
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), near.sum(1).cumsum(0)])
    share = torch.rand(keys.padded, generator=generator) * keys.counted
    rate = torch.rand(tiles, generator=generator, dtype=torch.float64) * 2
    priority = torch.where(share > 0, torch.rand(keys.padded, generator=generator) / share, torch.inf)
    order = priority.argsort()[: int((priority < rate.max()).sum())]
    if len(order) == 0:
        order = torch.tensor([int(keys.place[0])])
    block = torch.arange(blocks).repeat_interleave((keys.starts[1:] - keys.starts[:-1]) * PANEL)
    packed = Keys.pack(keys.rows(0, len(keys.panels))[order])
    fill = (0, packed.padded - len(order))
    right = keys.spread(x)[:, order]
    pad = torch.nn.functional.pad
    sample = Sample(
        packed,
        pad(right, fill),
        pad(share[order], fill),
        pad(right.square().sum(0), fill),
        pad(block[order], fill).int(),
        near.byte(),
        torch.searchsorted(priority[order], rate),
        rate,
    )
    return sample, (starts, torch.tensor(ranges, dtype=torch.int64).reshape(-1, 2))


@pytest.mark.parametrize("isa", [*instruction_sets(), "reference"])
@settings(max_examples=25, deadline=None)
@given(**shapes)
def test_sampled_products(isa: str, n_q: int, n_k: int, d: int, scores: bool, seed: int) -> None:
    queries, keys, generator = make(seed, n_q, n_k, d, scores)
    x = torch.randn(n_k, 3, generator=generator)
    sample, ranges = a_sample(queries, keys, x, generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        y, variance = products(queries, keys, keys.spread(x), ranges, sample)
        patch.setenv("GOSSAMER_ISA", "reference")
        wide_queries, wide_keys = wide(queries, keys)
        _, wide_sample_keys = wide(queries, sample.keys)
        wide_sample = replace(
            sample,
            keys=wide_sample_keys,
            x=sample.x.double(),
            share=sample.share.double(),
            square=sample.square.double(),
        )
        exact, exact_variance = products(wide_queries, wide_keys, wide_keys.spread(x), ranges, wide_sample)
    assert ((y - exact).abs() <= 1e-5 * (exact.abs().max() + 1)).all()
    assert ((variance - exact_variance).abs() <= 1e-4 * (exact_variance.abs().max() + 1e-6)).all()


def test_a_sample_is_unbiased_and_knows_its_variance() -> None:
    queries, keys, _ = make(3, 20, 90, 5, False)
    x = torch.randn(90, 2, generator=torch.Generator().manual_seed(4))
    tiles = len(queries.starts) - 1
    exact, _ = products(queries, keys, keys.spread(x), keys.everything(tiles))
    drawn, expected = [], []
    generator = torch.Generator().manual_seed(5)
    near = torch.zeros(tiles, len(keys.starts) - 1, dtype=torch.uint8)
    for _ in range(3000):
        share = (0.3 + torch.rand(90, generator=torch.Generator().manual_seed(6))).float()
        order = (torch.rand(90, generator=generator, dtype=torch.float64) < share).nonzero()[:, 0]
        packed = Keys.pack(keys.rows(0, len(keys.panels))[keys.place[order]])
        fill = (0, packed.padded - len(order))
        sample = Sample(
            packed,
            torch.nn.functional.pad(x[order].T, fill),
            torch.nn.functional.pad(share[order], fill),
            torch.nn.functional.pad(x[order].square().sum(1), fill),
            torch.zeros(packed.padded, dtype=torch.int32),
            near,
            torch.full((tiles,), len(order)),
            torch.ones(tiles, dtype=torch.float64),
        )
        nothing = torch.zeros(tiles + 1, dtype=torch.int64), torch.zeros(0, 2, dtype=torch.int64)
        y, variance = products(queries, keys, keys.spread(x), nothing, sample)
        drawn.append(y)
        expected.append(variance)
    many = torch.stack(drawn)
    error = many.mean(0) - exact
    assert (error.abs() <= 5 * many.std(0) / math.sqrt(len(many)) + 1e-6).all()
    spread = many.var(0).sum(1)
    assert torch.allclose(torch.stack(expected).mean(0), spread, rtol=0.15)


def test_distances_of_far_points_keep_their_digits() -> None:
    """Points far from the centre: squares of norms would lose what differs."""
    generator = torch.Generator().manual_seed(0)
    far = 300.0 + torch.randn(200, 16, generator=generator)
    queries, keys = Queries.together(far * UNIT), Keys.pack(far * UNIT)
    y, _ = products(queries, keys, keys.spread(torch.ones(200, 1)), keys.everything(1))
    exact = (-torch.cdist(far.double(), far.double()).square() / 2).exp().sum(1, keepdim=True)
    torch.testing.assert_close(y, exact, rtol=2e-4, atol=1e-6)
