"""Products with a matrix of exponentials that is never stored.

    K_ij = 2^(-|q_i - k_j|^2)          Gaussian, of points (n, d) times UNIT / sigma
    K_ij = 2^(row_i + q_i . k_j)       attention, with row_i = -log2 of what a row is divided by

:func:`products` multiplies ranges of keys with every tile of queries exactly, and the rest by a sample:

    y_i = sum_{j near} K_ij x_j  +  sum_{j drawn, not near} K_ij x_j / p_j

which is unbiased whatever is near, with the variance ``sum_{j not near} K_ij^2 x_j^2 (1 - p_j) / p_j``, of which the
same draw gives an unbiased estimate. On CPUs in fp32 the native kernel does it, tile by tile; elsewhere PyTorch, which
this file writes out and which is the reference. Sums end in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from gossamer.kernels.library import core, instruction_set

PANEL = 32  # keys are packed by so many
_PIECE_BYTES = 16 << 20  # of the matrix that PyTorch has at a time

UNIT = math.sqrt(math.log2(math.e) / 2)  # points times this, divided by sigma: |q - k|^2 / 2 sigma^2 in powers of 2


@dataclass(frozen=True)
class Queries:
    """Rows of K, in tiles of consecutive ones that are treated alike.

    Args:
        points: (n, d), fp32 or fp64.
        row: (n) of the same dtype, what a row adds to its exponents; ``None`` where K is Gaussian.
        starts: (tiles + 1) int64 on the CPU.
    """

    points: Tensor
    row: Tensor | None
    starts: Tensor

    @classmethod
    def together(cls, points: Tensor, row: Tensor | None = None) -> Queries:
        """All in one tile."""
        return cls(points.contiguous(), row, torch.tensor([0, len(points)]))

    def take(self, index: Tensor, starts: Tensor | None = None) -> Queries:
        """Some of the rows, as one tile or divided as ``starts`` says."""
        row = None if self.row is None else self.row[index]
        return Queries(self.points[index], row, torch.tensor([0, len(index)]) if starts is None else starts)

    def tiles(self) -> Iterator[slice]:
        bounds = self.starts.tolist()
        return (slice(first, last) for first, last in pairwise(bounds))


@dataclass(frozen=True)
class Keys:
    """Columns of K in blocks, each filled up to whole panels with copies that count nothing.

    Args:
        panels: (panels, d, 32).
        counted: (panels * 32) of the same dtype: 1 for a key, 0 for what fills up.
        starts: (blocks + 1) int64 on the CPU, in panels.
        place: (n_k) int64: where key j stands among the panels' columns.
    """

    panels: Tensor
    counted: Tensor
    starts: Tensor
    place: Tensor

    @classmethod
    def pack(cls, points: Tensor, sizes: Tensor | None = None, order: Tensor | None = None) -> Keys:
        """Keys (n, d), taken in ``order`` (n), cut into blocks of ``sizes`` (blocks): one block by default."""
        n, d = points.shape
        sizes = torch.tensor([n]) if sizes is None else sizes
        panels_of = (sizes + PANEL - 1) // PANEL
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), panels_of.cumsum(0)])
        shift = starts[:-1] * PANEL - (sizes.cumsum(0) - sizes)  # from the place in the order to that in the panels
        stands = torch.arange(n) + shift.repeat_interleave(sizes)
        padded = int(starts[-1]) * PANEL
        source = torch.zeros(padded, dtype=torch.int64)
        index = torch.arange(n) if order is None else order.cpu()
        source[stands] = index
        counted = torch.zeros(padded, dtype=points.dtype)
        counted[stands] = 1
        place = torch.empty(n, dtype=torch.int64)
        place[index] = stands
        rows = points[source.to(points.device)]
        packed = rows.reshape(-1, PANEL, d).transpose(1, 2).contiguous()
        return cls(packed, counted.to(points.device), starts, place.to(points.device))

    @property
    def padded(self) -> int:
        return len(self.counted)

    def spread(self, x: Tensor) -> Tensor:
        """Right-hand sides (n_k, r) as :func:`products` takes them, (r, padded): zero for what fills up."""
        out = torch.zeros(x.shape[1], self.padded, dtype=self.panels.dtype, device=self.panels.device)
        out[:, self.place] = x.T.to(out)
        return out

    def rows(self, first: int, last: int) -> Tensor:
        """The points of panels [first, last), (keys, d)."""
        return self.panels[first:last].transpose(1, 2).reshape(-1, self.panels.shape[1])

    def everything(self, tiles: int) -> tuple[Tensor, Tensor]:
        """Ranges for :func:`products` with which every tile is multiplied with every key."""
        return torch.arange(tiles + 1), torch.tensor([0, len(self.panels)]).repeat(tiles, 1)


@dataclass(frozen=True)
class Sample:
    """Keys in the order of their priorities, of which a tile draws those from the first on that its rate reaches.

    Args:
        keys: packed in that order, in one block.
        x: (r, padded).
        share: (padded) fp32 or fp64: a tile draws a key with probability ``min(1, rate * share)``.
        square: (padded): ``|x_j|^2`` over all right-hand sides.
        block: (padded) int32: the key's block among the keys that are near some tile.
        near: (tiles, blocks) uint8: 1 where a tile has a block exactly, so that its sample leaves it out.
        count: (tiles) int64: how many keys a tile draws from.
        rate: (tiles) fp64.
    """

    keys: Keys
    x: Tensor
    share: Tensor
    square: Tensor
    block: Tensor
    near: Tensor
    count: Tensor
    rate: Tensor


def products(
    queries: Queries, keys: Keys, x: Tensor, ranges: tuple[Tensor, Tensor], sample: Sample | None = None
) -> tuple[Tensor, Tensor]:
    """Every tile times its ranges of keys, and what the sample estimates of the others.

    Args:
        queries: n rows.
        keys: of the dtype of the queries.
        x: (r, keys.padded).
        ranges: CSR: (tiles + 1) int64, and (ranges, 2) int64 panels, first and one after the last.
        sample: of keys that are not within the ranges.

    Returns:
        y (n, r) fp64, and the estimated variance (n) fp64 of its rows, summed over the right-hand sides.

    >>> points = torch.tensor([[0.0], [1.0]])
    >>> keys = Keys.pack(points)
    >>> products(Queries.together(points), keys, keys.spread(torch.tensor([[1.0], [2.0]])), keys.everything(1))[0]
    tensor([[2.0000],
            [2.5000]], dtype=torch.float64)
    """
    device = queries.points.device
    y = torch.zeros(len(queries.points), len(x), dtype=torch.float64, device=device)
    variance = torch.zeros(len(y), dtype=torch.float64, device=device)
    if (isa := native(queries.points)) and (library := core()):
        held = _Addresses()
        library.gaussian_products(
            isa,
            held.queries(library, queries),
            held.keys(library, keys),
            held.address(x, torch.float32),
            len(x),
            held.address(ranges[0], torch.int64),
            held.address(ranges[1], torch.int64),
            None if sample is None else held.sample(library, sample),
            y.data_ptr(),
            variance.data_ptr(),
            torch.get_num_threads(),
        )
        return y, variance
    bounds, pairs = ranges[0].tolist(), ranges[1].tolist()
    for tile, rows in enumerate(queries.tiles()):
        for first, last in pairs[bounds[tile] : bounds[tile + 1]]:
            for columns, found in _pieces(queries, rows, keys, first, last):
                y[rows] += (found @ x[:, columns].T).double()
        if sample is not None and int(sample.count[tile]):
            z, w = _weights(sample, tile)
            for columns, found in _pieces(queries, rows, sample.keys, 0, -(-z.shape[1] // PANEL)):
                y[rows] += (found @ z[:, columns].T).double()
                variance[rows] += (found.square() @ w[columns]).double()
    return y, variance


def sums(queries: Queries, keys: Keys) -> tuple[Tensor, Tensor]:
    """Sums of the entries of K over the blocks of keys, and of their squares: two of (n, blocks), fp64.

    >>> points = torch.tensor([[0.0], [1.0]])
    >>> sums(Queries.together(points), Keys.pack(points))
    (tensor([[1.5000],
            [1.5000]], dtype=torch.float64), tensor([[1.2500],
            [1.2500]], dtype=torch.float64))
    """
    blocks = len(keys.starts) - 1
    shape = (len(queries.points), blocks)
    total = torch.zeros(shape, dtype=torch.float64, device=queries.points.device)
    squares = torch.zeros_like(total)
    if (isa := native(queries.points)) and (library := core()):
        held = _Addresses()
        library.gaussian_sums(
            isa,
            held.queries(library, queries),
            held.keys(library, keys),
            held.address(keys.counted, torch.float32),
            blocks,
            held.address(keys.starts, torch.int64),
            total.data_ptr(),
            squares.data_ptr(),
            torch.get_num_threads(),
        )
        return total, squares
    bounds = keys.starts.tolist()
    for block in range(blocks):
        for columns, found in _pieces(queries, slice(0, shape[0]), keys, bounds[block], bounds[block + 1]):
            total[:, block] += (found @ keys.counted[columns]).double()
            squares[:, block] += (found.square() @ keys.counted[columns]).double()
    return total, squares


def entries(queries: Queries, points: Tensor) -> Tensor:
    """K itself, for keys (n, d): (rows, n), in the queries' dtype."""
    if queries.row is None:  # differences, not a product: squares of norms would cancel in fp32
        distance = torch.cdist(queries.points, points, compute_mode="donot_use_mm_for_euclid_dist")
        return torch.exp2(-distance.square())
    return torch.addmm(queries.row[:, None], queries.points, points.T).exp2_()


