"""Divides points into groups of near ones: near pairs of groups are multiplied exactly.

Whatever the division is, the product stays unbiased and its error measured; a bad one only makes it slower.

    ivf      k-means, twice: of all points, and again within each group (an inverted file)
    sortlsh  signs of random projections, sorted by their Gray code and cut into equal pieces, as KDEformer and
             HyperAttention do (arXiv 2302.02451, 2310.05869)
    lsh      random projections cut into intervals of some bandwidths (Datar et al. 2004), sorted and cut
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_PIECE_BYTES = 4 << 20  # of distances, so that they are still in a cache when they are compared
_LLOYD_ROUNDS = 4
_POINTS_PER_CENTRE = 32  # that k-means looks at
_SIGN_BITS = 16
_INTERVALS = 4  # projections of which a hash consists
_INTERVAL_WIDTH = 4.0  # in bandwidths, about


@dataclass(frozen=True)
class Partition:
    """An order of points (n) int64, and how it is cut: sizes (groups) int64, none of them 0."""

    order: Tensor
    sizes: Tensor

    def means(self, points: Tensor) -> Tensor:
        """Of the groups, (groups, d)."""
        group = torch.arange(len(self.sizes)).repeat_interleave(self.sizes)
        total = points.new_zeros(len(self.sizes), points.shape[1]).index_add_(0, group, points[self.order])
        return total / self.sizes[:, None].to(points.dtype)


def ivf(points: Tensor, size: int, generator: torch.Generator) -> Partition:
    groups = []
    for members in _k_means(points, math.isqrt(max(1, len(points) // size)), generator):
        inner = _k_means(points[members], max(1, len(members) // size), generator)
        groups += [members[group] for group in inner]
    rough = Partition(torch.cat(groups), torch.tensor([len(group) for group in groups]))
    # What the first division cut in two finds together among all centres.
    found = [part for group in _members(_nearest(points, rough.means(points))) for part in group.split(4 * size)]
    return Partition(torch.cat(found), torch.tensor([len(group) for group in found]))


def sortlsh(points: Tensor, size: int, generator: torch.Generator) -> Partition:
    directions = torch.randn(points.shape[1], _SIGN_BITS, generator=generator, dtype=points.dtype)
    code = ((points @ directions > 0) * 2 ** torch.arange(_SIGN_BITS)).sum(1)
    for shift in (1, 2, 4, 8):  # where the code stands in Gray's order, in which neighbours differ by one sign
        code ^= code >> shift
    return _cut(code.argsort(stable=True), size)


def lsh(points: Tensor, size: int, generator: torch.Generator) -> Partition:
    directions = torch.randn(points.shape[1], _INTERVALS, generator=generator, dtype=points.dtype)
    shifts = torch.rand(_INTERVALS, generator=generator, dtype=points.dtype)
    cells = (points @ directions / _INTERVAL_WIDTH + shifts).floor()
    order = torch.arange(len(points))
    for each in reversed(range(_INTERVALS)):
        order = order[cells[order, each].argsort(stable=True)]
    return _cut(order, size)


Divide = Callable[[Tensor, int, torch.Generator], Partition]
PARTITIONS: dict[str, Divide] = {"ivf": ivf, "sortlsh": sortlsh, "lsh": lsh}


def _k_means(points: Tensor, count: int, generator: torch.Generator) -> list[Tensor]:
    """Indices of the members of each group that is not empty."""
    seen = points[torch.randperm(len(points), generator=generator)[: _POINTS_PER_CENTRE * count]]
    centres = seen[:count].clone()
    for _ in range(_LLOYD_ROUNDS):
        labels = _nearest(seen, centres)
        members = torch.bincount(labels, minlength=count).to(seen.dtype)
        moved = torch.zeros_like(centres).index_add_(0, labels, seen)
        centres = torch.where(members[:, None] > 0, moved / members.clamp_min(1)[:, None], centres)
    return _members(_nearest(points, centres))


def _members(labels: Tensor) -> list[Tensor]:
    sizes = torch.bincount(labels).tolist()
    return [group for group in labels.argsort(stable=True).split(sizes) if len(group)]


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """Which centre is nearest to each point."""
    half = centres.square().sum(1) / -2
    step = max(1, _PIECE_BYTES // (4 * len(centres)))
    return torch.cat([torch.addmm(half, part, centres.T).argmax(1) for part in points.split(step)])


def _cut(order: Tensor, size: int) -> Partition:
    whole, rest = divmod(len(order), size)
    return Partition(order, torch.tensor([size] * whole + [rest] * (rest > 0)))
