"""The points that a weight may be rounded to: what every format of blocks comes down to.

A row is cut into groups of neighbours; an entry of group g has a code q between ``lowest`` and ``highest``, and is

    value = scale[g] * q - offset[g]

in fp32, each operation rounded, as the readers of these formats compute it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Grid:
    """The points of each group of a weight (N, K).

    Attributes:
        scale: (N, K / group) fp32; negative ones are allowed.
        offset: (N, K / group) fp32, or ``None`` where the format has none.
        group: weights that share a scale.
        lowest, highest: codes.
        stored: what the format stores of the scales, by its names; (N, ...) each, groups or blocks along the second
            dimension.

    >>> grid = Grid(torch.tensor([[0.5]]), None, group=4, lowest=-8, highest=7, stored={})
    >>> codes = grid.codes(torch.tensor([[0.4, -9.0, 0.0, 1.6]]))
    >>> codes.tolist(), grid.values(codes).tolist()
    ([[1, -8, 0, 3]], [[0.5, -4.0, 0.0, 1.5]])
    """

    scale: Tensor
    offset: Tensor | None
    group: int
    lowest: int
    highest: int
    stored: dict[str, Tensor]

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes (N, K) int8."""
        scale = self.columns(self.scale)
        shifted = weight if self.offset is None else weight + self.columns(self.offset)
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        return (shifted * inverse).round_().clamp_(self.lowest, self.highest).to(torch.int8)

    def values(self, codes: Tensor) -> Tensor:
        """What codes (N, K) stand for, fp32."""
        values = self.columns(self.scale) * codes
        return values if self.offset is None else values - self.columns(self.offset)

    def columns(self, per_group: Tensor) -> Tensor:
        """(N, K) from one value for each group."""
        return per_group.repeat_interleave(self.group, dim=1)

    def rows(self, rows: slice) -> Grid:
        """That of some rows."""
        offset = None if self.offset is None else self.offset[rows]
        stored = {name: value[rows] for name, value in self.stored.items()}
        return Grid(self.scale[rows], offset, self.group, self.lowest, self.highest, stored)


def join(grids: Sequence[Grid], dim: int) -> Grid:
    """Grids of neighbouring rows (``dim`` 0) or columns (1) as one."""
    first = grids[0]
    offset = (
        None if first.offset is None else torch.cat([grid.offset for grid in grids if grid.offset is not None], dim)
    )
    stored = {name: torch.cat([grid.stored[name] for grid in grids], dim) for name in first.stored}
    return Grid(
        torch.cat([grid.scale for grid in grids], dim), offset, first.group, first.lowest, first.highest, stored
    )
