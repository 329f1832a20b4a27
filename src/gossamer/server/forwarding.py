"""What a server does that stands in front of others of ours: which headers it passes on, and how broken streams end."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from gossamer.errors import GossamerError
from gossamer.protocol import BODIES
from gossamer.protocol.streaming import DONE, event
from gossamer.server.errors import describe, error_response
from gossamer.server.http import CLIENT_GONE, Disconnected, while_connected

# Of one connection: RFC 9110, 7.6.1. `date` is written anew.
_OF_HOP = {
    "connection",
    "keep-alive",
    "proxy-authenticate",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "date",
}
# Of a request, these are not the other server's business besides.
_OWN = _OF_HOP | {
    "proxy-authorization",
    "authorization",
    "x-api-key",
    "x-gossamer-owner",
    "x-gossamer-draw",
    "host",
    "content-length",
    "expect",
    "origin",
}


def headers_for(request: Request, key: str) -> dict[str, str]:
    """The headers with which a request is passed on to a server that has this key, and is ``behind_front``."""
    headers = {name: value for name, value in request.headers.items() if name not in _OWN}
    headers["authorization"] = f"Bearer {key}"
    headers["x-request-id"] = request.scope["gossamer.request_id"]
    headers["x-gossamer-owner"] = request.scope.get("gossamer.owner", "")
    return headers


def headers_back(raw: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that are passed on to the client."""
    return [(name, value) for name, value in raw if name.decode("latin-1").lower() not in _OF_HOP]


class PassedOn(Response):
    """The answer of another server, passed on as it comes. Subclasses ask for it.

    Args:
        timeout: seconds until it is given up.
    """

    def __init__(self, timeout: float) -> None:
        super().__init__()
        self._timeout = timeout
        self._begun = self._streamed = False
        self._told = 0  # events that the client has had

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send), self._timeout)
        except Disconnected:
            scope["gossamer.status"] = CLIENT_GONE
        except GossamerError as error:
            scope["gossamer.error"] = str(error)
            if not self._begun:
                await error_response(error)(scope, receive, send)
            elif self._streamed:
                last = end_of_broken_stream(scope["path"], error, self._told)
                await send({"type": "http.response.body", "body": last, "more_body": False})
            else:
                raise  # the connection breaks, as the other server's has

    @abstractmethod
    async def _send(self, send: Send) -> None:
        """Ask, and send what comes back.

        Raises:
            GossamerError: there is no answer, or no more of it.
        """


def end_of_broken_stream(path: str, error: Exception, told: int) -> bytes:
    """The last events for a client whose stream cannot go on, in the form of the endpoint.

    Args:
        path: of the request.
        error: what has happened.
        told: events that it has had.
    """
    status, body, _ = describe(error)
    kind = BODIES.get(path)
    return event(body) + DONE if kind is None else kind.broken(body, status, told)
