"""Where the last tokens of a text stood before: chains of places with equal hashes, as LZ77 compressors keep them.

A place is noted under the hash of the two tokens before it; each knows the place before it of the same hash. Noting a
token takes constant time and at most 12 bytes; a look-up compares the last 8 places with what came, backwards, and
takes the longest match: the tokens behind it are likely to come next.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np

LEAST = 2  # tokens of a match
LONGEST = 64  # beyond which matches are not told apart
CANDIDATES = 8
_SMALLEST = 64  # entries of a table
_FEW = 48  # tokens that are noted one by one


Tokens = TypeVar("Tokens", int, np.ndarray)


class Match(NamedTuple):
    """``length`` tokens before ``place`` are the last ones of another text, or more if it is :data:`LONGEST`."""

    place: int
    length: int


class Chains:
    """The places of a text from ``start`` on, as far as they were noted. The text is kept by whoever has it.

    >>> text = [5, 6, 7, 1, 2, 5, 6, 7]
    >>> chains = Chains()
    >>> chains.note(text, len(text))
    >>> chains.find(text, text)
    Match(place=3, length=3)
    """

    def __init__(self, start: int = 0) -> None:
        self.start = start
        self.end = self._first = max(start, LEAST)
        self._before = array("i")  # of each place from the first: the one before it with the same hash, or -1
        self._table = array("i", [-1]) * _SMALLEST

    @property
    def nbytes(self) -> int:
        """Bytes of the tables."""
        return self._before.itemsize * (len(self._before) + len(self._table))

    def note(self, text: Sequence[int], end: int) -> None:
        """Note the places up to ``end`` of ``text``, of which those noted before have not changed."""
        if end <= self.end:
            return
        if end - self._first > len(self._table):
            size = 1 << (end - self._first - 1).bit_length()
            self._table, self._before, self.end = array("i", [-1]) * size, array("i"), self._first
        if end - self.end > _FEW:
            self._note_many(np.array(text[self.end - LEAST : end], np.int64), end)
            return
        table, before, mask = self._table, self._before, len(self._table) - 1
        for place in range(self.end, end):
            key = _hash(text[place - 2], text[place - 1]) & mask
            before.append(table[key])
            table[key] = place
        self.end = end

    def _note_many(self, tokens: np.ndarray, end: int) -> None:
        keys = _hash(tokens[:-2], tokens[1:-1]) & (len(self._table) - 1)
        order = np.argsort(keys, kind="stable")
        table, ordered = np.frombuffer(self._table, np.int32), keys[order]
        begins = np.append(True, ordered[1:] != ordered[:-1])
        previous = np.append(0, order[:-1] + self.end)
        before = np.empty(len(keys), np.int32)
        before[order] = np.where(begins, table[ordered], previous)
        ends = np.append(begins[1:], True)
        table[ordered[ends]] = order[ends] + self.end
        self._before.frombytes(before.tobytes())
        self.end = end

    def find(self, text: Sequence[int], tail: Sequence[int], *, near: int | None = None) -> Match | None:
        """The longest match in ``text`` of the end of ``tail``; of equally long ones the last.

        Args:
            near: of matches that are long enough to be told from chance, the one nearest to this place instead.
        """
        last = len(tail) - 1
        if last < LEAST - 1:
            return None
        place = self._table[_hash(tail[-2], tail[-1]) & (len(self._table) - 1)]
        found, best = None, 0.0
        for _ in range(CANDIDATES):
            if place < 0:
                break
            length, most = 0, min(place, last + 1, LONGEST)
            while length < most and text[place - 1 - length] == tail[last - length]:
                length += 1
            # Beyond so many tokens a match is none by chance, and the nearest one goes on where the text left off.
            worth = length if near is None else min(length, 2 * LEAST) + 1 / (2 + abs(place - near))
            if length >= LEAST and worth > best:
                found, best = Match(place, length), worth
            place = self._before[place - self._first]
        return found


def _hash(a: Tokens, b: Tokens) -> Tokens:
    """Of two tokens, or of arrays of them; the products of token ids below 2^20 do not overflow 64 bits."""
    return (a * 2654435761 + b * 2246822519) >> 12
