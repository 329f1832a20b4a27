"""Connections: bounded in time and in size, clients that say no more, clients of HTTP/1.0."""

from __future__ import annotations

import asyncio
import functools
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MAX_HEAD = 64 * 2**10  # bytes of a request line with its headers, or between two pieces of a body
MAX_PIPELINED = 16  # requests that wait for the answer to the one before them
MAX_UNREAD = 64 * 2**20  # bytes of a body that come after the answer
PROBE_SECONDS = 5.0  # until a client that says no more is asked whether it listens


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, and beyond it:

    - The head of a request has ``idle_timeout`` seconds and :data:`MAX_HEAD` bytes, wherever it begins. uvicorn closes
      connections that are idle between two requests, but not those that are before the first one, or within headers.
    - A chunked body brings more than the body: extensions of its chunks, and trailers, which nobody here reads. They
      are dropped, and bounded like a head. What comes of a body once it is answered has the same time and
      :data:`MAX_UNREAD` bytes. Requests behind one that is being answered are bounded by number.
    - A client that has closed its half of the connection gets its answer. It looks like one that is gone, until
      something is sent: a stream does so anyway; before the status, an interim response 100 does (RFC 9110, 15.2: any
      client of HTTP/1.1 skips it), and the connection of a client that is gone then breaks.
    - A client of HTTP/1.0 gets bodies without chunks, which the connection's end ends.
    """

    idle_timeout = 60.0
    _probe: asyncio.TimerHandle | None = None
    _timer: asyncio.TimerHandle | None = None
    _reading_head = True
    _reading_message = False  # from the end of a head to the end of its body
    _unaccounted = 0  # bytes that came since something whole did: a head, a piece of a body, a body
    _unread = 0

    # asyncio declares a BaseTransport and gives a Transport, as uvicorn's own signature says
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._unaccounted += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._unaccounted > MAX_HEAD or self._unread > MAX_UNREAD or len(self.pipeline) > MAX_PIPELINED:
            self.transport.close()
        elif self._reading_head and self._timer is None and self._unaccounted:
            self._arm()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._reading_head:  # otherwise it is a trailer
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._disarm()
        self._reading_head, self._reading_message, self._unaccounted = False, True, 0
        if len(self.pipeline) <= MAX_PIPELINED:  # the connection is closed as soon as its data are read
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unaccounted = 0
        if self.cycle.response_complete:
            self._unread += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._disarm()
        self._reading_head, self._reading_message, self._unaccounted, self._unread = True, False, 0, 0
        super().on_message_complete()

    def eof_received(self) -> bool:  # type: ignore[override]  # uvicorn's never keeps the connection
        cycle = self.cycle
        if cycle is None or cycle.response_complete or cycle.more_body:
            return False  # nothing to answer, or not all of the question: asyncio closes
        cycle.keep_alive = False
        self._probe = self.loop.call_later(PROBE_SECONDS, self._ask_whether_it_listens)
        return True

    def _ask_whether_it_listens(self) -> None:
        begun = self.cycle.response_started or bool(self.pipeline)
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if not begun and self.cycle.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._probe = self.loop.call_later(PROBE_SECONDS, self._ask_whether_it_listens)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        if cycle.scope["http_version"] == "1.0":
            app = functools.partial(_until_the_end, cycle, app)
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading_message and self._timer is None and not self.pipeline:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        if self._probe is not None:
            self._probe.cancel()
        super().connection_lost(exc)

    def _arm(self) -> None:
        self._timer = self.loop.call_later(self.idle_timeout, self._expire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        answering = self.cycle is not None and not self.cycle.response_complete
        if not answering and self.transport is not None and not self.transport.is_closing():
            self.transport.close()


async def _until_the_end(cycle: RequestResponseCycle, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
    """Run ``app`` for a client that knows no chunks: where no length is given, the connection's end is the body's."""
    endless = False

    async def send_without_chunks(message: Message) -> None:
        nonlocal endless
        if message["type"] == "http.response.start":
            endless = all(name.lower() != b"content-length" for name, _ in message.get("headers", ()))
            if endless:
                cycle.chunked_encoding = False
        elif endless:
            cycle.expected_content_length = len(message.get("body", b""))  # of what is sent now; uvicorn counts
        await send(message)

    await app(scope, receive, send_without_chunks)
