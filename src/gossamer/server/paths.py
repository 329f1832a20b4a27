"""The forms of a path that clients make out of a base URL: all of them mean one route."""

from __future__ import annotations

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Receive, Scope, Send

_SLASHES = re.compile("/{2,}")


class Paths:
    """Gives requests the path of their route: with ``/v1``, and without slashes that are one too many.

    Base URLs are configured with and without ``/v1``, and with and without a slash at the end. A redirect would do for
    some clients; others do not send a body twice.

    Args:
        routes: paths of all routes.

    >>> Paths(None, routes=["/health", "/v1/models", "/v1/models/{model}"]).of_route("//models/tiny/")
    '/v1/models/tiny'
    """

    def __init__(self, app: ASGIApp, *, routes: Iterable[str]) -> None:
        self.app = app
        self._versioned = {route.split("/")[2] for route in routes if route.startswith("/v1/")}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope["path"] = self.of_route(scope["path"])
        await self.app(scope, receive, send)

    def of_route(self, path: str) -> str:
        """The path that routes know."""
        path = _SLASHES.sub("/", path).rstrip("/") or "/"
        return f"/v1{path}" if path.split("/")[1] in self._versioned else path
