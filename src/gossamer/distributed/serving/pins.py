"""Prefixes that stay in the caches of all replicas, those that begin later included."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import aiohttp

from gossamer.distributed.serving.fleet import Replica
from gossamer.server.errors import HttpError, not_found

if TYPE_CHECKING:
    from gossamer.distributed.serving.ingress import Ingress

logger = logging.getLogger("gossamer.server")
_COUNTS = (
    *("num_nodes", "running", "waiting", "kv_bytes", "kv_bytes_total", "prompt_tokens", "saved_tokens"),
    *("generated_tokens", "steps", "shared_steps"),
)


@dataclass
class _Pin:
    body: bytes  # of the request that has made it
    about: dict[str, Any]
    places: dict[str, str] = field(default_factory=dict)  # replica -> the prefix's id there


class Pins:
    """The prefixes that clients have pinned through one ingress.

    Args:
        ingress: knows the replicas.
    """

    def __init__(self, ingress: Ingress) -> None:
        self._ingress = ingress
        self._pins: dict[str, _Pin] = {}

    async def add(self, body: bytes, content_type: str) -> tuple[int, dict[str, Any]]:
        """Pin on all replicas, or on none. Returns the status and the body of the answer."""
        replicas = self._ingress.fleet.replicas
        asked = await asyncio.gather(*(self._post(each, body, content_type) for each in replicas))
        refusals = [answer for answer in asked if answer[0] != 200]
        places = {
            each.id: answer["id"] for each, (status, answer) in zip(replicas, asked, strict=True) if status == 200
        }
        if refusals:
            await self._unpin(places)
            return refusals[0]
        known = next((id for id, pin in self._pins.items() if pin.places == places), None)
        id = known or f"prefix-{uuid.uuid4().hex}"
        about = asked[0][1] | {"id": id, "replicas": len(replicas)}
        self._pins[id] = _Pin(body, about, places)
        return 200, about

    async def restore(self, replica: Replica) -> None:
        """Pin what is pinned on a replica that has just begun."""
        for pin in self._pins.values():
            if replica.id not in pin.places:
                status, answer = await self._post(replica, pin.body, "application/json")
                if status == 200:
                    pin.places[replica.id] = answer["id"]
                else:
                    logger.error("a prefix could not be pinned on a new replica: %s", answer)

    async def remove(self, id: str) -> None:
        """Unpin everywhere.

        Raises:
            HttpError: it is not pinned.
        """
        pin = self._pins.pop(id, None)
        if pin is None:
            raise not_found(f"no prefix {id[:80]!r} is pinned", "prefix_id")
        await self._unpin(pin.places)

    async def _unpin(self, places: dict[str, str]) -> None:
        there = [(each, places[each.id]) for each in self._ingress.fleet.replicas if each.id in places]
        await asyncio.gather(*(self._ask("DELETE", each, f"/v1/prefixes/{id}") for each, id in there))

    async def picture(self) -> dict[str, Any]:
        """As of ``gossamer serve``: sums over replicas, and their nodes, each with the tag of its replica."""
        replicas = self._ingress.fleet.replicas
        answers = await asyncio.gather(*(self._ask("GET", each, "/v1/prefixes") for each in replicas))
        pictures = [
            (each.tag, answer) for each, (status, answer) in zip(replicas, answers, strict=True) if status == 200
        ]
        nodes: list[dict[str, Any]] = []
        for place, (tag, picture) in enumerate(pictures):
            for node in picture["nodes"]:
                own = {name: _apart(node.get(name), place, len(pictures)) for name in ("id", "parent")}
                nodes.append(node | own | {"replica": tag})
        return {
            "object": "list",
            "data": [pin.about for pin in self._pins.values()],
            "nodes": nodes,
            **{name: sum(picture.get(name) or 0 for _, picture in pictures) for name in _COUNTS},
            "disk": None,
            "replicas": [{"tag": tag} | {name: picture.get(name) for name in _COUNTS} for tag, picture in pictures],
        }

    async def _post(self, replica: Replica, body: bytes, content_type: str) -> tuple[int, dict[str, Any]]:
        return await self._ask("POST", replica, "/v1/prefixes", body, content_type)

    async def _ask(
        self,
        method: str,
        replica: Replica,
        path: str,
        body: bytes | None = None,
        content_type: str = "application/json",
    ) -> tuple[int, dict[str, Any]]:
        """What a replica answers; one that is gone has nothing pinned any more, which is as good as a refusal."""
        headers = {"authorization": f"Bearer {self._ingress.settings.key}", "content-type": content_type}
        try:
            async with self._ingress.client.request(
                method, replica.address + path, headers=headers, data=body
            ) as response:
                return response.status, json.loads(await response.read())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            lost = HttpError(503, f"a replica does not answer: {error!r}", code="replica_lost", type="server_error")
            return 503, {"error": {"message": str(lost), "type": lost.type, "param": None, "code": lost.code}}


def _apart(number: int | None, place: int, count: int) -> int | None:
    """A node's number among those of all replicas."""
    return None if number is None else number * count + place
