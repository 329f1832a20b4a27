"""Connections to a running server, for what no HTTP client would send or wait for."""

from __future__ import annotations

import socket
from http.client import HTTPResponse

from running_server import Running

GET_HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


def connect(server: Running, data: bytes = b"", *, half_close: bool = False) -> socket.socket:
    """A connection over which ``data`` is sent, and then, if asked for, nothing more."""
    connection = socket.create_connection(server.address, timeout=60)
    connection.sendall(data)
    if half_close:
        connection.shutdown(socket.SHUT_WR)
    return connection


def post(path: str, body: bytes, *, length: int | None = None, version: str = "1.1") -> bytes:
    """A whole request, or one that says another length than it has."""
    size = len(body) if length is None else length
    head = f"POST {path} HTTP/{version}\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {size}\r\n\r\n".encode() + body


def chunked(path: str) -> bytes:
    """The head of a request whose body comes in chunks."""
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return f"{head}transfer-encoding: chunked\r\n\r\n".encode()


def status_of(connection: socket.socket) -> int:
    """Of the next answer, which is read whole."""
    with HTTPResponse(connection) as response:
        response.begin()
        response.read()
        return response.status


def everything(connection: socket.socket) -> bytes:
    """What comes until the other side closes."""
    received = b""
    while part := connection.recv(65536):
        received += part
    connection.close()
    return received


def closed(connection: socket.socket) -> bool:
    """Whether the other side closes it, within the timeout."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True
