"""Replays a trace on a fleet of simulated replicas, with the routers that real ones use."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from gossamer.distributed.extra import require_simpy
from gossamer.distributed.routing.chain import BLOCK_BYTES
from gossamer.distributed.routing.policies_compared import ROUTERS, Router
from gossamer.distributed.simulate.engine_model import EngineModel, Sequence
from gossamer.distributed.simulate.replica_model import ReplicaModel
from gossamer.distributed.simulate.speeds import Speeds
from gossamer.distributed.simulate.texts import Text
from gossamer.distributed.simulate.trace import Trace, TraceRequest
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    import simpy

FREQUENT_REPORTS = 100  # replicas; above them they report every 10 seconds instead of every second


@dataclass(frozen=True)
class FleetOptions:
    """A fleet.

    Args:
        replicas: how many engines.
        memory_tokens: whose keys and values each holds.
        max_num_seqs, max_num_batched_tokens: as the engine's options.
        ingresses: routers that each see a part of the requests, drawn at random; with several, replicas report.
        in_flight: requests in flight, each followed by the next; ``None`` follows the trace's times.
        warm_up: so many first requests count for nothing but the state they leave.
        price: of a replica per hour.
        seed: of what is drawn at random.

    Raises:
        ConfigurationError: a number is out of its range.
    """

    replicas: int = 2
    memory_tokens: int = 100_000
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    ingresses: int = 1
    in_flight: int | None = None
    warm_up: int = 0
    price: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("replicas", "memory_tokens", "max_num_seqs", "max_num_batched_tokens", "ingresses", "in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigurationError(f"{name} must be at least 1, got {value}")
        if self.warm_up < 0 or not self.price >= 0:
            raise ConfigurationError(f"warm_up and price must be at least 0, got {self.warm_up} and {self.price}")


@dataclass
class Outcome:
    """What one router made of a trace; of requests behind the warm-up, unless it says otherwise.

    Attributes:
        requests, failed: that ended well; that could not fit.
        prompt_tokens, cached_tokens, output_tokens: sums.
        recomputed_tokens: tokens that preempted sequences computed over again.
        ttft, inter_token: seconds, per request in the order of their ends; the latter is a request's mean, without
            requests of one token.
        seconds: from the first of these arrivals to the last end.
        requests_by_replica: these requests.
        busy_by_replica: seconds in which a replica computed, of the whole run, which took ``whole_seconds``.
        peak_tokens: the most that any replica held; ``evicted_tokens``, ``preemptions``, ``steps``, ``events``: of the
            whole run and all replicas.
        router_stats: of the first ingress.
    """

    router: str
    requests: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    recomputed_tokens: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))
    inter_token: array[float] = field(default_factory=lambda: array("d"))
    seconds: float = 0.0
    requests_by_replica: list[int] = field(default_factory=list)
    busy_by_replica: list[float] = field(default_factory=list)
    whole_seconds: float = 0.0
    peak_tokens: int = 0
    evicted_tokens: int = 0
    preemptions: int = 0
    steps: int = 0
    events: int = 0
    router_stats: dict[str, Any] = field(default_factory=dict)

    @property
    def computed_tokens(self) -> int:
        """Of the prompts."""
        return self.prompt_tokens - self.cached_tokens


def replay(trace: Trace, speeds: Speeds, options: FleetOptions = FleetOptions(), *, router: str = "prefix") -> Outcome:
    """Every request of ``trace``, on a fleet of equal replicas.

    Args:
        trace: see :mod:`gossamer.distributed.simulate.trace`.
        speeds: of the engines, see :func:`~gossamer.distributed.simulate.speeds.read_speeds`.
        options: the fleet.
        router: a name in :data:`~gossamer.distributed.routing.policies_compared.ROUTERS`.

    Raises:
        ConfigurationError: there is no such router, the trace is empty or of another model than the speeds, a request
            does not fit into a replica's memory, or requests that wait for others are to be kept in flight.
    """
    if router not in ROUTERS:
        raise ConfigurationError(f"there is no router {router!r}; there are {', '.join(ROUTERS)}")
    if trace.model and speeds.model and trace.model != speeds.model:
        raise ConfigurationError(f"the trace is of {trace.model}, and the speeds are of {speeds.model}")
    if trace.longest > options.memory_tokens:
        raise ConfigurationError(
            f"the longest request has {trace.longest} tokens with its answer, and a replica's memory holds "
            f"{options.memory_tokens}; raise the memory or leave the request out"
        )
    return _Cluster(trace, speeds, options, router).run()


@dataclass(slots=True)
class _InFlight:
    """A request on its way."""

    request: TraceRequest
    number: int
    id: str
    arrived: float
    router: Router
    replica: int
    first: float = 0.0


class _Cluster:
    def __init__(self, trace: Trace, speeds: Speeds, options: FleetOptions, router: str) -> None:
        simpy = require_simpy()
        self.trace, self.options = trace, options
        self.env = simpy.Environment()
        self.names = [f"replica-{i}" for i in range(options.replicas)]
        self.index = {name: i for i, name in enumerate(self.names)}
        self.replicas = [
            ReplicaModel(
                self.env,
                EngineModel(
                    speeds,
                    memory_tokens=options.memory_tokens,
                    max_num_seqs=options.max_num_seqs,
                    max_num_batched_tokens=options.max_num_batched_tokens,
                ),
                self._first_token,
                self._end,
            )
            for _ in self.names
        ]
        speed = speeds.prefill_speed(options.max_num_batched_tokens)
        self.routers: list[Router] = [ROUTERS[router](seed=options.seed + i) for i in range(options.ingresses)]
        for each in self.routers:
            each.update_replicas(dict.fromkeys(self.names, speed))
        self.random = random.Random(options.seed)
        self.outcome = Outcome(router, requests_by_replica=[0] * options.replicas)
        self.source: Iterator[TraceRequest] = iter(trace)
        self.number = 0
        self.began: float | None = None
        self.unfinished = 0
        self.last_end = 0.0
        self.waiting: dict[str, list[TraceRequest]] = {}  # by the id of the request they come after
        self.ended: dict[str, float] | None = {} if trace.dependent else None

    def run(self) -> Outcome:
        if self.options.in_flight is None:
            self._next_arrival()
        elif self.trace.dependent:
            raise ConfigurationError("requests that come after others cannot be kept in flight; leave in_flight out")
        else:
            for _ in range(self.options.in_flight):
                self._next_in_turn()
        if len(self.routers) > 1:
            self._report_later()
        self.env.run()
        if self.number == 0:
            raise ConfigurationError("the trace has no requests")
        return self._outcome()

    # --- requests come -----------------------------------------------------------------------------------------

    def _next_arrival(self) -> None:
        """Lets the next request of the trace that waits for no other come at its time."""
        for request in self.source:
            if request.after is None:
                self._later(request.t - self.env.now, request, goes_on=True)
                return
            end = None if self.ended is None else self.ended.get(request.after)
            if end is None:
                self.waiting.setdefault(request.after, []).append(request)
            else:
                self._later(end + request.t - self.env.now, request, goes_on=False)

    def _later(self, delay: float, request: TraceRequest, *, goes_on: bool) -> None:
        event = self.env.timeout(max(delay, 0.0), (request, goes_on))
        event.callbacks.append(self._came)
        self.unfinished += 1

    def _came(self, event: simpy.Event) -> None:
        arrival: Any = event.value
        request, goes_on = arrival
        self._arrive(request)
        if goes_on:
            self._next_arrival()

    def _next_in_turn(self) -> None:
        request = next(self.source, None)
        if request is not None:
            self.unfinished += 1
            self._arrive(request)

    def _arrive(self, request: TraceRequest) -> None:
        number, block = self.number, self.trace.block_tokens
        self.number += 1
        if number == self.options.warm_up:
            self.began = self.env.now
        chain = request.chain[: max(request.prompt_tokens // block, 1)]
        # the routers count bytes: so many that a hash stands for BLOCK_BYTES of them
        size = request.prompt_tokens * BLOCK_BYTES // block
        router = self.routers[0] if len(self.routers) == 1 else self.random.choice(self.routers)
        replica = router.best(chain, size)
        assert replica is not None
        flight = _InFlight(request, number, f"{number}", self.env.now, router, self.index[replica])
        router.routed(flight.id, replica, chain, size)
        text = Text(request.chain, block, request.prompt_tokens + request.output_tokens)
        chosen = self.replicas[flight.replica]
        chosen.engine.add(flight, text, request.prompt_tokens, request.output_tokens)
        chosen.wake()

    # --- and go ------------------------------------------------------------------------------------------------

    def _first_token(self, sequence: Sequence) -> None:
        flight: _InFlight = sequence.request  # type: ignore[assignment]
        flight.first = self.env.now
        flight.router.first_token(flight.id)

    def _end(self, sequence: Sequence) -> None:
        flight: _InFlight = sequence.request  # type: ignore[assignment]
        request, now = flight.request, self.env.now
        self.unfinished, self.last_end = self.unfinished - 1, now
        if not sequence.failed:
            flight.router.completed(flight.id, prompt_tokens=request.prompt_tokens, cached_tokens=sequence.cached)
        else:
            flight.router.failed(flight.id)
        if flight.number >= self.options.warm_up:
            self._count(sequence, flight)
        if self.ended is not None and request.id:
            self.ended[request.id] = now
            for later in self.waiting.pop(request.id, []):
                self._later(later.t, later, goes_on=False)
        if self.options.in_flight is not None:
            self._next_in_turn()

    def _count(self, sequence: Sequence, flight: _InFlight) -> None:
        outcome = self.outcome
        if sequence.failed:
            outcome.failed += 1
            return
        outcome.requests += 1
        outcome.prompt_tokens += sequence.prompt_tokens
        outcome.cached_tokens += sequence.cached
        outcome.output_tokens += sequence.output_tokens
        fed = sequence.prompt_tokens - sequence.cached + sequence.output_tokens - 1
        outcome.recomputed_tokens += max(sequence.computed - fed, 0)
        outcome.ttft.append(flight.first - flight.arrived)
        if sequence.output_tokens > 1:
            outcome.inter_token.append((self.env.now - flight.first) / (sequence.output_tokens - 1))
        outcome.requests_by_replica[flight.replica] += 1
        outcome.seconds = self.env.now - (self.began or 0.0)

    # --- reports -----------------------------------------------------------------------------------------------

    def _report_later(self) -> None:
        period = 1.0 if len(self.replicas) <= FREQUENT_REPORTS else 10.0
        event = self.env.timeout(period)
        event.callbacks.append(self._report)

    def _report(self, event: simpy.Event) -> None:
        for name, replica in zip(self.names, self.replicas, strict=True):
            running, queued = replica.engine.load()
            for router in self.routers:
                router.report(name, running, queued)
        if self.unfinished:
            self._report_later()

    def _outcome(self) -> Outcome:
        outcome, engines = self.outcome, [replica.engine for replica in self.replicas]
        outcome.busy_by_replica = [replica.busy_seconds for replica in self.replicas]
        outcome.whole_seconds = self.last_end
        outcome.peak_tokens = max(engine.budget.peak for engine in engines)
        outcome.evicted_tokens = sum(engine.tree.evicted_tokens for engine in engines)
        outcome.preemptions = sum(engine.preemptions for engine in engines)
        outcome.steps = sum(engine.steps for engine in engines)
        outcome.events = sum(replica.events for replica in self.replicas)
        outcome.router_stats = self.routers[0].stats()
        return outcome
