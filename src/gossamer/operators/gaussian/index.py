"""What is known of a kernel matrix before any x comes: groups of near points, and how much is where."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer.operators.gaussian.partition import PARTITIONS, Partition
from gossamer.ops.gaussian import Keys, Queries, products, sums

_WIDER = 0.5  # how much the square of the kernel is widened when the mean of a group stands for its points
_GROUP = 32  # points of a group at least
_SUMMED = 32  # one of so many blocks is summed up for each row of scores, to know what to scale it with


@dataclass(frozen=True)
class KernelIndex:
    """Queries in tiles, keys in blocks, and estimates of K^2 between them.

    ``promise`` tells which pairs of a tile and a block are worth it, from the means of the groups; ``measured`` tells
    how much that leaves, from a row of each tile. They share no noise: what was chosen by an estimate looks better in
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

        if sorted_queries.row is None:
            near_tiles = _distances_seen_from(of_queries.means(queries.points), points, of_keys)
            near_blocks = (
                near_tiles if same else _distances_seen_from(of_keys.means(points), queries.points, of_queries)
            )
            promise = near_tiles + near_blocks.T
        else:
            promise = _scores_between(sorted_queries, of_queries, points, of_keys)
            near_sums = _sums_of_best(sorted_queries, keys, promise).clamp_min(1).log2()
            sorted_queries = replace(sorted_queries, row=sorted_queries.row - near_sums.to(points.dtype))
            of_tile = torch.segment_reduce(near_sums, "mean", lengths=of_queries.sizes)
            promise = (promise * torch.exp2(-2 * of_tile).float()[:, None]).clamp_max(1)  # as all entries are
        tiles = len(of_queries.sizes)
        within = torch.rand(tiles, generator=generator, dtype=torch.float64)
        rows = starts[:-1] + (within * of_queries.sizes).long()
        added, squares = sums(sorted_queries.take(rows), keys)
        if sorted_queries.row is not None:  # in the end they are divided by what they add up to
            squares = squares / added.sum(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny).square()
        means = tiles * len(points) + (0 if same else len(of_keys.sizes) * len(queries.points))
        return cls(
            sorted_queries,
            of_queries.order,
            keys,
            of_queries.sizes,
            of_keys.sizes,
            promise,
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
    return max(_GROUP, round(math.sqrt(n) / 8))


def _distances_seen_from(means: Tensor, points: Tensor, partition: Partition) -> Tensor:
    """Mean of the widened K^2 over each group of points, seen from each of the means: (means, groups) fp32."""
    scale = math.sqrt(2 / (1 + _WIDER))
    packed = Keys.pack(points * scale, partition.sizes, partition.order)
    return (sums(Queries.together(means * scale), packed)[0] / partition.sizes).float()


def _scores_between(queries: Queries, of_queries: Partition, points: Tensor, of_keys: Partition) -> Tensor:
    """The same of exponentials of scores, (tiles, blocks), where the mean of a group stands for it on either side.

    What a row adds becomes a coordinate whose key is 1, so that the means of queries have it too.
    """
    assert queries.row is not None
    asked = torch.cat([queries.points, queries.row[:, None]], 1)
    asking = Partition(torch.arange(len(asked)), of_queries.sizes)
    known = torch.cat([points, points.new_ones(len(points), 1)], 1)
    promise = torch.zeros(len(of_queries.sizes), len(of_keys.sizes))
    for means, others, partition in ((asking.means(asked), known, of_keys), (of_keys.means(known), asked, asking)):
        packed = Keys.pack(others, partition.sizes, partition.order)
        seen = (sums(Queries.together(means, means.new_zeros(len(means))), packed)[1] / partition.sizes).float()
        promise += seen if partition is of_keys else seen.T
    return promise.clamp_max(torch.finfo(torch.float32).max / 2)


def _sums_of_best(queries: Queries, keys: Keys, promise: Tensor) -> Tensor:
    """Sums (n_q) over the most promising blocks of each tile: at most those over all keys, and often most of them."""
    count = min(promise.shape[1], 1 + promise.shape[1] // _SUMMED)
    best = promise.topk(count, dim=1).indices.flatten()
    ranges = torch.arange(len(promise) + 1) * count, torch.stack([keys.starts[best], keys.starts[best + 1]], 1)
    return products(queries, keys, keys.counted[None], ranges)[0][:, 0]
