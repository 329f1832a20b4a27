"""Which of several processes solves for which weight."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gossamer.operators.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Owners:
    """Weights r, r + W, r + 2 W and so on, of all that are pruned, are those of process r of W.

    Args:
        ranks: the processes.
        names: of all weights, in order.

    >>> owners = Owners.of(["a.weight", "b.weight"])
    >>> owners["b.weight"], owners.mine("b.weight")
    (0, True)
    """

    ranks: Ranks
    by_name: dict[str, int]

    @classmethod
    def of(cls, names: Iterable[str], ranks: Ranks = ALONE) -> Owners:
        return cls(ranks, {name: place % ranks.size for place, name in enumerate(names)})

    def __getitem__(self, name: str) -> int:
        return self.by_name[name]

    def mine(self, name: str) -> bool:
        return self.by_name[name] == self.ranks.rank
