"""Connections that do not become requests, or send more than their requests: bounded in time and in size."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 2**10  # bytes of a request line with its headers, or between two pieces of a body
MAX_PIPELINED = 16  # requests that wait for the answer to the one before them
MAX_UNREAD = 64 * 2**20  # bytes of a body that come after the answer


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes connections that are idle between two requests, but not those that are before
    the first one, or in the middle of headers. Here the head of a request has ``idle_timeout`` seconds and
    :data:`MAX_HEAD` bytes, wherever it begins.

    A chunked body brings more than the body: extensions of its chunks, and trailers, which nobody here reads. They are
    dropped, and bounded like a head. What comes of a body once it is answered has the same time and
    :data:`MAX_UNREAD` bytes. Requests behind one that is being answered are bounded by number.
    """

    idle_timeout = 60.0
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

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._reading_message and self._timer is None and not self.pipeline:
            self._arm()

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
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
