"""One request, passed on to a replica, and its answer, passed back as it comes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import aiohttp
from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from gossamer.distributed.serving import leases
from gossamer.distributed.serving.prompts import RoutedPrompt, draw_of
from gossamer.errors import GossamerError
from gossamer.server.errors import HttpError
from gossamer.server.forwarding import PassedOn, headers_back, headers_for

if TYPE_CHECKING:
    from gossamer.distributed.serving.ingress import Ingress, Lease

ATTEMPTS = 3
ELSEWHERE = (429, 503)  # what a replica says that is full, or ends


class Elsewhere(GossamerError):
    """The replica does not answer, and another may."""


class AnsweredByReplica(PassedOn):
    """See the module's documentation.

    As long as the client has had nothing, a request that a replica does not answer goes to another one, with the same
    random stream; after that, the answer ends with an error: two halves of different answers are none.

    Args:
        ingress: chooses replicas.
        request, body: what the client has sent.
        prompt: what routing knows of it.
    """

    def __init__(self, ingress: Ingress, request: Request, body: bytes, prompt: RoutedPrompt) -> None:
        super().__init__(ingress.options.request_timeout)
        self._ingress, self._request, self._body, self._prompt = ingress, request, body, prompt
        self._lost: list[str] = []  # replicas that did not answer
        self._lease: Lease | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        trace = self._ingress.trace if self._prompt.generates else None
        if trace is None:
            await super().__call__(scope, receive, send)
            return
        came, asked = trace.begin(), time.monotonic()
        try:
            await super().__call__(scope, receive, send)
        finally:
            trace.end(came, self._traced(asked))

    def _traced(self, asked: float) -> dict[str, Any] | None:
        """What a trace has of the request; nothing if it was not answered."""
        lease = self._lease
        if lease is None or not lease.usage or not lease.usage["completion_tokens"]:
            return None
        return {
            "chain": [f"{each:016x}" for each in self._prompt.chain],
            "prompt_bytes": self._prompt.size,
            "prompt_tokens": lease.usage["prompt_tokens"],
            "cached_tokens": lease.usage["prompt_tokens_details"]["cached_tokens"],
            "output_tokens": lease.usage["completion_tokens"],
            "ttft": round((lease.first_token_at or asked) - asked, 4),
            "replica": lease.replica,
        }

    async def _send(self, send: Send) -> None:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._ask(send, last=attempt == ATTEMPTS)
                return
            except Elsewhere as error:
                if self._begun:
                    raise _lost(f"{error}, in the middle of the answer; ask again") from None
        raise _lost(f"{len(self._lost)} replicas did not answer, one after the other; try again later")

    async def _ask(self, send: Send, last: bool) -> None:
        """Ask one replica.

        Raises:
            Elsewhere: it does not answer.
        """
        request = self._request
        async with self._ingress.lease(self._prompt, tuple(self._lost)) as lease:
            self._lease = lease
            headers = headers_for(request, self._ingress.settings.key)
            headers[leases.HEADER] = lease.id
            headers["x-gossamer-draw"] = str(draw_of(request.scope["gossamer.request_id"]))
            path, query = quote(request.scope["path"]), request.scope["query_string"].decode("latin-1")
            url = f"{lease.address}{path}{'?' if query else ''}{query}"
            try:
                async with self._ingress.client.request(
                    request.method, url, headers=headers, data=self._body or None, allow_redirects=False
                ) as response:
                    if response.status in ELSEWHERE and not last and len(self._ingress.fleet.replicas) > 1:
                        raise Elsewhere(f"a replica has answered {response.status}")
                    await self._pass_back(response, lease, send)
            except (aiohttp.ClientError, ConnectionError, TimeoutError) as error:
                self._lost.append(lease.replica)
                raise Elsewhere(f"a replica is gone ({type(error).__name__})") from None
            except Elsewhere:
                self._lost.append(lease.replica)
                raise
        # Only now: with the end of the answer the client counts as gone.
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass_back(self, response: aiohttp.ClientResponse, lease: Lease, send: Send) -> None:
        self._streamed = response.headers.get("content-type", "").startswith("text/event-stream")
        start = {"type": "http.response.start", "status": response.status}
        start["headers"] = headers_back(response.raw_headers)
        if not self._streamed:  # whole, so that what breaks on the way can be asked for elsewhere
            body = await response.read()
            lease.first_token()
            await send(start)
            self._begun = True
            await send({"type": "http.response.body", "body": body, "more_body": True})
            return
        async for part in response.content.iter_any():
            if not self._begun:
                lease.first_token()
                await send(start)
                self._begun = True
            self._told += part.count(b"\n\n")
            await send({"type": "http.response.body", "body": part, "more_body": True})


def _lost(message: str) -> HttpError:
    return HttpError(503, message, code="replica_lost", type="server_error", headers={"retry-after": "1"})
