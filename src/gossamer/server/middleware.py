"""What every request goes through, outermost first: its id and its line in the log, limits, the key."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import re
import time
import uuid
from contextlib import suppress

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gossamer.server.errors import HttpError, error_response

access = logging.getLogger("gossamer.access")
errors = logging.getLogger("gossamer.server")
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
DISCARDED = 64 * 2**20  # bytes of a body that is too large which are read and dropped
_CLOSE = {"connection": "close"}  # what is left of the body would be taken for the next request
_POLLED = frozenset({"/health", "/metrics", "/v1/prefixes"})  # they would fill the log
_SAFE = [
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
]


class RequestLog:
    """Gives each request an id (the client's ``X-Request-Id`` if it has one), and writes a line when it has ended."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope["gossamer.request_id"] = request_id
        start = time.perf_counter()
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in _SAFE:
                    headers[name] = value
            await send(message)

        try:
            await self.app(scope, receive, send_with_id)
        except Exception as error:  # the last place where it can become an answer; the log has it whole
            errors.exception("internal error", extra={"request_id": request_id})
            scope["gossamer.error"] = repr(error)
            if status == 0:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            client = scope.get("client") or ("-", 0)
            seconds = round(time.perf_counter() - start, 4)
            fields = {
                "request_id": request_id,
                "client": client[0],
                "method": scope["method"],
                "path": scope.get("raw_path", b"").decode("latin-1"),  # decoded, it may hold line breaks
                "status": scope.get("gossamer.status", status),
                "seconds": seconds,
            }
            if "gossamer.error" in scope:
                fields["error"] = scope["gossamer.error"]
            asked_again_and_again = scope["method"] == "GET" and scope["path"] in _POLLED and fields["status"] == 200
            level = logging.DEBUG if asked_again_and_again else logging.INFO
            line = "%s %s %s %.3f s"
            access.log(level, line, fields["method"], fields["path"], fields["status"], seconds, extra=fields)


class Limits:
    """Bounds the size of bodies, and the time until the next part of one arrives.

    Args:
        max_body: bytes; ``max_file`` under ``/v1/files``.
        idle_timeout: seconds between two parts of a body.
    """

    def __init__(self, app: ASGIApp, *, max_body: int, max_file: int, idle_timeout: float) -> None:
        self.app = app
        self.max_body, self.max_file, self.idle_timeout = max_body, max_file, idle_timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.max_file if scope["path"] == "/v1/files" else self.max_body
        length = Headers(scope=scope).get("content-length", "0")
        if not length.isdecimal() or int(length) > limit + DISCARDED:
            await error_response(_too_large(limit))(scope, receive, send)
            return
        received, more = 0, True

        async def next_part() -> Message:
            nonlocal received, more
            try:
                async with asyncio.timeout(self.idle_timeout):
                    message = await receive()
            except TimeoutError:
                raise HttpError(408, "the body took too long to arrive", code="timeout", headers=_CLOSE) from None
            received += len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)
            return message

        async def receive_bounded() -> Message:
            if not more:  # what comes now is the end of the connection
                return await receive()
            message = await next_part()
            if received > limit:
                with suppress(HttpError):
                    while more and received <= limit + DISCARDED:  # many clients read only once they have written
                        await next_part()
                raise _too_large(limit)
            return message

        await self.app(scope, receive_bounded, send)


def _too_large(limit: int) -> HttpError:
    message = f"the body is larger than the {limit} bytes this server takes"
    return HttpError(413, message, code="body_too_large", headers=_CLOSE)


class ApiKeys:
    """Refuses requests without one of the keys, but for those paths that say nothing of anybody.

    Args:
        keys: none lets everybody in.
        page: paths of the page that asks for the key.
        behind_front: whoever has a key says whose request it is.
    """

    OPEN = frozenset({"/health", "/version", "/openapi.json"})

    def __init__(
        self, app: ASGIApp, *, keys: tuple[str, ...], page: frozenset[str] = frozenset(), behind_front: bool = False
    ) -> None:
        self.app, self.behind_front = app, behind_front
        self.open = self.OPEN | page
        self.digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and self.digests and scope["path"] not in self.open:
            headers = Headers(scope=scope)
            kind, _, key = headers.get("authorization", "").partition(" ")
            given = [headers.get("x-api-key", ""), key.strip() if kind.lower() == "bearer" else ""]
            known = [each for each in map(self._known, given) if each]
            if not known:
                error = HttpError(
                    401,
                    "this server needs an API key: send it as Authorization: Bearer KEY, or as x-api-key: KEY",
                    code="invalid_api_key",
                    headers={"www-authenticate": "Bearer"},
                )
                await error_response(error)(scope, receive, send)
                return
            scope["gossamer.owner"] = headers.get("x-gossamer-owner", "") if self.behind_front else known[0]
        await self.app(scope, receive, send)

    def _known(self, key: str) -> str:
        """The digest of a key, as text, if it is one of the server's; otherwise nothing."""
        # Digests have one length, and all of them are compared: the time tells nothing about any key.
        given = hashlib.sha256(key.encode("latin-1")).digest()  # the bytes of the header
        return given.hex() if sum(hmac.compare_digest(given, each) for each in self.digests) else ""
