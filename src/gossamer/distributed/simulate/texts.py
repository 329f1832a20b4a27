"""Prompts without their texts: as far as hashes tell them apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, eq=False, slots=True)
class Text:
    """Tokens of a prompt and of its answer. Two of them agree as far as their chains do, and no further.

    Attributes:
        chain: hashes of whole blocks, each of everything up to its end; it may reach into the answer.
        block: tokens per hash.
        length: tokens of prompt and answer together.

    >>> one, other = Text((1, 2, 3), 16, 100), Text((1, 2, 9, 4), 16, 64)
    >>> one.agrees(other, 0, 64), one.agrees(other, 0, 20), one.agrees(one, 0, 90)
    (32, 20, 90)
    """

    chain: tuple[int, ...]
    block: int
    length: int

    def key(self, position: int) -> object:
        """What tells this text from others of which the same tokens come before ``position``."""
        index = position // self.block
        return self.chain[index] if index < len(self.chain) else self

    def agrees(self, other: Text, start: int, limit: int) -> int:
        """Up to which token, of the first ``limit``, both are equal, given that they are up to ``start``."""
        if self is other:
            return limit
        mine, theirs = self.chain, other.chain
        low, high = start // self.block, min(len(mine), len(theirs), -(-limit // self.block))
        while low < high:  # hashes are of everything before them, so that they agree up to some place and not behind it
            middle = (low + high) // 2
            if mine[middle] == theirs[middle]:
                low = middle + 1
            else:
                high = middle
        return min(low * self.block, limit) if low * self.block > start else start
