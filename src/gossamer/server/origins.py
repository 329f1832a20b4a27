"""Which web pages may use the server through the browsers of people who can reach it.

A browser sends a page's requests wherever the page likes, with two exceptions that the server decides about itself:
what reads an answer, and what is not a plain form, is asked for first (CORS). An upload is a plain form. And a page may
have its own name resolve to 127.0.0.1 (DNS rebinding): then the browser takes the server for the page's own.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gossamer.server.errors import HttpError, error_response

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_LOCAL = ("localhost", "127.0.0.1", "::1")


class Origins:
    """Refuses requests that a browser makes for a page of another origin, or under a name that is not the server's.

    Args:
        hosts: the names that ``Host`` may give, without ports; ``None`` takes any.
        allowed_origins: pages of these origins may; ``*`` is all of them.
    """

    def __init__(self, app: ASGIApp, *, hosts: frozenset[str] | None, allowed_origins: tuple[str, ...]) -> None:
        self.app = app
        self.hosts = hosts
        self.allowed_origins = allowed_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            error = self._foreign_host(headers) or self._foreign_page(scope["method"], headers)
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def _foreign_host(self, headers: Headers) -> HttpError | None:
        if self.hosts is None:
            return None
        unknown = [host for host in headers.getlist("host") if _name(host) not in self.hosts]
        if not unknown:
            return None
        return HttpError(
            403, f"this server is not {unknown[0]!r}; --allowed-host gives it a name", code="host_not_allowed"
        )

    def _foreign_page(self, method: str, headers: Headers) -> HttpError | None:
        """Browsers say where a request comes from, and do not let pages say otherwise."""
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if method in _SAFE or origin in self.allowed_origins or "*" in self.allowed_origins:
            return None
        if site is not None:
            foreign = site not in ("same-origin", "none")
        else:  # an older browser, or no browser
            foreign = origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower()
        if not foreign:
            return None
        message = f"web pages of {origin or 'another site'} may not use this server; --allowed-origin lets them"
        return HttpError(403, message, code="origin_not_allowed")


def server_hosts(host: str, allowed: tuple[str, ...]) -> frozenset[str] | None:
    """The names of a server that listens on ``host``; ``None`` if any will do.

    A server that only this machine can reach has the names of this machine. Others are known under names that they
    cannot know.

    >>> sorted(server_hosts("127.0.0.1", ("ai.example.org",)))
    ['127.0.0.1', '::1', 'ai.example.org', 'localhost']
    >>> server_hosts("0.0.0.0", ()) is None
    True
    """
    if "*" in allowed or (not allowed and not is_local(host)):
        return None
    return frozenset({*_LOCAL, host.lower(), *(_name(each) for each in allowed)})


def is_local(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _name(host: str) -> str:
    """A host without its port and brackets, as names are compared."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return (host if host.count(":") > 1 else host.partition(":")[0]).lower().rstrip(".")
