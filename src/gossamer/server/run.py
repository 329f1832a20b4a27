"""Runs the application in this process until it is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from types import FrameType
from typing import Protocol

import uvicorn
from fastapi import FastAPI

from gossamer.errors import ConfigurationError
from gossamer.server.http_protocol import BoundedProtocol
from gossamer.server.logs import configure_logs
from gossamer.server.options import ServerOptions
from gossamer.server.origins import is_local

logger = logging.getLogger("gossamer.server")
GRACE = 5.0  # seconds to tell the clients that time is over


class Life(Protocol):
    """What is behind an application, as its ``app.state.service``: a model, or several.

    Attributes:
        state, reason: how it is, and why it is not ready.
        loading: whether a model is being loaded.
        loaded, failed: set once it is ready; and once it cannot go on, which ends the server.
    """

    state: str
    reason: str
    loaded: asyncio.Event
    failed: asyncio.Event

    @property
    def loading(self) -> bool: ...

    def drain(self) -> None: ...

    async def stop(self) -> None: ...


def serve(app: FastAPI, options: ServerOptions, on_ready: Callable[[str], None] = lambda address: None) -> int:
    """Serve until SIGTERM or SIGINT, then finish what is running.

    Args:
        app: of :func:`~gossamer.server.create_app` or :func:`~gossamer.server.create_front`, with these options.
        options: see there.
        on_ready: called with the server's address once requests are answered.

    Returns:
        The exit status: 0, or 1 after a failure.
    """
    configure_logs(as_json=options.json_logs)
    _raise_file_limit()
    # uvicorn raises the signal again once it has ended; by then everything is done.
    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda number, frame: None)
    if not options.api_keys and not is_local(options.host):
        logger.warning("listening on %s without an API key: whoever reaches it may use it", options.host)
    sockets = [listen(options.host, options.port)]
    server = make_server(app, options, on_ready)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server.serve(sockets))
    status = 1 if server.failed else 0
    if server.ended_early:  # a thread may still read a model, which cannot be interrupted
        os._exit(status)
    return status


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """The socket, before a model is loaded for it.

    Args:
        shared: several processes listen at this address, all of them so; each gets some of the connections.

    Raises:
        ConfigurationError: the address is taken, or is none of this machine's.
    """
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if shared:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise ConfigurationError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
    return listening


def make_server(app: FastAPI, options: ServerOptions, on_ready: Callable[[str], None] = lambda address: None) -> Server:
    """The server, not yet running."""
    protocol = type("Protocol", (BoundedProtocol,), {"idle_timeout": options.idle_timeout})
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        http=protocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=round(options.idle_timeout),
        timeout_graceful_shutdown=round(options.drain_timeout + GRACE),
    )
    return Server(config, options, on_ready)


class Server(uvicorn.Server):
    """Tells the service when the end comes, and ends when the service has failed.

    Attributes:
        address: ``http://host:port`` once it listens.
        failed: whether it ended by itself.
        ended_early: whether it ended while a model was being loaded.
    """

    def __init__(self, config: uvicorn.Config, options: ServerOptions, on_ready: Callable[[str], None]) -> None:
        super().__init__(config)
        self.options = options
        self._on_ready = on_ready
        self.address = ""
        self.failed = self.ended_early = False

    @property
    def service(self) -> Life:
        # uvicorn allows the name of an application too; we give it the application
        service: Life = self.config.app.state.service  # type: ignore[union-attr]  # see above
        return service

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for server in self.servers:
            for listening in server.sockets:
                host, port = listening.getsockname()[:2]
                self.address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
                logger.info("listening on %s", self.address)
        self._watches = [asyncio.create_task(self._end_after_failure()), asyncio.create_task(self._tell_when_ready())]

    async def _end_after_failure(self) -> None:
        await self.service.failed.wait()
        logger.error("ending: %s", self.service.reason)
        self.failed = self.should_exit = True

    async def _tell_when_ready(self) -> None:
        await self.service.loaded.wait()
        self._on_ready(self.address)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:
            self.force_exit = True  # whoever asks a second time means it
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for watch in self._watches:
            watch.cancel()
        self.ended_early = self.service.loading
        self.service.drain()
        logger.info("finishing what is running; another signal ends it at once")
        deadline = asyncio.create_task(self._give_up())
        await super().shutdown(sockets)
        deadline.cancel()
        logger.info("ended")

    async def _give_up(self) -> None:
        await asyncio.sleep(self.options.drain_timeout)
        logger.warning("%g seconds are over: what still runs is given up", self.options.drain_timeout)
        await self.service.stop()


def _raise_file_limit() -> None:
    """Every connection is an open file, and many systems allow only 1,024 unless asked."""
    if sys.platform != "win32":
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            with contextlib.suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
