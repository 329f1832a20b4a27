"""Our rule of routing as Ray Serve asks for one. Its interface is alpha: this is the only file that knows it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from gossamer.distributed.serving.fleet import Fleet, Replica, fleet_of

logger = logging.getLogger("gossamer.server")


class LearnsReplicas(RequestRouter):
    """Tells the ingress of the replicas, as Ray tells its router."""

    fleet: Fleet

    def initialize_state(self, **settings: Any) -> None:
        self.fleet = fleet_of(str(self._deployment_id.app_name))
        super().initialize_state(**settings)

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        super().update_replicas(replicas)
        try:
            self._learn(replicas)
        except Exception:  # routing goes on with what was known; Ray would only log it, and hang
            logger.exception("the replicas are not known")

    def _learn(self, replicas: list[RunningReplica]) -> None:
        known, reports = [], {}
        for each in replicas:
            about: Mapping[str, Any] = each.replica_metadata or {}
            if "address" not in about:
                continue  # it has only just begun
            id = each.replica_id.unique_id
            known.append(Replica(id, str(about["address"]), str(about["tag"]), float(about["speed"])))
            if (stats := each.routing_stats) and self.fleet.is_one_of_several:
                reports[id] = (int(stats.get("running", 0)), int(stats.get("queued", 0)))
        self.fleet.update(known, reports)

    def on_replica_actor_died(self, replica_id: Any) -> None:
        super().on_replica_actor_died(replica_id)
        self.fleet.dead(replica_id.unique_id)


class PrefixRequestRouter(LearnsReplicas):
    """Ranks replicas for calls of :meth:`~gossamer.distributed.serving.engine_replica.EngineReplica.hold`.

    The arguments of a call say what it is for: ``(lease_id, chain, size)``; the keywords ``only`` and ``avoid`` narrow
    the choice. Inside a rank Ray takes the replica with the shortest queue.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None:
            return [candidate_replicas]
        # where all are full, wait before asking again
        pending_request.routing_context.should_backoff = True
        try:
            return self._ranked(candidate_replicas, pending_request)
        except Exception:  # whatever it is: without an answer the request would wait for ever
            logger.exception("a request cannot be ranked")
            return [candidate_replicas]

    def _ranked(self, candidates: list[RunningReplica], pending: PendingRequest) -> list[list[RunningReplica]]:
        lease_id, chain, size = pending.args[:3]
        only, avoid = pending.kwargs.get("only"), pending.kwargs.get("avoid", ())
        by_id = {each.replica_id.unique_id: each for each in candidates}
        if only in by_id:
            return [[by_id[only]]]
        ranks = self.fleet.rank(lease_id, chain, size, by_id, avoid)
        return [[by_id[id] for id in rank] for rank in ranks]
