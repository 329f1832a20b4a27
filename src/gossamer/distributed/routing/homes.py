"""Rendezvous hashing: routers that know nothing of each other agree on the homes of a prefix.

Thaler and Ravishankar, "Using name-based mappings to increase hit rates", 1998: each pair of a key and a replica has a
weight, and the replicas with the largest weights are the key's homes. A replica that comes or goes moves only the keys
it is or was the home of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

_MASK = (1 << 64) - 1
MAX_REMEMBERED = 100_000  # homes of anchors


class Rendezvous:
    """The homes of keys among a set of replicas.

    >>> homes = Rendezvous(["a", "b", "c"])
    >>> homes.best(7, 2), Rendezvous(["c", "b", "a"]).best(7, 2)
    (['c', 'b'], ['c', 'b'])
    """

    def __init__(self, replicas: Iterable[str]) -> None:
        self._names: Sequence[str] = sorted(replicas)
        self._hashes = {name: _name_hash(name) for name in self._names}
        self._array: NDArray[np.uint64] = np.array([self._hashes[name] for name in self._names], dtype=np.uint64)
        self._known: dict[tuple[int, int], list[str]] = {}

    def best(self, key: int, count: int) -> list[str]:
        """The ``count`` replicas of the largest weights, the largest first; fewer if there are fewer."""
        known = self._known.get((key, count))
        if known is None:
            weights = _mix(self._array ^ np.uint64(key & _MASK))
            if count < len(weights):
                top = np.argpartition(weights, len(weights) - count)[len(weights) - count :]
            else:
                top = np.arange(len(weights))
            known = [self._names[i] for i in sorted(top.tolist(), key=lambda i: (-int(weights[i]), self._names[i]))]
            if len(self._known) >= MAX_REMEMBERED:
                self._known.clear()
            self._known[key, count] = known
        return known

    def best_among(self, key: int, count: int, among: Collection[str]) -> list[str]:
        """As :meth:`best`, if there were only those of ``among``."""
        asked = count
        while True:
            found = [replica for replica in self.best(key, asked) if replica in among][:count]
            if len(found) == count or asked >= len(self._names):
                return found
            asked *= 4

    def weight(self, key: int, replica: str) -> int:
        """The weight of one pair, in [0, 2^64)."""
        value = (self._hashes.get(replica, 0) ^ key) & _MASK
        value = (value + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        return value ^ (value >> 31)


def _name_hash(name: str) -> int:
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finalizer of SplitMix64 (Steele, Lea, Flood, 2014): each bit of its input changes each of its output."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
