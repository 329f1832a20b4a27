"""Looks at a few rows of K before anything is built: whether approximating it can pay at all."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops.gaussian import Queries, entries

PILOT_ROWS = 16  # that are looked at
_FRACTIONS = 48  # of the entries of a row that might be near
_GROUPS_PER_POINT = 6.0  # a division into groups has so many times the near entries that there are
_INDEX = 32.0  # entries per query and sqrt(n_k) that building an index takes, about


class Pilot:
    """How the squares of K's rows are distributed, of a sample of rows.

    Args:
        queries: some of them (rows, d), drawn at random, scaled.
        keys: (n_k, d), scaled.
    """

    def __init__(self, queries: Tensor, keys: Tensor) -> None:
        squares = entries(Queries.together(queries), keys).square().double()
        ordered = squares.sort(dim=1, descending=True).values.mean(0)
        left = ordered.sum() - ordered.cumsum(0)
        self.count = len(keys)
        self.near = (
            torch.logspace(0, torch.log10(torch.tensor(self.count)).item(), _FRACTIONS).long().clamp_max(self.count)
        )
        self.left = left[self.near - 1].clamp_min(0)  # mean over rows, of the squares beyond the nearest ones

    def share(self, concentration: float, planned: float) -> float:
        """Entries that a product would take, index included, over all entries.

        Args:
            concentration: ``(sum |x_j|)^2 / (n_k |x|^2)``, 1 where all are alike.
            planned: squared error over ``|x|^2``.
        """
        drawn = concentration * self.left * self.count / planned
        taken = float((_GROUPS_PER_POINT * self.near + drawn).min()) + _INDEX * self.count**0.5
        return taken / self.count
