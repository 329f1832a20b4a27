"""Embeddings and scores over HTTP: inputs of several requests are computed together, and answered one by one.

A thread computes rounds of inputs. Each round takes from all requests that wait, in turn, so that a long one does not
hold back the others.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gossamer.errors import EngineError, GossamerError, ServerBusyError, ShuttingDownError
from gossamer.pooling.refusals import generates_no_text
from gossamer.pooling.texts import Texts, Tokens
from gossamer.protocol import GeneratingBody, PoolingBody
from gossamer.protocol.encoding import encode_json
from gossamer.protocol.pooling import PoolingWork

if TYPE_CHECKING:
    from gossamer import LLM

logger = logging.getLogger("gossamer.engine")
T = TypeVar("T")
ROUND = 256  # inputs that are computed before others get a turn
ROUND_TOKENS = 16_384  # of them, unless each request has a single long one


@dataclass(eq=False)
class _Request:
    """The inputs of one body, of which the first ``begun`` are computed or being computed."""

    inputs: list[Tokens]
    begun: int = 0
    rows: list[Tensor] = field(default_factory=list)
    done: asyncio.Future[Tensor] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class PoolingAnswering:
    """Answers bodies of embeddings and scores with one model. All methods are called in the event loop.

    Args:
        llm: the model; nobody else computes with it.
        model_name: the name in answers.
        max_queue: inputs that may wait beside those of one round.
        bodies: a thread for what is long in answers.

    Attributes:
        waiting: inputs that are not computed yet.
        failure: why nothing can be answered any more; there is no such reason here.
        max_sequences: inputs that are computed before others get a turn.
        on_answer: called with inputs, tokens and seconds of each request that was computed; for metrics.
    """

    failure: str | None = None
    max_sequences = ROUND

    def __init__(self, llm: LLM, *, model_name: str, max_queue: int, bodies: ThreadPoolExecutor) -> None:
        self.llm = llm
        self.model_name = model_name
        self.waiting = 0
        self.on_answer: Callable[[int, int, float], None] = lambda inputs, tokens, seconds: None
        self._max_waiting = max_queue + ROUND
        self._bodies = bodies
        texts = llm.pooling.texts
        tokenizer = copy.deepcopy(texts.tokenizer)  # of one thread
        self._texts = Texts(tokenizer, texts.vocab_size, texts.max_length, lower_case=texts.lower_case)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        self._computing = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._requests: deque[_Request] = deque()
        self._rounds: asyncio.Task[None] | None = None
        self._stopping = False

    async def stop(self) -> None:
        """Give up what is not computed."""
        self._stopping = True
        for request in self._requests:
            if not request.done.done():
                request.done.set_exception(ShuttingDownError("the server is shutting down"))
        if self._rounds is not None:
            await asyncio.gather(self._rounds, return_exceptions=True)
        self._worker.shutdown(cancel_futures=True)
        self._computing.shutdown(cancel_futures=True)

    @property
    def has_free_places(self) -> bool:
        """Whether another request would be computed in the next round."""
        return self.waiting < ROUND

    async def complete(self, body: PoolingBody | GeneratingBody) -> dict[str, Any]:
        """The whole answer.

        Raises:
            GossamerError: refused, or failed.
        """
        work, rows = await self._computed(body)
        return work.answer(rows, self.model_name)

    async def complete_json(self, body: PoolingBody | GeneratingBody) -> bytes:
        """The whole answer, as JSON.

        Raises:
            GossamerError: refused, or failed.
        """
        work, rows = await self._computed(body)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._bodies, lambda: encode_json(work.answer(rows, self.model_name)))

    async def in_worker(self, function: Callable[[], T], size: int = 0) -> T:
        """Run something with the tokenizer's copy; ``size`` does not matter here."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)

    def prompt_ids(self, prompt: str, *, special: bool = True) -> list[int]:
        """The token ids of a text. Runs in the worker."""
        return self._texts.encode(prompt, "prompt", special=special).ids

    def chat_ids(self, messages: list[dict[str, Any]], *_: Any) -> list[int]:
        """A conversation has no token ids here: the model holds none.

        Raises:
            UnsupportedModelError
        """
        raise generates_no_text(self.model_name, self.llm.task)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids. Runs in the worker.

        Raises:
            InvalidPromptError: the model does not have one of them.
        """
        return str(self._texts.tokenizer.decode(self._texts.check_ids(ids, "tokens"))) if ids else ""

    def token_texts(self, ids: list[int]) -> list[str]:
        """The vocabulary's spelling of each token. Runs in the worker."""
        texts: list[str] = self._texts.tokenizer.convert_ids_to_tokens(ids)
        return texts

    async def _computed(self, body: PoolingBody | GeneratingBody) -> tuple[PoolingWork, Tensor]:
        if isinstance(body, GeneratingBody):
            raise generates_no_text(self.model_name, self.llm.task)
        self._check_room(0)
        started = time.perf_counter()
        work = await self.in_worker(partial(body.work, self.llm.pooling, self._texts))
        self._check_room(len(work.inputs))
        request = _Request(list(work.inputs))
        self.waiting += len(request.inputs)
        self._requests.append(request)
        if self._rounds is None or self._rounds.done():
            self._rounds = asyncio.create_task(self._run())
        try:
            rows = await request.done
        finally:
            if request in self._requests:  # whoever asked is gone, or the server ends
                self._requests.remove(request)
                self.waiting -= len(request.inputs) - request.begun
        tokens = sum(len(each.ids) for each in request.inputs)
        self.on_answer(len(request.inputs), tokens, time.perf_counter() - started)
        return work, rows

    def _check_room(self, size: int) -> None:
        if self._stopping:
            raise ShuttingDownError("the server is shutting down")
        # a request may be larger than the queue if nobody else waits
        if self.waiting >= self._max_waiting or (self.waiting and self.waiting + size > self._max_waiting):
            raise ServerBusyError(
                f"{self.waiting} inputs are waiting and {size} more do not fit into the queue; try again later",
                retry_after=1,
            )

    # --- rounds ------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while self._requests and not self._stopping:
            taken = self._take()
            inputs = [each for request, part in taken for each in part]
            try:
                rows = await asyncio.get_running_loop().run_in_executor(
                    self._computing, self.llm.pooling.compute, inputs
                )
            except Exception as error:  # of PyTorch, such as too little memory: these requests fail, others go on
                logger.exception("embeddings cannot be computed")
                for request, _ in taken:
                    self._end(request, EngineError(f"the model cannot compute this: {type(error).__name__}"))
                continue
            finally:
                self.waiting -= len(inputs)
            for (request, _), own in zip(taken, rows.split([len(part) for _, part in taken]), strict=True):
                request.rows.append(own)
                if request.begun == len(request.inputs):
                    self._end(request, torch.cat(request.rows))

    def _take(self) -> list[tuple[_Request, list[Tokens]]]:
        """Inputs of the next round: each request's next ones, up to its share."""
        share, tokens = max(ROUND // len(self._requests), 1), ROUND_TOKENS // len(self._requests)
        taken = []
        for request in list(islice(self._requests, ROUND)):
            part: list[Tokens] = []
            for each in request.inputs[request.begun : request.begun + share]:
                if part and sum(len(one.ids) for one in part) + len(each.ids) > tokens:
                    break
                part.append(each)
            request.begun += len(part)
            taken.append((request, part))
            self._requests.rotate(-1)  # others begin the next round
        return taken

    def _end(self, request: _Request, result: Tensor | GossamerError) -> None:
        if request not in self._requests:
            return  # whoever asked is gone
        self._requests.remove(request)
        self.waiting -= len(request.inputs) - request.begun
        if request.done.done():
            return
        if isinstance(result, GossamerError):
            request.done.set_exception(result)
        else:
            request.done.set_result(result)
