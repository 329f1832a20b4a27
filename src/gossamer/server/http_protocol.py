"""Connections that do not become requests: bounded in time and in size."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 2**10  # bytes of a request line with its headers


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes connections that are idle between two requests, but not those that are before
    the first one, or in the middle of headers. Here the head of a request has ``idle_timeout`` seconds and
    :data:`MAX_HEAD` bytes, wherever it begins.
    """

    idle_timeout = 60.0
    _timer: asyncio.TimerHandle | None = None
    _reading_head = True
    _head = 0

    # asyncio declares a BaseTransport and gives a Transport, as uvicorn's own signature says
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._head += len(data) if self._reading_head else 0
        super().data_received(data)
        if not self._reading_head or self.transport.is_closing():
            return
        if self._head > MAX_HEAD:
            self.transport.close()
        elif self._timer is None and self._head:
            self._arm()

    def on_headers_complete(self) -> None:
        self._disarm()
        self._reading_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._reading_head, self._head = True, 0
        super().on_message_complete()

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
