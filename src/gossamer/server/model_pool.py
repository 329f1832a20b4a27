"""Several models in one budget of memory: each in a process of its own, loaded when it is asked for.

A model that is asked for and not there is loaded; the pool does that, so that it goes on when whoever asked first is
gone. If it does not fit beside the others, the one that has not been used for the longest time ends first, as soon as
it answers nobody. After some seconds of waiting one is chosen that takes no more requests until then: a model that is
always busy would keep all others out.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
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
PATIENCE = 5.0  # seconds that a model waits for others to be idle, before one of them has to become so
REMEMBERED = 30.0  # seconds in which a model that could not be loaded is not tried again
_PROCESS = 600 * 2**20  # bytes that a process takes without its weights, until it is measured


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


class _Entry:
    """A model of the pool.

    Attributes:
        bytes: what it is known, or expected, to take with a full cache.
        requests: that it answers, or that wait for it.
        answering: those that it answers.
        leaving: it takes no new requests, since another needs its room.
        fresh: it was loaded, and has not answered anybody yet.
    """

    def __init__(self, name: str, spec: ModelSpec) -> None:
        self.name, self.spec = name, spec
        self.bytes = spec.weight_bytes + spec.cache_bytes + _PROCESS
        self.state: State = "unloaded"
        self.process: ModelProcess | None = None
        self.watch: asyncio.Task[None] | None = None
        self.loading: asyncio.Task[None] | None = None
        self.failure: tuple[float, str] | None = None
        self.requests = self.answering = 0
        self.used = 0.0
        self.leaving = self.fresh = False

    @property
    def idle(self) -> bool:
        """Whether it may end: it answers nobody, and was not loaded just now for those who wait for it."""
        return self.state == "loaded" and not self.answering and not (self.fresh and self.requests)

    @property
    def takes_requests(self) -> bool:
        return self.state == "loaded" and not self.leaving


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
        self._entries = {name: _Entry(name, spec) for name, spec in specs.items()}
        self._changed = asyncio.Condition()  # a request has ended, or a process
        self._one_at_a_time = asyncio.Lock()  # loading
        self._telling: asyncio.Task[None] | None = None

    @property
    def loading(self) -> bool:
        """Whether a model is being loaded."""
        return any(each.state == "loading" for each in self._entries.values())

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
        taken = 0 if entry.state == "unloaded" else entry.bytes
        return {"status": {"value": entry.state}, "requests": entry.requests, "memory_bytes": taken}

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[ModelProcess]:
        """The process of a model, which stays as long as the block. It is loaded first if it is not there.

        Raises:
            HttpError: the server is shutting down, the model cannot be loaded, or would not fit into the memory alone.
        """
        entry = self._entries[name]
        entry.requests += 1
        try:
            while not entry.takes_requests:
                await self._wait_for(entry)
            assert entry.process is not None
            entry.answering += 1
            entry.fresh = False
            entry.used = time.monotonic()
            try:
                yield entry.process
            finally:
                entry.answering -= 1
                entry.used = time.monotonic()
        finally:
            entry.requests -= 1
            await self._tell()

    def _check_open(self) -> None:
        if self.state != "ready":
            raise unavailable("draining: the server is shutting down")

    async def _wait_for(self, entry: _Entry) -> None:
        """Until something has changed that may have brought the model."""
        self._check_open()
        if entry.state != "unloaded" and entry.loading is None:  # it is about to end
            await self._change()
            return
        if entry.loading is None:
            if entry.failure is not None and time.monotonic() < entry.failure[0]:
                raise _not_loaded(entry.failure[1])
            entry.loading = asyncio.create_task(self._load(entry))
            entry.loading.add_done_callback(_seen)
        await asyncio.shield(entry.loading)

    async def _load(self, entry: _Entry) -> None:
        try:
            async with self._one_at_a_time:
                await self._make_room(entry)
                await self._start_process(entry)
        finally:
            entry.loading = None
            await self._tell()

    async def _start_process(self, entry: _Entry) -> None:
        self._check_open()  # another model may have been loaded meanwhile, until the end came
        logger.info("loading %s", entry.name)
        entry.state, entry.leaving = "loading", False
        process = entry.process = ModelProcess(entry.name, entry.spec.load, self.options)
        try:
            await process.ready()
        except EngineError as error:
            await self._end(entry)
            self._check_open()
            entry.failure = time.monotonic() + REMEMBERED, str(error)
            raise _not_loaded(str(error)) from None
        except BaseException:
            await self._end(entry)
            raise
        entry.state, entry.failure, entry.used, entry.fresh = "loaded", None, time.monotonic(), True
        resident = resident_memory(process.pid)
        if resident is not None:
            entry.bytes = resident + entry.spec.cache_bytes
        entry.watch = asyncio.create_task(self._watch(entry, process))
        logger.info("%s is loaded: %.1f GB with a full cache", entry.name, entry.bytes / 1e9)

    async def _watch(self, entry: _Entry, process: ModelProcess) -> None:
        """Notice when a process ends by itself."""
        await process.wait()
        await self.lost(process)

    async def lost(self, process: ModelProcess) -> None:
        """A process has ended by itself."""
        entry = self._entries[process.name]
        if entry.process is process and entry.state == "loaded":
            logger.error("the process of %s has ended by itself", entry.name)
            entry.process, entry.state, entry.watch = None, "unloaded", None
            await self._tell()

    async def _make_room(self, entry: _Entry) -> None:
        """End what has not been used for the longest time until ``entry`` fits.

        Raises:
            HttpError: it does not fit alone.
        """
        if entry.bytes > self.memory:
            raise HttpError(
                507,
                f"{entry.name!r} needs about {entry.bytes / 1e9:.1f} GB with its cache, and --models-memory allows "
                f"{self.memory / 1e9:.1f} GB; a smaller --memory, or more for all, would do",
                code="insufficient_memory",
                type="server_error",
                param="model",
                headers={"x-should-retry": "false"},
            )
        patience = time.monotonic() + PATIENCE
        try:
            while self._taken() + entry.bytes > self.memory:
                self._check_open()
                there = [each for each in self._entries.values() if each.state == "loaded"]
                idle = [each for each in there if each.idle]
                if idle:
                    await self._end(min(idle, key=lambda each: (not each.leaving, each.used)))
                    continue
                left = patience - time.monotonic()
                if left <= 0 and there and not any(each.leaving for each in there):
                    chosen = min(there, key=lambda each: each.used)
                    logger.info("%s takes no more requests: %s needs its room", chosen.name, entry.name)
                    chosen.leaving = True
                await self._change(left if left > 0 else None)
        finally:
            for each in self._entries.values():
                each.leaving = False
            await self._tell()

    def _taken(self) -> int:
        return sum(each.bytes for each in self._entries.values() if each.state != "unloaded")

    async def _end(self, entry: _Entry) -> None:
        process, entry.state = entry.process, "ending"
        if entry.watch is not None:
            entry.watch.cancel()
        if process is not None:
            logger.info("ending %s", entry.name)
            await process.stop()
        entry.process, entry.state, entry.watch, entry.leaving = None, "unloaded", None, False
        await self._tell()

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _change(self, seconds: float | None = None) -> None:
        """Until something changes, or so many seconds have passed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait()

    async def start(self) -> None:
        """Load the first model, so that most servers are ready before they are asked. A failure is in the log."""
        self.loaded.set()
        try:
            async with self.use(self.names[0]):
                pass
        except GossamerError as error:
            if self.state == "ready":
                logger.error("%s", error)

    def drain(self) -> None:
        """From now on take no more requests. Those that wait for a model are refused, and none is loaded for them."""
        self.state, self.reason = "draining", "the server is shutting down"
        for each in self._entries.values():
            if each.state == "loading" and each.process is not None:
                each.process.kill()
        self._telling = asyncio.create_task(self._tell())

    async def stop(self) -> None:
        """End all models."""
        self.drain()
        await asyncio.gather(*(self._end(each) for each in self._entries.values() if each.process is not None))
        loading = [each.loading for each in self._entries.values() if each.loading is not None]
        await asyncio.gather(*loading, return_exceptions=True)
        if self._telling is not None:
            await self._telling
        self.bodies.shutdown(cancel_futures=True)


def _seen(task: asyncio.Task[None]) -> None:
    """Nobody may be left to hear of a failure."""
    if not task.cancelled():
        task.exception()


def _not_loaded(why: str) -> HttpError:
    """Clients would ask again at once otherwise."""
    headers = {"x-should-retry": "false", "retry-after": str(round(REMEMBERED))}
    return HttpError(503, why, code="model_not_loaded", type="server_error", param="model", headers=headers)