def _pieces(queries: Queries, rows: slice, keys: Keys, first: int, last: int) -> Iterator[tuple[slice, Tensor]]:
    """Entries of some rows and panels [first, last), some columns at a time."""
    part = queries.take(torch.arange(rows.start, rows.stop))
    step = max(1, _PIECE_BYTES // (8 * PANEL * max(1, len(part.points))))
    for begin in range(first, last, step):
        end = min(begin + step, last)
        yield slice(begin * PANEL, end * PANEL), entries(part, keys.rows(begin, end))


def _weights(sample: Sample, tile: int) -> tuple[Tensor, Tensor]:
    """What a tile multiplies the keys it draws with (r, keys), and their squares (keys); in whole panels."""
    count = int(sample.count[tile])
    drawn = torch.arange(-(-count // PANEL) * PANEL, device=sample.x.device)
    away = sample.near[tile].to(drawn.device)[sample.block[drawn].long()] == 0
    used = (away & (drawn < count)).to(sample.x.dtype)
    probability = (float(sample.rate[tile]) * sample.share[drawn]).clamp_max(1)
    probability = torch.where(used > 0, probability, 1.0)
    z = sample.x[:, drawn] / probability * used
    return z, sample.square[drawn] * (1 - probability) / probability.square() * used


def native(points: Tensor) -> str | None:
    """The instruction set whose kernel multiplies these points, if there is one."""
    fits = points.device.type == "cpu" and points.dtype == torch.float32 and points.numel() > 0
    return instruction_set() if fits else None


class _Addresses:
    """Addresses of tensors, which live as long as this does."""

    def __init__(self) -> None:
        self._kept: list[Tensor] = []

    def address(self, tensor: Tensor, dtype: torch.dtype) -> int:
        ready = tensor.to(dtype).contiguous()
        self._kept.append(ready)
        return ready.data_ptr()

    def queries(self, library: Any, queries: Queries) -> Any:
        row = queries.points.new_zeros(1) if queries.row is None else queries.row
        return library.GaussianQueries(
            *queries.points.shape,
            self.address(queries.points, torch.float32),
            self.address(row, torch.float32),
            queries.row is None,
            len(queries.starts) - 1,
            self.address(queries.starts, torch.int64),
        )

    def keys(self, library: Any, keys: Keys) -> Any:
        return library.GaussianKeys(self.address(keys.panels, torch.float32), keys.padded)

    def sample(self, library: Any, sample: Sample) -> Any:
        return library.GaussianSample(
            self.keys(library, sample.keys),
            self.address(sample.x, torch.float32),
            self.address(sample.share, torch.float32),
            self.address(sample.square, torch.float32),
            self.address(sample.block, torch.int32),
            sample.near.shape[1],
            self.address(sample.near, torch.uint8),
            self.address(sample.count, torch.int64),
            self.address(sample.rate, torch.float64),
        )
