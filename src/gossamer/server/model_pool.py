"""Several models in one budget of memory: each in a process of its own, loaded when it is asked for.

A model that is asked for and not there is loaded, one at a time. If it does not fit beside the others, the one that has
not been used for the longest time ends first, as soon as it answers nobody.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from gossamer.errors import EngineError, GossamerError
from gossamer.server.errors import HttpError, not_found, unavailable
from gossamer.server.model_process import ModelProcess
from gossamer.server.options import ServerOptions
from gossamer.system import resident_memory

if TYPE_CHECKING:
    from gossamer import LLM

logger = logging.getLogger("gossamer.server")
State = Literal["unloaded", "loading", "loaded", "ending"]


@dataclass(frozen=True)
class ModelSpec:
    """A model that can be loaded.

    Attributes:
        load: see :class:`ModelProcess`.
        weight_bytes: of its files.
        cache_bytes: its budget for keys and values.
    """

    load: Callable[[], LLM]
    weight_bytes: int
    cache_bytes: int


@dataclass
class _Entry:
    spec: ModelSpec
    state: State = "unloaded"
    process: ModelProcess | None = None
    bytes: int = 0  # that it is known, or expected, to take with a full cache
    requests: int = 0
    used: float = 0.0

    @property
    def idle(self) -> bool:
        return self.state == "loaded" and not self.requests


class ModelPool:
    """See the module's documentation. All methods are called in one event loop.

    Args:
        specs: by their names; requests that name no model get the first.
        options: of each one's server.
        memory: bytes that all may take together.
    """

    def __init__(self, specs: Mapping[str, ModelSpec], options: ServerOptions, memory: int) -> None:
        self.options = options
        self.memory = memory
        self.state, self.reason = "ready", ""
        self.loaded = asyncio.Event()
        self.failed = asyncio.Event()  # never: a model that fails is loaded again
        self.bodies = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self._entries = {
            name: _Entry(spec, bytes=spec.weight_bytes + spec.cache_bytes + _PROCESS) for name, spec in specs.items()
        }
        self._changed = asyncio.Condition()  # a request has ended, or a model
        self._loading = asyncio.Lock()

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def find(self, name: str | None) -> str:
        """The model that a request means.

        Raises:
            HttpError: it is not here.
        """
        if name is None:
            return self.names[0]
        if name not in self._entries:
            raise not_found(
                f"there is no model {name!r} here; there is {', '.join(self.names)}", "model", "model_not_found"
            )
        return name

    def describe(self, name: str) -> dict[str, object]:
        """What ``/v1/models`` says of one."""
        entry = self._entries[name]
        return {"status": {"value": entry.state}, "requests": entry.requests, "memory_bytes": self._taken(entry)}

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ModelProcess]:
        """The process of a model, which stays as long as the block. It is loaded first if it is not there.

        Raises:
            HttpError: the server is shutting down, or the model would not fit into the memory even alone.
            EngineError: it cannot be loaded.
        """
        entry = self._entries[name]
        entry.requests += 1  # also while it is loaded: nobody may end it meanwhile
        try:
            while True:
                if self.state != "ready":
                    raise unavailable("draining: the server is shutting down")
                if entry.state == "loaded" and entry.process is not None and entry.process.alive:
                    break
                async with self._loading:
                    await self._load(name, entry)
            entry.used = time.monotonic()
            yield entry.process
        finally:
            entry.requests -= 1
            entry.used = time.monotonic()
            async with self._changed:
                self._changed.notify_all()

    async def _load(self, name: str, entry: _Entry) -> None:
        """Load a model, if nobody has meanwhile."""
        if entry.process is not None and not entry.process.alive:
            logger.error("%s has ended by itself, and is loaded again", name)
            await self._end(entry)
        if entry.state != "unloaded":
            return
        await self._make_room(name, entry)
        entry.state = "loading"
        logger.info("loading %s", name)
        process = entry.process = ModelProcess(name, entry.spec.load, self.options)
        try:
            await process.ready()
        except BaseException:
            await self._end(entry)
            raise
        entry.state = "loaded"
        resident = resident_memory(process.pid)
        if resident is not None:
            entry.bytes = resident + entry.spec.cache_bytes
        logger.info("%s is loaded: %.1f GB with a full cache", name, entry.bytes / 1e9)

    async def _make_room(self, name: str, entry: _Entry) -> None:
        """End what has not been used for the longest time until ``entry`` fits.

        Raises:
            HttpError: it does not fit alone.
        """
        if entry.bytes > self.memory:
            raise HttpError(
                507,
                f"{name!r} needs about {entry.bytes / 1e9:.1f} GB with its cache, and --models-memory allows "
                f"{self.memory / 1e9:.1f} GB; a smaller --memory, or more for all, would do",
                code="insufficient_memory",
                type="server_error",
                param="model",
            )
        while sum(map(self._taken, self._entries.values())) + entry.bytes > self.memory:
            idle = [other for other in self._entries.values() if other.idle]
            if idle:
                await self._end(min(idle, key=lambda other: other.used))
                continue
            async with self._changed:
                await self._changed.wait()
            if self.state != "ready":
                raise unavailable("draining: the server is shutting down")

    @staticmethod
    def _taken(entry: _Entry) -> int:
        return 0 if entry.state == "unloaded" else entry.bytes

    async def _end(self, entry: _Entry) -> None:
        process, entry.state = entry.process, "ending"
        if process is not None:
            logger.info("ending %s", process.name)
            await process.stop()
        entry.process, entry.state = None, "unloaded"
        async with self._changed:
            self._changed.notify_all()

    async def start(self) -> None:
        """Load the first model, so that most servers are ready before they are asked. A failure is in the log."""
        self.loaded.set()
        try:
            async with self.use(self.names[0]):
                pass
        except GossamerError as error:
            logger.error("%s", error)

    def drain(self) -> None:
        """From now on take no more requests."""
        self.state, self.reason = "draining", "the server is shutting down"

    async def stop(self) -> None:
        """End all models."""
        self.drain()
        async with self._changed:
            self._changed.notify_all()
        await asyncio.gather(*(self._end(entry) for entry in self._entries.values() if entry.process is not None))
        self.bodies.shutdown(cancel_futures=True)


_PROCESS = 600 * 2**20  # what a process takes without its weights, until it is measured


def check_alive(process: ModelProcess, error: Exception) -> EngineError:
    """What to tell a client whose request a model's process has not answered."""
    how = "has ended" if not process.alive else f"does not answer ({type(error).__name__})"
    return EngineError(f"the model {process.name!r} {how}; it is loaded again with the next request")
