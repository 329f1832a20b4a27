"""Which files go on where a prefix has come to."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from gossamer.engine.prefix_store.format import TOKEN_BYTES

LEAST_TOKENS = 64  # of a file that is worth it, and of what is worth being read: fewer are computed as fast


@dataclass(slots=True)
class Entry:
    """A file, or one that is going to be written.

    Attributes:
        name: of the file.
        start: the first of the tokens whose keys and values it holds, up to the last.
        tokens: all from the beginning on, packed.
        written: whether the file is there.
        touched: when it was last told to the file system that it was used, in seconds of ``time.monotonic``.
    """

    name: str
    start: int
    tokens: bytes
    written: bool = True
    touched: float = field(default_factory=time.monotonic)

    @property
    def end(self) -> int:
        return len(self.tokens) // TOKEN_BYTES

    def reach(self, tokens: bytes) -> int:
        """The position up to which the file is of use to a prefix; 0 if it is of none."""
        first = slice(self.start * TOKEN_BYTES, (self.start + 1) * TOKEN_BYTES)
        if self.tokens[first] != tokens[first]:
            return 0  # most files are told apart here, where conversations that begin alike go their own ways
        common = common_tokens(self.tokens, tokens)
        return common if common > self.start else 0


class PrefixIndex:
    """The files of one model. Methods may be called by several threads."""

    def __init__(self) -> None:
        self._entries: dict[str, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, entry: Entry) -> None:
        self._entries[entry.name] = entry

    def discard(self, names: Iterable[str]) -> None:
        """Forget files, known or not."""
        for name in names:
            self._entries.pop(name, None)

    def chain(self, tokens: bytes, start: int = 0, *, written: bool = False) -> list[tuple[Entry, int]]:
        """Files that take a prefix from ``start`` as far as they can, and the position to which each takes it.

        Args:
            tokens: of the prefix, packed.
            start: tokens of it that are there.
            written: only files that can be read.

        >>> from gossamer.engine.prefix_store.format import pack
        >>> index = PrefixIndex()
        >>> index.add(Entry("a", 0, pack(range(100))))
        >>> index.add(Entry("b", 80, pack(range(150))))
        >>> [(entry.name, end) for entry, end in index.chain(pack(range(120)))]
        [('a', 100), ('b', 120)]
        """
        # Entries come and go in other threads; those that are here now are enough.
        entries = [each for each in list(self._entries.values()) if each.written or not written]
        reaches = [(each, reach) for each in entries if (reach := each.reach(tokens)) > start]
        found: list[tuple[Entry, int]] = []
        while following := [(each, reach) for each, reach in reaches if each.start <= start < reach]:
            found.append(max(following, key=lambda item: item[1]))
            start = found[-1][1]
        return found


def common_tokens(one: bytes, other: bytes) -> int:
    """How many leading tokens two packed texts have in common.

    >>> from gossamer.engine.prefix_store.format import pack
    >>> common_tokens(pack([5, 6, 7]), pack([5, 6, 8, 9])), common_tokens(pack([5, 6]), pack([5, 6, 7]))
    (2, 2)
    """
    length = min(len(one), len(other))
    one, other = one[:length], other[:length]
    if one == other:
        return length // TOKEN_BYTES
    return int(np.argmax(np.frombuffer(one, "<i4") != np.frombuffer(other, "<i4")))
