"""The engine, in a thread of its own, for the coroutines of an event loop.

The thread steps as long as there is something to do. Between two steps it takes what coroutines ask of it: new
requests, requests to be forgotten, questions about the cache. Outputs go the other way in one call per step. A request
that is streamed keeps only its latest output, which holds all before: a slow reader makes nothing grow.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import logging
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from gossamer.engine.engine import Engine
from gossamer.engine.intake import Prompt
from gossamer.engine.results import Output
from gossamer.engine.stepping import PatientSteps
from gossamer.errors import EngineError, ServerBusyError, ShuttingDownError
from gossamer.outputs import RequestOutput
from gossamer.sampling_params import SamplingParams

T = TypeVar("T")
logger = logging.getLogger("gossamer.engine")


class Ticket:
    """One request in the engine, seen from a coroutine."""

    def __init__(self, request_id: str, size: int) -> None:
        self.request_id = request_id
        self.size = size  # sequences
        self.output: RequestOutput | None = None
        self.changed = asyncio.Event()

    async def updates(self) -> AsyncIterator[RequestOutput]:
        """The output so far, whenever it has changed; the last one is finished.

        Raises:
            RequestError: the request failed.
        """
        while True:
            await self.changed.wait()
            self.changed.clear()
            output = self.output
            assert output is not None
            if output.error is not None:
                raise output.error
            yield output
            if output.finished:
                return


class EngineLoop:
    """See the module's documentation. All methods but those of the thread are called in the event loop.

    Args:
        engine: nobody else may touch it between :meth:`start` and :meth:`stop`.
        max_queue: sequences that may wait beside those that are computed.
        on_outputs: called in the thread after each step, with its outputs; for metrics.
        on_failure: called when the thread has ended by itself.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        max_queue: int,
        on_outputs: Callable[[list[Output]], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self.engine = engine
        self.failure: str | None = None  # why the thread has ended, if it was not told to
        self._capacity = engine.scheduler.max_num_seqs + max_queue
        self._on_outputs, self._on_failure = on_outputs, on_failure
        self._tickets: dict[str, Ticket] = {}
        self._size = 0  # sequences of all tickets
        self._asked: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    async def stop(self) -> None:
        """End the thread after its present step. What is unfinished fails."""
        self._stopping = True
        with self._wake:
            self._wake.notify()
        while self._thread.is_alive():
            await asyncio.sleep(0.01)
        self._fail_all(ShuttingDownError("the server is shutting down"))

    @property
    def num_sequences(self) -> int:
        """Sequences of all unfinished requests, computed or waiting."""
        return self._size

    # --- what coroutines ask -----------------------------------------------------------------------------------

    @property
    def has_free_places(self) -> bool:
        """Whether another sequence would be computed at once."""
        return self._size < self.engine.scheduler.max_num_seqs

    def check_room(self, size: int) -> None:
        """Whether ``size`` more sequences may come.

        Raises:
            ServerBusyError: too many are waiting already.
        """
        if self._size + size > self._capacity:
            waiting = max(self._size - self.engine.scheduler.max_num_seqs, 0)
            raise ServerBusyError(
                f"{waiting} sequences are waiting and {size} more do not fit into the queue; try again later",
                retry_after=min(max(waiting // self.engine.scheduler.max_num_seqs, 1), 60),
            )

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Room for ``size`` sequences while their request is being prepared, which costs time too.

        Raises:
            ServerBusyError: too many are waiting already.
        """
        self.check_room(size)
        self._size += size
        try:
            yield
        finally:
            self._size -= size

    async def submit(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, stream: bool, draw: int | None = None
    ) -> Ticket:
        """Queue a request; see :meth:`Engine.add_request`. Whoever submits must :meth:`release` the ticket in the end.

        Raises:
            ServerBusyError: too many are waiting already.
            RequestError: the engine refused it.
        """
        self.check_room(params.n)
        ticket = Ticket(request_id, params.n)
        self._tickets[request_id] = ticket
        self._size += ticket.size
        try:
            await self.call(lambda engine: engine.add_request(request_id, prompt, params, stream=stream, draw=draw))
        except BaseException:
            self.release(ticket)
            raise
        return ticket

    def release(self, ticket: Ticket) -> None:
        """Forget a request; if it is unfinished, the engine forgets it too."""
        if self._tickets.pop(ticket.request_id, None) is None:
            return
        self._size -= ticket.size
        unfinished = ticket.output is None or not ticket.output.finished
        if unfinished and self.failure is None and not self._stopping:
            self._ask(lambda: self.engine.abort(ticket.request_id))

    async def call(self, function: Callable[[Engine], T]) -> T:
        """What ``function`` returns for the engine, called between two steps."""
        future: concurrent.futures.Future[T] = concurrent.futures.Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return  # whoever asked is gone
            try:
                future.set_result(function(self.engine))
            except BaseException as error:
                future.set_exception(error)

        if self.failure is not None:
            raise EngineError(f"the engine has stopped: {self.failure}")
        if self._stopping:
            raise ShuttingDownError("the server is shutting down")
        self._ask(answer)
        return await asyncio.wrap_future(future)

    def _ask(self, work: Callable[[], None]) -> None:
        with self._wake:
            self._asked.append(work)
            self._wake.notify()

    # --- the thread --------------------------------------------------------------------------------------------

    def _run(self) -> None:
        steps = PatientSteps(self.engine)
        try:
            while not self._stopping:
                with self._wake:
                    while not (self._asked or self._stopping or self.engine.has_unfinished_requests()):
                        self._wake.wait()
                while self._asked:
                    self._asked.popleft()()
                if not self.engine.has_unfinished_requests() or self._stopping:
                    continue
                outputs = steps.step()
                self._on_outputs(outputs)
                if outputs:
                    self._loop.call_soon_threadsafe(self._deliver, outputs)
        except BaseException as error:
            logger.exception("the engine has stopped")
            self.failure = repr(error)
            self._loop.call_soon_threadsafe(self._fail_all, EngineError(f"the engine has stopped: {error!r}"))
            self._loop.call_soon_threadsafe(self._on_failure, f"the engine has stopped: {error!r}")

    # --- what comes back ---------------------------------------------------------------------------------------

    def _deliver(self, outputs: list[Output]) -> None:
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is not None and isinstance(output, RequestOutput):
                ticket.output = output
                ticket.changed.set()

    def _fail_all(self, error: EngineError) -> None:
        for ticket in self._tickets.values():
            if ticket.output is None or not ticket.output.finished:
                ticket.output = RequestOutput(ticket.request_id, error=error)
                ticket.changed.set()
        while self._asked:  # coroutines wait for these
            self._asked.popleft()()
