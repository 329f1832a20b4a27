"""Exact products of points whose coordinates, in bandwidths, are too large for fp32: tile by tile, around own centres.

A coordinate c of a scaled point is kept to ``2^-24 |c|`` in fp32, and the exponent of an entry, ``-|q - k|^2``, is off
by some ``2 |q - k|`` times that: 10 % of an entry at a coordinate of 1e5. What counts are only pairs within a distance
of 12 of each other; everything else is below ``2^-149``. So queries are cut into tiles of near ones, each tile is
multiplied with the keys around it, and both are centred on the tile, in fp64, before they are rounded. A tile that is
itself too wide, as those of many dimensions are, is computed in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops.gaussian import Keys, Queries, products

WIDEST_IN_FP32 = 128.0  # norm of a scaled point; entries are then good to 1e-5
_WIDEST_FOR_NORMS = 1e3  # ``|q|^2 + |k|^2 - 2 q.k`` in fp64 is then off by 1e-9 at most
_REACH = 12.25  # of an entry that is above 2^-150
_TILE = 512
_PIECE_BYTES = 16 << 20  # of entries in fp64 at a time


def tile_products(queries: Tensor, keys: Tensor, x: Tensor) -> Tensor:
    """``K x`` with ``K_ij = 2^(-|q_i - k_j|^2)``, entries below ``2^-149`` left out.

    Args:
        queries: (n_q, d) fp64.
        keys: (n_k, d) fp64.
        x: (n_k, r) fp64, none above 1.

    Returns:
        (n_q, r) fp64.

    >>> points = torch.tensor([[0.0], [1.0], [1e9], [1e9 + 2]], dtype=torch.float64)
    >>> tile_products(points, points, torch.ones(4, 1, dtype=torch.float64))[:, 0]
    tensor([1.5000, 1.5000, 1.0625, 1.0625], dtype=torch.float64)
    """
    y = x.new_zeros(len(queries), x.shape[1])
    tiles = _cut(keys)
    lowest = torch.stack([keys[tile].amin(0) for tile in tiles])
    highest = torch.stack([keys[tile].amax(0) for tile in tiles])
    for rows in _cut(queries):
        asked = queries[rows]
        low, high = asked.amin(0), asked.amax(0)
        near = _apart(low, high, lowest, highest) <= _REACH**2
        if not bool(near.any()):
            continue
        columns = torch.cat([tiles[place] for place in near.nonzero()[:, 0].tolist()])
        known = keys[columns]
        within = _apart(low, high, known, known) <= _REACH**2
        columns, centre = columns[within], (low + high) / 2
        if len(columns):
            y[rows] = _centred(asked - centre, known[within] - centre, x[columns])
    return y


def _centred(queries: Tensor, keys: Tensor, x: Tensor) -> Tensor:
    widest = max(float(queries.norm(dim=1).max()), float(keys.norm(dim=1).max()))
    if widest <= WIDEST_IN_FP32:
        packed = Keys.pack(keys.float())
        return products(Queries.together(queries.float()), packed, packed.spread(x), packed.everything(1))[0]
    step = max(1, _PIECE_BYTES // (8 * len(keys)))
    squares = keys.square().sum(1)
    pieces = []
    for part in queries.split(step):
        if widest <= _WIDEST_FOR_NORMS:
            distance = torch.addmm(squares, part, keys.T, alpha=-2).add_(part.square().sum(1, keepdim=True))
        else:
            distance = torch.cdist(part, keys, compute_mode="donot_use_mm_for_euclid_dist").square_()
        pieces.append(distance.clamp_min_(0).neg_().exp2_() @ x)
    return torch.cat(pieces)


def _cut(points: Tensor) -> list[Tensor]:
    """Indices of tiles, halved along their widest dimension until they are small."""
    tiles, waiting = [], [torch.arange(len(points), device=points.device)]
    while waiting:
        members = waiting.pop()
        if len(members) <= _TILE:
            tiles.append(members)
            continue
        inside = points[members]
        widest = int((inside.amax(0) - inside.amin(0)).argmax())
        order = inside[:, widest].argsort(stable=True)
        half = len(members) // 2
        waiting += [members[order[half:]], members[order[:half]]]
    return tiles


def _apart(low: Tensor, high: Tensor, lowest: Tensor, highest: Tensor) -> Tensor:
    """Squared distance of a box (d), (d) from others (n, d), (n, d)."""
    return torch.maximum(lowest - high, low - highest).clamp_min(0).square().sum(1)
