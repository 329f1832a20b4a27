"""A server of one model in a process of its own: started, watched, ended.

It listens on a port of this machine that it is given by the system, and answers whoever has its key, which only the
process that started it knows. It ends with that process, however that one ends.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import secrets
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from gossamer.errors import EngineError, GossamerError
from gossamer.server.options import ServerOptions

if TYPE_CHECKING:
    from gossamer import LLM

logger = logging.getLogger("gossamer.server")
_GRACE = 10.0  # seconds beyond the time that running requests have
_READY, _FAILED = b"+", b"-"  # what a process's only message begins with


class ProcessEnded(EngineError):
    """The process of a model has ended by itself."""


class ModelProcess:
    """See the module's documentation.

    Args:
        name: of the model, for requests.
        load: makes the model, in the process; it is sent there, so it has to be a function that can be imported, or a
            ``functools.partial`` of one.
        options: of the server; where it listens, its names and its keys are its own.

    Attributes:
        address: ``http://host:port``.
        key: what requests must carry.
    """

    def __init__(self, name: str, load: Callable[[], LLM], options: ServerOptions) -> None:
        self.name = name
        self.key = secrets.token_hex(16)
        self.address = ""
        self._is_ready = False
        self._drain_timeout = options.drain_timeout
        own = replace(
            options,
            host="127.0.0.1",
            port=0,
            model_names=(name,),
            api_keys=(self.key,),
            allowed_hosts=(),
            behind_front=True,
        )
        context = multiprocessing.get_context("spawn")  # forking would copy threads' locks
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(load, own, theirs), name=f"gossamer {name}")
        # A key pressed for the server reaches all its processes. This one is not to hear of it even while it begins.
        # The tracker comes first: the start of the first process makes it, and that lets the signal through again.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    async def ready(self) -> None:
        """Until its model is loaded.

        Raises:
            EngineError: it cannot be; says why, if the process does.
        """
        try:
            message = await asyncio.to_thread(self._pipe.recv_bytes)
        except (EOFError, OSError):
            message = _FAILED
        if message.startswith(_FAILED):
            why = message[1:].decode() or "the server's log says why"
            raise EngineError(f"the model {self.name!r} could not be loaded: {why}")
        self.address, self._is_ready = message[1:].decode(), True

    async def wait(self) -> None:
        """Until it has ended."""
        ended = asyncio.Event()
        loop, sentinel = asyncio.get_running_loop(), self._process.sentinel
        loop.add_reader(sentinel, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(sentinel)

    async def ended(self) -> bool:
        """Whether it has ended, or does so within a second: one that was killed takes a moment."""
        await asyncio.to_thread(self._process.join, 1.0)
        return not self._process.is_alive()

    def kill(self) -> None:
        """End it at once. Whoever waits until it is ready hears that it is not."""
        self._process.kill()

    async def stop(self) -> None:
        """Ask it to finish what is running, and end it when its time is over; at once while its model is loaded."""
        self._pipe.close()
        if self._process.is_alive():
            (self._process.terminate if self._is_ready else self._process.kill)()
        await asyncio.to_thread(self._process.join, self._drain_timeout + _GRACE)
        if self._process.is_alive():
            logger.warning("%s does not end, and is killed", self.name)
            self._process.kill()
            await asyncio.to_thread(self._process.join)


def _run(load: Callable[[], LLM], options: ServerOptions, pipe: Connection) -> None:
    """The process."""
    from gossamer.server.app import create_app
    from gossamer.server.run import serve

    def load_or_tell() -> LLM:
        try:
            return load()
        except GossamerError as error:
            pipe.send_bytes(_FAILED + str(error).encode())
            raise

    os.setsid()  # Ctrl-C is for the process that started it, which ends it
    threading.Thread(target=_end_with, args=(pipe,), name="parent", daemon=True).start()
    app = create_app(load_or_tell, options)
    raise SystemExit(serve(app, options, on_ready=lambda address: pipe.send_bytes(_READY + address.encode())))


def _end_with(pipe: Connection) -> None:
    """End when the other end of the pipe is closed: it is told to, or nobody is left to ask for anything."""
    try:
        pipe.recv_bytes()
    except (EOFError, OSError):
        os.kill(os.getpid(), signal.SIGTERM)
