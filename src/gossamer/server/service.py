"""What the routes share: the model, once it is there, and the state of the server's life."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Literal, TypeVar

from gossamer.errors import GossamerError
from gossamer.models.lora_config import check_adapter_names
from gossamer.pooling.refusals import generates_no_text, makes_no_embeddings
from gossamer.protocol.response_store import ResponseStore
from gossamer.sampling_params import SamplingParams
from gossamer.server.answering import Answering
from gossamer.server.batches import Batches
from gossamer.server.data_dir import DataDirectory
from gossamer.server.engine_loop import EngineLoop
from gossamer.server.errors import not_found, unavailable
from gossamer.server.files import FileStore
from gossamer.server.metrics import Metrics
from gossamer.server.options import ServerOptions
from gossamer.server.pooling import PoolingAnswering
from gossamer.server.pooling_metrics import PoolingMetrics
from gossamer.server.prefixes import PinnedPrefixes

if TYPE_CHECKING:
    from gossamer import LLM

logger = logging.getLogger("gossamer.server")
T = TypeVar("T")
State = Literal["loading", "ready", "draining", "failed"]
WARM_UP = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@dataclass(frozen=True, slots=True)
class _Loaded:
    """What there is once the model is there."""

    answers: Answering | PoolingAnswering
    metrics: Metrics | PoolingMetrics
    files: FileStore
    batches: Batches
    pinned: PinnedPrefixes | None

    @property
    def llm(self) -> LLM:
        return self.answers.llm

    @property
    def answering(self) -> Answering:
        """What answers with text.

        Raises:
            UnsupportedModelError: the model generates none.
        """
        if isinstance(self.answers, PoolingAnswering):
            raise generates_no_text(self.answers.model_name, self.llm.task)
        return self.answers

    @property
    def engine_loop(self) -> EngineLoop:
        """The engine of what answers with text."""
        return self.answering.engine_loop

    @property
    def pooling(self) -> PoolingAnswering:
        """What answers with vectors or scores.

        Raises:
            UnsupportedModelError: the model makes none.
        """
        if isinstance(self.answers, Answering):
            raise makes_no_embeddings(self.answers.model_name)
        return self.answers

    @property
    def prefixes(self) -> PinnedPrefixes:
        """Prefixes that stay in the cache.

        Raises:
            UnsupportedModelError: the model has no cache, as it generates no text.
        """
        if self.pinned is None:
            raise generates_no_text(self.answers.model_name, self.llm.task)
        return self.pinned


class Service:
    """Loads the model, and ends it.

    Args:
        load: makes the model; called in a thread, as it takes a while.
    """

    def __init__(self, load: Callable[[], LLM], options: ServerOptions) -> None:
        self.options = options
        self.state: State = "loading"
        self.reason = "the model is being loaded"
        self.failed = asyncio.Event()
        self.loaded = asyncio.Event()
        #: Reads long bodies, and writes long answers, one at a time: several would keep Python's lock from the engine.
        self.bodies = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="bodies")
        self.responses = ResponseStore(options.response_memory, tag=options.tag)
        self._load = load
        self._temporary: TemporaryDirectory[str] | None = None
        self._data_dir: DataDirectory | None = None
        self._loaded: _Loaded | None = None

    async def start(self) -> None:
        """Load the model and warm it up; then the server is ready. A failure is logged, and ends the server."""
        try:
            await self._start()
        except Exception as error:  # models and their files can raise anything; the server says so and ends
            # Why is for the log: it may name paths, and everybody may ask for /health.
            if isinstance(error, GossamerError):
                logger.error("cannot start: %s", error)
            else:
                logger.exception("cannot start")
            self._fail("the server could not start")

    def _fail(self, reason: str) -> None:
        self.state, self.reason = "failed", reason
        self.failed.set()

    async def _start(self) -> None:
        directory = self.options.data_dir
        if directory is None:
            self._temporary = TemporaryDirectory(prefix="gossamer-")
            directory = Path(self._temporary.name)
        # Before the model, which should not have to be loaded to find out
        self._data_dir = DataDirectory(directory)
        await self._data_dir.acquire()
        files = FileStore(directory / "files")
        llm = await _in_daemon(self._load)
        check_adapter_names(llm.adapters, *self.options.model_names)
        await _in_daemon(lambda: _warm_up(llm))
        answers, metrics = self._generating(llm) if llm.generates else self._pooling(llm)
        batches = Batches(directory / "batches", files, answers, max_in_flight=answers.max_sequences)
        files.remove_leftovers(batches.expected_files)
        pinned = PinnedPrefixes(answers) if isinstance(answers, Answering) else None
        self._loaded = _Loaded(answers, metrics, files, batches, pinned)
        for path in self.options.pinned:
            await self._loaded.prefixes.pin_file(path)
        gc.freeze()  # what is there now stays: the garbage collector need not search it again and again
        gc.collect()  # and counts from here on: it searches all once there is a quarter more than now
        if self.state == "loading":
            self.state, self.reason = "ready", ""
        elif self.state == "draining":
            batches.drain()
        self.loaded.set()
        logger.info("ready: %s", ", ".join(self.options.model_names))

    def _generating(self, llm: LLM) -> tuple[Answering, Metrics]:
        metrics = Metrics(llm.engine, self.options.model_names[0])
        engine_loop = EngineLoop(
            llm.engine, max_queue=self.options.max_queue, on_outputs=metrics.count_outputs, on_failure=self._fail
        )
        answering = Answering(
            llm,
            engine_loop,
            model_name=self.options.model_names[0],
            max_sequences=llm.engine.scheduler.max_num_seqs,
            max_logprobs=self.options.max_logprobs,
            bodies=self.bodies,
        )
        engine_loop.start()
        told = ", ".join(f"{name} {value:g}" for name, value in llm.sampling_defaults.items())
        logger.info("sampling where a request says nothing: %s", told or "OpenAI's defaults")
        return answering, metrics

    def _pooling(self, llm: LLM) -> tuple[PoolingAnswering, PoolingMetrics]:
        name = self.options.model_names[0]
        answering = PoolingAnswering(llm, model_name=name, max_queue=self.options.max_queue, bodies=self.bodies)
        metrics = PoolingMetrics(name, lambda: answering.waiting)
        answering.on_answer = metrics.count
        return answering, metrics

    async def stop(self) -> None:
        """Give up what is still running."""
        if self._loaded is not None:
            await self._loaded.batches.stop()
            await self._loaded.answers.stop()
        self.bodies.shutdown(cancel_futures=True)
        gc.unfreeze()
        if self._data_dir is not None:
            self._data_dir.release()
        if self._temporary is not None:
            self._temporary.cleanup()

    def drain(self) -> None:
        """From now on take no more requests."""
        if self.state != "failed":
            self.state, self.reason = "draining", "the server is shutting down"
        if self._loaded is not None:
            self._loaded.batches.drain()
        if self._data_dir is not None:
            self._data_dir.drain()

    @property
    def loading(self) -> bool:
        """Whether the model is being loaded."""
        return self.state == "loading"

    def check_health(self) -> None:
        """Whether requests are answered.

        Raises:
            HttpError: and why not.
        """
        if self.state != "ready":
            raise unavailable(f"{self.state}: {self.reason}")

    @property
    def model_names(self) -> list[str]:
        """What requests may ask for: the model by each of its names, and its adapters."""
        return [*self.options.model_names, *self.ready.llm.adapters]

    def check_model(self, name: str | None) -> None:
        """Whether this server has the model, or the adapter, that a request names.

        Raises:
            HttpError: it has others.
        """
        names = self.model_names
        if name is not None and name not in names:
            raise not_found(f"there is no model {name!r} here; there is {', '.join(names)}", "model", "model_not_found")

    @property
    def ready(self) -> _Loaded:
        """What answers requests.

        Raises:
            HttpError: it does not answer now.
        """
        self.check_health()
        assert self._loaded is not None
        return self._loaded

    @property
    def metrics(self) -> Metrics | PoolingMetrics:
        """They can be read to the end."""
        if self._loaded is None:
            raise unavailable(f"{self.state}: {self.reason}")
        return self._loaded.metrics


def _warm_up(llm: LLM) -> None:
    """A few steps of each kind, so that the first request does not wait for what is made on first use."""
    if not llm.generates:
        llm.pooling.compute([llm.pooling.texts.encode("Warm-up", "warm-up")])
        return
    engine = llm.engine
    ids = engine.intake.encode("Warm-up " * 8, "warm-up")[1][: engine.max_model_len - 1]
    prompts = [{"prompt_token_ids": ids[index:]} for index in range(min(4, len(ids), engine.scheduler.max_num_seqs))]
    llm.generate(prompts, WARM_UP, False)
    if engine.speculator is not None:
        engine.speculator.prepare(engine.scheduler.max_num_seqs)
    engine.tree.evict(engine.budget.total)
    engine.reset_stats()


async def _in_daemon(function: Callable[[], T]) -> T:
    """Run ``function`` in a thread that the end of the process does not wait for."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await asyncio.wrap_future(future)
