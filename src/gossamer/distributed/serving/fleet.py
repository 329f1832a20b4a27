"""The replicas as the ingress sees them: where they are, and which of them a prompt should go to.

Ray Serve's router, which learns of replicas, runs in a thread of its own; what passes requests on asks from another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.distributed.routing.policy import PrefixRouter


@dataclass(frozen=True, slots=True)
class Replica:
    """One of them.

    Attributes:
        id: Ray Serve's.
        address: ``http://host:port`` of its own server.
        tag: part of the ids of what it keeps.
        speed: prompt tokens per second.
    """

    id: str
    address: str
    tag: str
    speed: float


class Fleet:
    """All of them. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._router = PrefixRouter()
        self._replicas: dict[str, Replica] = {}
        #: Whether other ingresses send requests too, of which only the replicas know. Of its own requests, this one
        #: knows more than what replicas said a second ago.
        self.is_one_of_several = False
        #: Told of every choice: the lease, and the replica.
        self.on_routed: Callable[[str, str], None] | None = None

    def update(self, replicas: Sequence[Replica], reports: dict[str, tuple[int, int]]) -> None:
        """These are there now, and say of themselves how many requests and tokens wait for them."""
        with self._lock:
            self._replicas = {each.id: each for each in replicas}
            self._router.update_replicas({each.id: each.speed for each in replicas})
            for id, (running, queued) in reports.items():
                self._router.report(id, running, queued)

    @property
    def replicas(self) -> list[Replica]:
        with self._lock:
            return list(self._replicas.values())

    def tagged(self, tag: str) -> Replica | None:
        """The replica with this tag, if it is still there."""
        return next((each for each in self.replicas if each.tag == tag), None)

    def rank(
        self, lease_id: str, chain: Sequence[int], size: int, candidates: Collection[str], avoid: Collection[str]
    ) -> list[list[str]]:
        """Which of the candidates a prompt should go to, in ranks; those to be avoided come last, together.

        The first one counts as chosen at once, or prompts that come together would not know of each other; if another
        one takes it, :meth:`routed` says so.
        """
        with self._lock:
            ranks = self._router.rank(chain, size, [each for each in candidates if each not in avoid])
            if ranks:
                self._router.routed(lease_id, ranks[0][0], chain, size)
        last = [each for each in candidates if each in avoid]
        return [*ranks, last] if last else ranks

    def dead(self, id: str) -> None:
        with self._lock:
            self._replicas.pop(id, None)
            self._router.dead(id)

    def routed(self, lease_id: str, replica: str, chain: Sequence[int], size: int) -> None:
        """The replica has a place for the prompt."""
        with self._lock:
            if self._router.replica_of(lease_id) != replica:
                self._router.routed(lease_id, replica, chain, size)
        if self.on_routed is not None:
            self.on_routed(lease_id, replica)

    def first_token(self, lease_id: str) -> None:
        with self._lock:
            self._router.first_token(lease_id)

    def completed(self, lease_id: str, usage: dict[str, Any] | None) -> None:
        """The answer has ended, well or not; ``usage`` says what it took, if anything."""
        known = usage or {}
        details = known.get("prompt_tokens_details") or {}
        with self._lock:
            self._router.completed(
                lease_id, prompt_tokens=known.get("prompt_tokens"), cached_tokens=details.get("cached_tokens")
            )

    def failed(self, lease_id: str) -> None:
        with self._lock:
            self._router.failed(lease_id)

    def learn(self, tag: str, chains: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """A replica tells of prompts that it has had, the last one last."""
        replica = self.tagged(tag)
        if replica is not None:
            for place, (chain, size) in enumerate(chains):
                name = f"{tag}-{place}"
                self.routed(name, replica.id, chain, size)
                self.completed(name, None)

    def stats(self) -> dict[str, Any]:
        with self._lock:
            return self._router.stats()


_FLEETS: dict[str, Fleet] = {}
_MAKING = threading.Lock()


def fleet_of(application: str) -> Fleet:
    """The fleet of an application in this process, which Ray's router and the ingress share."""
    with _MAKING:
        return _FLEETS.setdefault(application, Fleet())
