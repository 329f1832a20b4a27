"""Which replica is believed to hold which prefix.

Beliefs are stamped with a clock that ticks with each insertion. A replica has a *horizon*: what was stamped at or
before it counts as forgotten. So a replica is dropped in constant time, and an observation that it has evicted one
prefix also takes away what it used less recently: replicas evict the least recently used first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence


class _Entry:
    __slots__ = ("seen", "stamps")

    def __init__(self) -> None:
        self.seen = 0
        self.stamps: dict[str, int] = {}  # replica -> when it was last given the prefix


class PrefixIndex:
    """At most ``max_entries`` pairs of a hash and a replica, the least recently used hashes leaving first.

    >>> index = PrefixIndex(max_entries=100)
    >>> index.add("a"), index.add("b")
    (None, None)
    >>> index.insert([1, 2, 3], "a"), index.insert([1, 2, 4], "b")
    (1, 2)
    >>> index.deepest([1, 2, 3, 5], ["a", "b"]), index.depth([1, 2, 3], "b"), index.repeated([1, 2, 3])
    ((3, ['a']), 2, 2)
    >>> index.drop("a")
    >>> index.deepest([1, 2, 3, 5], ["a", "b"])
    (2, ['b'])
    """

    def __init__(self, max_entries: int) -> None:
        self.max_entries = max(int(max_entries), 1)
        self.clock = 0
        self.pairs = 0
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._horizons: dict[str, int] = {}

    def __len__(self) -> int:
        """Hashes that are known, whoever holds them."""
        return len(self._entries)

    def add(self, replica: str) -> None:
        """A replica that holds nothing yet. One that is known keeps what it has."""
        self._horizons.setdefault(replica, self.clock)

    def drop(self, replica: str) -> None:
        """The replica is gone, and all beliefs about it."""
        self._horizons.pop(replica, None)

    def forget(self, replica: str, stamp: int) -> None:
        """What the replica was given last at ``stamp`` or before has been evicted there."""
        if replica in self._horizons:
            self._horizons[replica] = max(self._horizons[replica], min(stamp, self.clock))

    def insert(self, chain: Sequence[int], replica: str) -> int:
        """The replica computes this prompt. Returns the stamp of the insertion."""
        self.clock += 1
        for key in chain:
            entry = self._entries.get(key)
            if entry is None:
                entry = self._entries[key] = _Entry()
                self.pairs += 1  # a hash counts even if nobody holds it, for what was seen is kept as well
            else:
                self._entries.move_to_end(key)
            entry.seen += 1
            if replica in self._horizons:
                self.pairs += bool(entry.stamps) and replica not in entry.stamps
                entry.stamps[replica] = self.clock
        while self.pairs > self.max_entries and self._entries:
            _, entry = self._entries.popitem(last=False)
            self.pairs -= max(len(entry.stamps), 1)
        return self.clock

    def withdraw(self, chain: Sequence[int], replica: str, stamp: int) -> None:
        """The insertion of that stamp did not come about: the replica holds nothing because of it."""
        for key in chain:
            entry = self._entries.get(key)
            if entry is not None and entry.stamps.get(replica) == stamp:
                self._remove(entry, replica)

    def stamp(self, key: int, replica: str) -> int | None:
        """When the replica was last given the prefix; ``None`` if it is not believed to hold it."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        stamp = entry.stamps.get(replica)
        return stamp if stamp is not None and stamp > self._horizons.get(replica, self.clock) else None

    def deepest(self, chain: Sequence[int], among: Collection[str]) -> tuple[int, list[str]]:
        """How many leading hashes the best of the replicas ``among`` hold, and who does; (0, []) if nobody."""
        for depth in range(len(chain), 0, -1):
            entry = self._entries.get(chain[depth - 1])
            if entry is None or not entry.stamps:
                continue
            for replica in [r for r, stamp in entry.stamps.items() if stamp <= self._horizons.get(r, self.clock)]:
                self._remove(entry, replica)
            holders = [replica for replica in entry.stamps if replica in among]
            if holders:
                return depth, holders
        return 0, []

    def depth(self, chain: Sequence[int], replica: str, limit: int | None = None) -> int:
        """How many leading hashes, of the first ``limit``, the replica is believed to hold."""
        for depth in range(len(chain) if limit is None else min(limit, len(chain)), 0, -1):
            if self.stamp(chain[depth - 1], replica) is not None:
                return depth
        return 0

    def seen(self, chain: Sequence[int], depth: int) -> int:
        """How many prompts began with the first ``depth`` hashes, as far as they are remembered."""
        entry = self._entries.get(chain[depth - 1]) if 0 < depth <= len(chain) else None
        return 0 if entry is None else entry.seen

    def repeated(self, chain: Sequence[int]) -> int:
        """How many leading hashes were part of two prompts or more."""
        for depth in range(len(chain), 0, -1):
            entry = self._entries.get(chain[depth - 1])
            if entry is not None and entry.seen >= 2:
                return depth
        return 0

    def _remove(self, entry: _Entry, replica: str) -> None:
        del entry.stamps[replica]
        self.pairs -= bool(entry.stamps)  # the last one leaves the hash itself, which counts
