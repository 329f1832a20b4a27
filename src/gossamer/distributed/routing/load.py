"""What each replica has to do: what this router gave it, and what it says about itself.

A router among several sees only its own requests; a report says everything, but is old. So a report is taken as what
the *others* had there at that moment, and the router's own numbers, which are always current, come on top.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Replica:
    running: int = 0  # requests of this router that have not ended
    queued: float = 0.0  # tokens of theirs that are to be computed before a first token
    others_running: float = 0.0
    others_queued: float = 0.0


class Load:
    """Requests in flight and tokens queued, per replica.

    >>> load = Load()
    >>> load.add("a")
    >>> load.start("a", 500.0)
    >>> load.report("a", running=3, queued=700.0)  # one of the three is ours
    >>> load.in_flight("a"), load.queued("a")
    (3.0, 700.0)
    >>> load.start("a", 100.0), load.computed("a", 500.0), load.end("a")
    (None, None, None)
    >>> load.in_flight("a"), load.queued("a"), load.mean_in_flight
    (3.0, 300.0, 3.0)
    """

    def __init__(self) -> None:
        self._replicas: dict[str, _Replica] = {}
        self._total = 0.0  # in flight, of all

    def add(self, replica: str) -> None:
        """A replica with nothing to do. One that is known keeps its load."""
        self._replicas.setdefault(replica, _Replica())

    def drop(self, replica: str) -> None:
        gone = self._replicas.pop(replica, None)
        if gone is not None:
            self._total -= gone.running + gone.others_running

    def report(self, replica: str, running: float, queued: float) -> None:
        """The replica has so many requests and tokens to compute, whoever sent them."""
        known = self._replicas.get(replica)
        if known is not None:
            others = max(running - known.running, 0.0)
            self._total += others - known.others_running
            known.others_running, known.others_queued = others, max(queued - known.queued, 0.0)

    def start(self, replica: str, tokens: float) -> None:
        """A request of ours goes there, with ``tokens`` to compute."""
        known = self._replicas.get(replica)
        if known is not None:
            known.running, known.queued = known.running + 1, known.queued + tokens
            self._total += 1

    def computed(self, replica: str, tokens: float) -> None:
        """The prompt of one of ours is computed."""
        known = self._replicas.get(replica)
        if known is not None:
            known.queued = max(known.queued - tokens, 0.0)

    def end(self, replica: str) -> None:
        """One of ours has ended."""
        known = self._replicas.get(replica)
        if known is not None and known.running > 0:
            known.running -= 1
            self._total -= 1
            if known.running == 0:
                known.queued = 0.0  # what rounding has left

    def in_flight(self, replica: str) -> float:
        known = self._replicas.get(replica)
        return 0.0 if known is None else float(known.running + known.others_running)

    def queued(self, replica: str) -> float:
        known = self._replicas.get(replica)
        return 0.0 if known is None else known.queued + known.others_queued

    @property
    def mean_in_flight(self) -> float:
        """Per replica; 0 without replicas."""
        return max(self._total, 0.0) / len(self._replicas) if self._replicas else 0.0
