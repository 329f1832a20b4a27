"""Reading bodies and sending answers, beyond what the framework does."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from gossamer.errors import GossamerError, RequestError
from gossamer.protocol.decoding import SHORT, InvalidJsonError, decode_json
from gossamer.protocol.fields import parse_fields
from gossamer.server.errors import HttpError, describe, error_response, timed_out

logger = logging.getLogger("gossamer.server")
T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
CLIENT_GONE = 499  # nobody sees it but the log


class Disconnected(Exception):
    """The client has closed the connection."""


async def read_body(request: Request, parse: Callable[[Any], T]) -> T:
    """What ``parse`` makes of the request's JSON. A long body is read in a thread: others need not wait for it.

    Raises:
        HttpError: it is not said to be JSON.
        RequestError: it is no JSON, or ``parse`` refuses it.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # Web pages may send other types anywhere without asking first.
        raise HttpError(415, f"content-type must be application/json, got {kind!r}", code="unsupported_media_type")
    raw = await request.body()

    def read() -> T:
        try:
            value = decode_json(raw, "the body")
        except InvalidJsonError as error:
            raise RequestError(str(error)) from None
        return parse(value)

    if len(raw) <= SHORT:
        return read()
    return await asyncio.get_running_loop().run_in_executor(request.app.state.service.bodies, read)


async def read_form(request: Request) -> FormData:
    """The form of an upload: one file, and a few fields in UTF-8.

    Raises:
        RequestError: it is no ``multipart/form-data``, or has more in it.
    """
    kind, parameters = parse_options_header(request.headers.get("content-type", ""))
    if kind != b"multipart/form-data" or b"boundary" not in parameters:
        raise RequestError("send the file as multipart/form-data, with a boundary", param="file")
    # Of the parameters, the boundary alone is passed on: a charset would name any of Python's codecs.
    boundary = parameters[b"boundary"].decode("latin-1").replace("\\", "\\\\").replace('"', '\\"')
    headers = Headers({"content-type": f'multipart/form-data; boundary="{boundary}"'})
    try:
        async with aclosing(request.stream()) as stream:
            return await MultiPartParser(headers, stream, max_files=1, max_fields=8).parse()
    except MultiPartException as error:
        raise RequestError(error.message) from None


def parse_body(model: type[M], body: Any) -> M:
    """``body`` as ``model``.

    Raises:
        RequestError: a field is missing, unknown or of the wrong type; ``param`` names it.
    """
    return parse_fields(model, body)


async def while_connected(receive: Receive, work: Awaitable[T], timeout: float) -> T:
    """What ``work`` returns, unless the client goes or the time is over first; then it is cancelled.

    Raises:
        Disconnected, HttpError
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, watch), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Disconnected if watch.done() else timed_out(timeout)
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Events(Protocol):
    """The events of an answer, as bytes, and those that end it where it cannot go on."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    def failed(self, error: dict[str, Any], status: int) -> Iterable[bytes]: ...


class EventStream(Response):
    """A response of server-sent events. What fails before the first event gets a status of its own.

    Args:
        events: a block in which the events can be read.
        timeout: seconds until the stream is given up.
        headers: more of them.
    """

    def __init__(
        self,
        events: Callable[[], AbstractAsyncContextManager[Events]],
        *,
        timeout: float,
        headers: Mapping[str, str],
    ) -> None:
        super().__init__()
        self._more_headers = [(name.encode(), value.encode("latin-1", "replace")) for name, value in headers.items()]
        self._events = events
        self._timeout = timeout
        self._begun: Events | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._send(send), self._timeout)
        except Disconnected:
            scope["gossamer.status"] = CLIENT_GONE
        except Exception as error:  # a stream that has begun can only end with an event that says so
            if self._begun is None:
                if not isinstance(error, GossamerError):
                    raise
                await error_response(error)(scope, receive, send)
                return
            scope["gossamer.error"] = str(error)
            if not isinstance(error, GossamerError):
                logger.exception("a stream failed", extra={"request_id": scope.get("gossamer.request_id")})
            status, body, _ = describe(error)
            last = b"".join(self._begun.failed(body, status))
            await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _send(self, send: Send) -> None:
        async with self._events() as events:
            async for each in events:
                if self._begun is None:
                    self._begun = events
                    headers = [*_STREAM_HEADERS, *self._more_headers]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                await send({"type": "http.response.body", "body": each, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the events otherwise
]


def client_gone() -> JSONResponse:
    """For a client that will not read it."""
    return JSONResponse(None, CLIENT_GONE)
