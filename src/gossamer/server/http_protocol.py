"""Connections that do not become requests: bounded in time and in size."""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 * 2**10  # bytes of a request line with its headers


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's protocol, which closes idle connections between two requests, but not before the first one, and not in
    the middle of headers. As long as headers are incomplete, a connection has ``idle_timeout`` seconds in all."""

    idle_timeout = 60.0
    _timer: asyncio.TimerHandle | None = None
    _head = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._arm()

    def data_received(self, data: bytes) -> None:
        self._head += len(data)
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            return
        if self._head > MAX_HEAD:
            self.transport.close()
        elif self._timer is None:
            self._arm()

    def on_headers_complete(self) -> None:
        self._disarm()
        self._head = 0
        super().on_headers_complete()

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
        if self.transport is not None and not self.transport.is_closing():
            self.transport.close()
