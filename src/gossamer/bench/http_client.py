"""A client that costs little: HTTP/1.1 over one connection, and the events of its streams.

It shares its processor with the server that it measures, so it does no more than it must: httptools splits responses,
and what arrives goes into a callback as it is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import httptools

from gossamer.errors import ConfigurationError

_READ = 2**16


@dataclass(frozen=True)
class Address:
    """Where a server listens; ``path`` goes before the paths of all requests."""

    host: str
    port: int
    path: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """``"http://127.0.0.1:8000"``, with or without the ``/v1`` that clients of OpenAI's API are given.

        Raises:
            ConfigurationError: it is no such address.

        >>> Address.parse("http://127.0.0.1:8000/v1")
        Address(host='127.0.0.1', port=8000, path='')
        """
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigurationError(f"{url!r} is no address: {error}") from None
        if parts.scheme != "http" or not host:
            raise ConfigurationError(f"a server's address is such as http://127.0.0.1:8000, got {url!r}")
        return cls(host, port or 80, parts.path.rstrip("/").removesuffix("/v1"))


@dataclass
class Response:
    """What came back: the status, and the body unless a callback took it."""

    status: int
    body: bytes


class Connection:
    """A connection that is opened by the first request, and kept as long as the server keeps it. One request at a time.

    Args:
        address: of the server.
        timeout: seconds that a request may take in all.

    Attributes:
        opened: how many times it had to be opened.
    """

    def __init__(self, address: Address, timeout: float) -> None:
        self._address = address
        self._timeout = timeout
        self.opened = 0
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def request(
        self, method: str, path: str, body: bytes = b"", on_body: Callable[[bytes], None] | None = None
    ) -> Response:
        """Send a request and read its response. ``on_body`` gets the body of one with status 200, piece by piece.

        Where a kept connection turns out to be closed before anything came back, the request goes through another one:
        servers may close connections between two requests, and some do so after every stream.

        Raises:
            TimeoutError: it took too long.
            OSError: there is no connection, or it ended before the response did.
            httptools.HttpParserError: what came is no response.
        """
        message = self._head(method, path, len(body)) + body
        try:
            async with asyncio.timeout(self._timeout):
                kept, incoming = self._reader is not None, _Incoming(on_body)
                try:
                    await self._exchange(message, incoming)
                except ConnectionError:
                    if not kept or incoming.begun:
                        raise
                    self.close()
                    await self._exchange(message, incoming)
        except BaseException:  # also if it is cancelled: the rest would be taken for the next response
            self.close()
            raise
        if not incoming.keep_alive:
            self.close()
        return Response(incoming.parser.get_status_code(), bytes(incoming.body))

    async def _exchange(self, message: bytes, incoming: _Incoming) -> None:
        if self._reader is None or self._writer is None:
            self._reader, self._writer = await asyncio.open_connection(self._address.host, self._address.port)
            self.opened += 1
        self._writer.write(message)
        await self._writer.drain()
        await incoming.read(self._reader)

    def close(self) -> None:
        """Drop the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    def _head(self, method: str, path: str, length: int) -> bytes:
        host = f"[{self._address.host}]" if ":" in self._address.host else self._address.host
        return (
            f"{method} {self._address.path}{path} HTTP/1.1\r\nhost: {host}:{self._address.port}\r\n"
            f"content-type: application/json\r\ncontent-length: {length}\r\n\r\n"
        ).encode()


class _Incoming:
    """A response while it arrives; httptools calls the methods ``on_...``."""

    def __init__(self, on_body: Callable[[bytes], None] | None) -> None:
        self.parser = httptools.HttpResponseParser(self)
        self.body = bytearray()
        self.begun = False
        self.keep_alive = False
        self._take = on_body
        self._bounded = False  # the head tells where the body ends; otherwise it ends with the connection
        self._complete = False

    async def read(self, reader: asyncio.StreamReader) -> None:
        while not self._complete:
            data = await reader.read(_READ)
            if data:
                self.begun = True
                self.parser.feed_data(data)
            elif self._bounded or self.parser.get_status_code() == 0:
                raise ConnectionResetError("the connection ended before the response did")
            else:
                return

    def on_header(self, name: bytes, value: bytes) -> None:
        self._bounded = self._bounded or name.lower() in (b"content-length", b"transfer-encoding")

    def on_body(self, data: bytes) -> None:
        if self._take is not None and self.parser.get_status_code() == 200:
            self._take(data)
        else:
            self.body += data

    def on_message_complete(self) -> None:
        self._complete = True
        self.keep_alive = self.parser.should_keep_alive()  # afterwards the parser has forgotten the head


@dataclass
class EventSplitter:
    """Takes a stream of server-sent events apart, wherever it was cut.

    >>> splitter = EventSplitter()
    >>> splitter.feed(b'data: {"a"'), splitter.feed(b': 1}\\n'), splitter.feed(b'\\n: a comment\\n\\ndata: [DO')
    ([], [], [b'{"a": 1}'])
    >>> splitter.feed(b'NE]\\n\\n')
    [b'[DONE]']
    """

    _rest: bytes = b""
    _lines: list[bytes] = field(default_factory=list)

    def feed(self, data: bytes) -> list[bytes]:
        """The data of the events that are complete now."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._lines.append(line[5:].removeprefix(b" "))
            elif not line and self._lines:
                events.append(b"\n".join(self._lines))
                self._lines = []
        return events
