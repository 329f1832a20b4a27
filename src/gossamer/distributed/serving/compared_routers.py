"""Other routers, to compare ours with: in turn, and the one that Ray has for language models."""

from __future__ import annotations

from typing import Any

from ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router import PrefixCacheAffinityRouter
from ray.serve.experimental.round_robin_router import RoundRobinRouter
from ray.serve.request_router import PendingRequest, ReplicaID, RunningReplica

from gossamer.distributed.serving.ray_router import LearnsReplicas


class InTurn(LearnsReplicas, RoundRobinRouter):
    """Ray's own round robin."""


class RaysPrefixRouter(LearnsReplicas, PrefixCacheAffinityRouter):
    """Ray's own rule, tree and defaults. Only where it finds the text, and hears what was routed, is ours.

    It learns of a request when Ray has sent it. The ingress asks for a replica first and sends a message later, and
    tells the fleet; the fleet tells the router.
    """

    def initialize_state(self, **settings: Any) -> None:
        super().initialize_state(**settings)
        self._pending: dict[str, PendingRequest] = {}
        self.fleet.on_routed = self._was_routed

    def _extract_text_from_request(self, pending_request: PendingRequest) -> str:
        return str(pending_request.kwargs["text"])

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is None or not pending_request.kwargs.get("text"):
            return [candidate_replicas]
        self._pending[pending_request.args[0]] = pending_request
        ranks: list[list[RunningReplica]] = await super().choose_replicas(candidate_replicas, pending_request)
        return ranks

    def _was_routed(self, lease_id: str, replica: str) -> None:
        pending = self._pending.pop(lease_id, None)
        if pending is not None:
            id = ReplicaID(replica, deployment_id=self._deployment_id)
            self.on_request_routed(pending, id, None)
