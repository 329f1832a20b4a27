"""Rules of others with the interface of :class:`PrefixRouter`, for the simulator and for benchmarks only.

Each knows what the name says and nothing else. They see the same calls, so that a comparison changes the rule alone.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from gossamer.distributed.routing.chain import BLOCK_BYTES
from gossamer.distributed.routing.homes import Rendezvous
from gossamer.distributed.routing.load import Load
from gossamer.distributed.routing.policy import ANCHOR_BLOCKS, PrefixRouter


class Router(Protocol):
    """What chooses replicas. See :class:`~gossamer.distributed.routing.policy.PrefixRouter` for each method."""

    def update_replicas(self, speeds: Mapping[str, float]) -> None: ...

    def report(self, replica: str, running: int, queued_tokens: int) -> None: ...

    def rank(
        self, chain: Sequence[int], prompt_bytes: int, candidates: Collection[str] | None = None
    ) -> list[list[str]]: ...

    def best(self, chain: Sequence[int], prompt_bytes: int) -> str | None: ...

    def routed(self, request_id: str, replica: str, chain: Sequence[int], prompt_bytes: int) -> None: ...

    def first_token(self, request_id: str) -> None: ...

    def completed(
        self, request_id: str, *, prompt_tokens: int | None = None, cached_tokens: int | None = None
    ) -> None: ...

    def failed(self, request_id: str) -> None: ...

    def dead(self, replica: str) -> None: ...

    def stats(self) -> dict[str, Any]: ...


class _Compared(ABC):
    """Counts what is in flight; subclasses say where a prompt goes."""

    def __init__(self, *, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._load = Load()
        self._names: list[str] = []
        self._where: dict[str, str] = {}

    def update_replicas(self, speeds: Mapping[str, float]) -> None:
        for replica in [each for each in self._names if each not in speeds]:
            self.dead(replica)
        self._names = list(speeds)
        for replica in self._names:
            self._load.add(replica)

    def report(self, replica: str, running: int, queued_tokens: int) -> None:
        self._load.report(replica, running, queued_tokens)

    def rank(
        self, chain: Sequence[int], prompt_bytes: int, candidates: Collection[str] | None = None
    ) -> list[list[str]]:
        eligible = self._names if candidates is None else [each for each in self._names if each in candidates]
        if not eligible:
            return []
        first = self._choose(chain, prompt_bytes, eligible)
        return [rank for rank in (first, [each for each in eligible if each not in first]) if rank]

    def best(self, chain: Sequence[int], prompt_bytes: int) -> str | None:
        return self._choose(chain, prompt_bytes, self._names)[0] if self._names else None

    @abstractmethod
    def _choose(self, chain: Sequence[int], prompt_bytes: int, eligible: list[str]) -> list[str]:
        """The first rank: one or more of the eligible."""

    def _fewest(self, replicas: Sequence[str]) -> str:
        return min(replicas, key=self._load.in_flight)

    def routed(self, request_id: str, replica: str, chain: Sequence[int], prompt_bytes: int) -> None:
        self._where[request_id] = replica
        self._load.start(replica, 0.0)

    def first_token(self, request_id: str) -> None:
        """None of these rules asks how many tokens are queued."""
        return None

    def completed(self, request_id: str, *, prompt_tokens: int | None = None, cached_tokens: int | None = None) -> None:
        replica = self._where.pop(request_id, None)
        if replica is not None:
            self._load.end(replica)

    def failed(self, request_id: str) -> None:
        self.completed(request_id)

    def dead(self, replica: str) -> None:
        self._load.drop(replica)
        self._names = [each for each in self._names if each != replica]

    def stats(self) -> dict[str, Any]:
        return {"replicas": len(self._names), "in_flight": len(self._where)}


class LMetric(PrefixRouter):
    """Gossamer's candidates, chosen among by LMetric's score (arXiv 2603.15202)."""

    batch_offset = 1.0

    def _miss_weight(self) -> float:
        return 1.0


class RoundRobin(_Compared):
    """One after the other."""

    _next = 0

    def _choose(self, chain: Sequence[int], prompt_bytes: int, eligible: list[str]) -> list[str]:
        self._next += 1
        return [eligible[(self._next - 1) % len(eligible)]]


class Random(_Compared):
    """Any."""

    def _choose(self, chain: Sequence[int], prompt_bytes: int, eligible: list[str]) -> list[str]:
        return [self._random.choice(eligible)]


class PowerOfTwo(_Compared):
    """The less busy one of two at random (Mitzenmacher, 2001); what Ray Serve does by default."""

    def _choose(self, chain: Sequence[int], prompt_bytes: int, eligible: list[str]) -> list[str]:
        return [self._fewest(self._random.sample(eligible, min(2, len(eligible))))]


class ConsistentHash(_Compared):
    """Consistent hashing with bounded loads (Mirrokni, Thorup, Zadimoghaddam, 2018) of the first 2 kB.

    The first replica, in the order that belongs to the key, with at most 1.25 x the mean number in flight.
    """

    def __init__(self, *, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self._homes = Rendezvous([])
        self._of: tuple[str, ...] = ()

    def _choose(self, chain: Sequence[int], prompt_bytes: int, eligible: list[str]) -> list[str]:
        if self._of != tuple(eligible):
            self._of, self._homes = tuple(eligible), Rendezvous(eligible)
        key = chain[min(ANCHOR_BLOCKS, len(chain)) - 1] if chain else 0
        limit = max(1.25 * (self._load.mean_in_flight + 1 / len(eligible)), 1.0)  # this request counts
        count = 4
        while True:  # the order is needed only as far as replicas are full
            order = self._homes.best(key, count)
            for replica in order[count // 2 if count > 4 else 0 :]:
                if self._load.in_flight(replica) + 1 <= limit:
                    return [replica]
            if count >= len(eligible):
                return [self._fewest(eligible)]
            count *= 2


class RayPrefixAffinity(_Compared):
    """The rule of Ray's ``PrefixCacheAffinityRouter``, from its description.

    Ray 2.60.0, ``ray/llm/_internal/serve/routing_policies/prefix_aware/prefix_aware_router.py``: among replicas whose
    queue lengths differ by at most ``imbalanced_threshold``, those that hold the longest prefix, if that is at least
    ``match_rate_threshold`` of the prompt; otherwise those with the smallest trees. Of several, the one with the
    shortest queue. Beyond the threshold, the better one of two at random. Ray evicts from its tree only if told to, as
    here.

    Ray's tree holds characters; here it holds the blocks of the chain. With the chain of :func:`character_chain` it
    is Ray's.

    Args:
        block_bytes: what one hash of a chain stands for.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        match_rate_threshold: float = 0.1,
        imbalanced_threshold: float = float("inf"),
        block_bytes: int = BLOCK_BYTES,
    ) -> None:
        super().__init__(seed=seed)
        self._match_rate, self._imbalance, self._block_bytes = match_rate_threshold, imbalanced_threshold, block_bytes
        self._holders: dict[int, set[str]] = {}
        self._sizes: dict[str, int] = {}  # hashes in each replica's tree

    def update_replicas(self, speeds: Mapping[str, float]) -> None:
        super().update_replicas(speeds)
        for replica in self._names:
            self._sizes.setdefault(replica, 0)

    def _choose(self, chain: Sequence[int], prompt_bytes: int, eligible: list[str]) -> list[str]:
        if self._imbalance < float("inf"):
            queues = [self._load.in_flight(replica) for replica in eligible]
            if max(queues) - min(queues) > self._imbalance:
                return [self._fewest(self._random.sample(eligible, min(2, len(eligible))))]
        among = set(eligible)
        matched, found = 0, list[str]()
        for depth, key in enumerate(chain, start=1):  # trees are never cut, so that a miss ends the walk
            holders = self._holders.get(key, set()) & among
            if not holders:
                break
            matched, found = depth, sorted(holders)
        if not found or matched * self._block_bytes < self._match_rate * prompt_bytes:
            smallest = min(self._sizes[replica] for replica in eligible)
            found = [replica for replica in eligible if self._sizes[replica] == smallest]
        return [self._fewest(found)]

    def routed(self, request_id: str, replica: str, chain: Sequence[int], prompt_bytes: int) -> None:
        super().routed(request_id, replica, chain, prompt_bytes)
        for key in chain:
            holders = self._holders.setdefault(key, set())
            if replica not in holders:
                holders.add(replica)
                self._sizes[replica] = self._sizes.get(replica, 0) + 1

    def dead(self, replica: str) -> None:
        super().dead(replica)
        self._sizes.pop(replica, None)
        for holders in self._holders.values():
            holders.discard(replica)


def character_chain(text: str) -> tuple[int, ...]:
    """One key per character, which stands for all characters up to it, so that a tree of chains is one of characters.

    >>> first, second = character_chain("abcd"), character_chain("abxd")
    >>> [a == b for a, b in zip(first, second)]
    [True, True, False, False]
    """
    keys, key = [], 0
    for character in text:
        key = hash((key, ord(character)))  # of numbers: the same in every process
        keys.append(key)
    return tuple(keys)


ROUTERS: dict[str, Callable[..., Router]] = {
    "prefix": PrefixRouter,
    "lmetric": LMetric,
    "round-robin": RoundRobin,
    "random": Random,
    "power-of-two": PowerOfTwo,
    "consistent-hash": ConsistentHash,
    "ray-prefix": RayPrefixAffinity,
}
"""By the name that the command line knows; each takes ``seed=``."""
