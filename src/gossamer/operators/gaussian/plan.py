"""Decides what is multiplied exactly and how many keys are sampled for the rest.

With ``p_j`` the probability that a tile of queries draws key j, the squared error is expected to be

    V = sum over rows i, keys j that are not near i, of  K_ij^2 x_j^2 (1 / p_j - 1).

For a given cost the best ``p_j`` are proportional to ``|x_j| sqrt(C_j)``, C_j being the squares of column j that are
left to the sample, and the best rates of tiles to the square root of what a row of theirs adds to V. Multiplying a pair
of groups exactly costs its size and saves its share of V, so pairs are taken by the mean of their squares; from which
value on, the cheapest of some plans tells. What the index promises gives the shape of all this, what it has measured
the scale, so that the noise of a few rows does not make a plan look good. It is a guess all the same:
:mod:`gossamer.operators.gaussian.certificate` measures.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.operators.gaussian.index import KernelIndex
from gossamer.ops.gaussian import PANEL, Keys, Queries, Sample

_LEVELS = 96  # of pairs by what they are worth
_RANKED = 1 << 16  # pairs that tell where the levels end
_EVEN = 0.5  # of the probabilities, and of the rates, that does not depend on noisy estimates
_FEWEST = 64  # keys that a tile draws, about


@dataclass(frozen=True)
class Plan:
    """What :func:`gossamer.ops.gaussian.products` is to do.

    Args:
        near: (tiles, blocks) bool.
        share: (padded) fp32; a tile draws a key with probability ``min(1, rate * share)``.
        rate: (tiles) fp64.
        weight: (tiles) fp64, expected squared error of a row of the tile, up to a factor.
        near_entries: of K that are multiplied exactly.
    """

    near: Tensor
    share: Tensor
    rate: Tensor
    weight: Tensor
    near_entries: int


def make_plan(index: KernelIndex, square: Tensor, budget: float) -> Plan:
    """The cheapest plan whose expected squared error is ``budget``.

    Args:
        index: of the matrix.
        square: (padded) fp64, ``|x_j|^2`` over all right-hand sides.
        budget: above 0.
    """
    root = square.sqrt()
    rows, columns = index.tile_sizes.double(), index.block_sizes.double()
    padded = (index.keys.starts[1:] - index.keys.starts[:-1]).double() * PANEL
    amount = index.per_block(root)  # sum of |x_j|

    worth = index.promise * (amount / amount.max() / padded).float()  # of a pair, per entry that it takes
    level, levels = _levels(worth)
    cell = level * len(columns) + torch.arange(len(columns))
    by_level = [torch.zeros(levels, len(columns), dtype=torch.float64) for _ in range(3)]
    each = (index.measured, index.promise * columns.float(), torch.ones_like(index.promise))
    for total, values in zip(by_level, each, strict=True):
        weighed = (values * rows.float()[:, None]).double()
        total.view(-1).index_add_(0, cell.view(-1), weighed.view(-1))
    measured, promised, taken = by_level

    # What is left to the sample if the levels from l on are far, for all l together.
    left, shape = (_from_each_on(total) for total in (measured, promised))
    unit = left.sum(1) / shape.sum(1).clamp_min(1e-300)
    spread = _spread(unit[:, None] * shape / columns, columns)
    rates = (left / columns * (amount / spread)).sum(1) / budget
    drawn = (rates * (spread @ amount)).clamp(_FEWEST, float(columns.sum())) * rows.sum()
    near_entries = (taken.sum(0) - _from_each_on(taken)) @ padded
    first_far = int((near_entries + drawn).argmin())
    spread = spread[first_far]

    near = level < first_far
    per_share = (amount / spread / columns).float()
    weight = (torch.where(near, 0, index.promise) * columns.float() @ per_share).double() * unit[first_far]
    weight = _EVEN * weight + (1 - _EVEN) * (weight @ rows) / rows.sum()
    left_over = (torch.where(near, 0, index.measured) @ per_share).double()
    rate = weight.sqrt()
    if float(weight.max()) > 0:
        rate = rate * float(rows @ (left_over / rate)) / budget
    rate = rate.clamp_min(_FEWEST / float(amount @ spread))
    share = root * spread[index.block_of]
    column = left[first_far] / columns
    rate = rate * _with_certainty(square * column[index.block_of], share, float(rate @ rows / rows.sum()), budget)
    return Plan(near, share.float(), rate, weight, round(float(near_entries[first_far])))


def _levels(worth: Tensor) -> tuple[Tensor, int]:
    """The level of each pair, 0 is best, and how many there are: finer where they are better."""
    flat = worth.flatten()
    some = flat
    if len(flat) > _RANKED:
        some = flat[torch.randint(len(flat), (_RANKED,), generator=torch.Generator().manual_seed(0))]
    ranks = torch.logspace(0, math.log10(len(some)), _LEVELS, dtype=torch.float64).long().clamp_max(len(some)) - 1
    ends = some.sort(descending=True).values[ranks].unique()  # ascending
    return torch.bucketize(-worth, -ends.flip(0)), len(ends) + 1


def _from_each_on(by_level: Tensor) -> Tensor:
    """Sums over the levels from each one on, and from behind the last one: (levels + 1, blocks)."""
    return torch.cat([by_level.flip(0).cumsum(0).flip(0), torch.zeros_like(by_level[:1])])


def _spread(column: Tensor, sizes: Tensor) -> Tensor:
    """sqrt(C_j) of each block (levels, blocks), half of C even; 1 where nothing is left."""
    even = column @ sizes / sizes.sum()
    mixed = (_EVEN * column + (1 - _EVEN) * even[:, None]).sqrt()
    return torch.where(even[:, None] > 0, mixed, 1.0)


def expected_draws(plan: Plan, rows: Tensor) -> float:
    """Entries of K that the sample takes."""
    ordered = plan.share.double().sort(descending=True).values
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    # keys whose rate * share is above 1 are all drawn
    certain = torch.searchsorted(-ordered, -1 / plan.rate.clamp_min(1e-300))
    draws = certain + plan.rate * (sums[-1] - sums[certain])
    return float(rows.double() @ draws)


def draw(plan: Plan, index: KernelIndex, x: Tensor, square: Tensor, uniform: Tensor) -> Sample:
    """The sample of a plan.

    Args:
        plan: for the index.
        index: of the matrix.
        x: (r, padded).
        square: (padded) fp64, ``|x_j|^2``.
        uniform: (padded) fp64 in [0, 1): the same numbers give a sample that contains that of lower rates.
    """
    share = plan.share.double()
    priority = torch.where(share > 0, uniform / share.clamp_min(1e-300), torch.inf)
    reached = (priority < float(plan.rate.max())).nonzero()[:, 0]
    order = reached[priority[reached].argsort()]
    count = torch.searchsorted(priority[order], plan.rate)
    points = index.keys.panels.transpose(1, 2)[order // PANEL, order % PANEL]
    keys = Keys.pack(points)
    fill = keys.padded - len(order)

    def filled(values: Tensor) -> Tensor:
        return torch.nn.functional.pad(values[..., order], (0, fill))

    return Sample(
        keys, filled(x), filled(share), filled(square), filled(index.block_of).int(), plan.near.byte(), count, plan.rate
    )


def near_ranges(near: Tensor, keys: Keys) -> tuple[Tensor, Tensor]:
    """The blocks near each tile as ranges of panels; neighbours are one range."""
    edges = torch.nn.functional.pad(near.to(torch.int8), (1, 1)).diff(dim=1)
    tile, first = (edges == 1).nonzero(as_tuple=True)
    last = (edges == -1).nonzero(as_tuple=True)[1]
    starts = torch.searchsorted(tile, torch.arange(len(near) + 1))
    return starts, torch.stack([keys.starts[first], keys.starts[last]], 1)


def some_rows(
    plan: Plan, index: KernelIndex, sample: Sample, rows: Tensor
) -> tuple[Queries, tuple[Tensor, Tensor], Sample]:
    """What :func:`gossamer.ops.gaussian.products` takes for some rows (places, ascending) of the queries."""
    tiles, sizes = index.tile_of[rows].unique_consecutive(return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    part = replace(sample, near=sample.near[tiles], count=sample.count[tiles], rate=sample.rate[tiles])
    return index.queries.take(rows, starts), near_ranges(plan.near[tiles], index.keys), part


def _with_certainty(value: Tensor, share: Tensor, rate: float, budget: float) -> float:
    """What the rates can be multiplied with, at most 1, because keys that are drawn with certainty add no error.

    Args:
        value: (padded) ``x_j^2 C_j``.
        share: (padded).
        rate: mean over the rows.
        budget: of the squared error.
    """
    inside = share > 0
    value, share = value[inside], share[inside]
    low, high = 0.0, 1.0
    if len(share) == 0 or float(share.max()) * rate <= 1:
        return 1.0
    for _ in range(12):
        middle = (low + high) / 2 if low else high / 4
        probability = (middle * rate * share).clamp_max(1)
        if float((value * (1 / probability - 1)).sum()) > budget:
            low = middle
        else:
            high = middle
    return high
