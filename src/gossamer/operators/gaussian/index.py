"""What is known of a kernel matrix before any x comes: groups of near points, and how much is where."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.operators.gaussian.partition import PARTITIONS, Partition
from gossamer.ops.gaussian import Keys, Queries, sums

_WIDER = 0.5  # how much the square of the kernel is widened when the mean of a group stands for its points
_GROUP = 32  # points of a group at least


@dataclass(frozen=True)
class KernelIndex:
    """Queries in tiles, keys in blocks, and estimates of K^2 between them.

    ``promise`` tells which pairs of a tile and a block are worth it, from the means of the groups; ``measured`` tells how
    much that leaves, from a row of each tile. They share no noise: what was chosen by one estimate looks better in
    it than it is.

    Args:
        queries: in the order of the tiles.
        order: (n_q) int64: which query stands at each place.
        keys: in blocks.
        tile_sizes, block_sizes: int64.
        promise: (tiles, blocks) fp32, about the mean of K^2 over a pair, up to a factor.
        measured: (tiles, blocks) fp32, unbiased: sum of K^2 over the block, for a row of the tile.
        total: estimate of the sum of all entries of K.
        entries: of K that were evaluated.
    """

    queries: Queries
    order: Tensor
    keys: Keys
    tile_sizes: Tensor
    block_sizes: Tensor
    promise: Tensor
    measured: Tensor
    total: float
    entries: int

    @classmethod
    def build(
        cls, backend: str, queries: Queries, points: Tensor, same: bool, generator: torch.Generator
    ) -> KernelIndex:
        """Of keys ``points`` (n_k, d), which are the queries too if ``same``."""
        divide = PARTITIONS[backend]
        of_keys = divide(points, _group_size(len(points)), generator)
        of_queries = of_keys if same else divide(queries.points, _group_size(len(queries.points)), generator)
        keys = Keys.pack(points, of_keys.sizes, of_keys.order)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), of_queries.sizes.cumsum(0)])
        sorted_queries = queries.take(of_queries.order, starts)

        near_tiles = _seen_from(of_queries.means(queries.points), points, of_keys)
        near_blocks = near_tiles if same else _seen_from(of_keys.means(points), queries.points, of_queries)
        tiles = len(of_queries.sizes)
        within = torch.rand(tiles, generator=generator, dtype=torch.float64)
        rows = starts[:-1] + (within * of_queries.sizes).long()
        added, squares = sums(sorted_queries.take(rows), keys)
        means = tiles * len(points) + (0 if same else len(of_keys.sizes) * len(queries.points))
        return cls(
            sorted_queries,
            of_queries.order,
            keys,
            of_queries.sizes,
            of_keys.sizes,
            near_tiles + near_blocks.T,
            squares.float(),
            float(added.sum(1) @ of_queries.sizes.double()),
            tiles * len(points) + means,
        )

    @property
    def block_of(self) -> Tensor:
        """(padded) int64: the block of each place of the keys."""
        panels = self.keys.starts[1:] - self.keys.starts[:-1]
        return torch.arange(len(panels)).repeat_interleave(panels * (self.keys.padded // len(self.keys.panels)))

    @property
    def tile_of(self) -> Tensor:
        """(n_q) int64: the tile of each place of the queries."""
        return torch.arange(len(self.tile_sizes)).repeat_interleave(self.tile_sizes)

    def per_block(self, values: Tensor) -> Tensor:
        """Sums over blocks (blocks) of values (padded)."""
        return torch.zeros(len(self.block_sizes), dtype=values.dtype).index_add_(0, self.block_of, values)


def _group_size(n: int) -> int:
    """So that a row of each group costs n^1.5 in all, once there are enough points."""
    return max(_GROUP, round(math.sqrt(n) / 6))


def _seen_from(means: Tensor, points: Tensor, partition: Partition) -> Tensor:
    """Mean of the widened K^2 over each group of points, seen from each of the means: (means, groups) fp32."""
    scale = math.sqrt(2 / (1 + _WIDER))
    packed = Keys.pack(points * scale, partition.sizes, partition.order)
    return (sums(Queries.together(means * scale), packed)[0] / partition.sizes).float()
