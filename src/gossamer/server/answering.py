"""From a request's body to its answer, whole or in a stream. Knows nothing of HTTP; batches use it too."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from gossamer.engine.detokenizer import decode
from gossamer.engine.intake import Intake
from gossamer.engine.token_bytes import TokenBytes
from gossamer.errors import InvalidSamplingParamsError, PromptTooLongError, RequestError
from gossamer.outputs import RequestOutput
from gossamer.protocol import GeneratingBody, StreamedAnswer
from gossamer.sampling_params import SamplingParams
from gossamer.server.engine_loop import EngineLoop, Ticket

if TYPE_CHECKING:
    from gossamer import LLM

T = TypeVar("T")


class Answering:
    """Answers bodies with one model.

    Args:
        llm: the model; its engine belongs to ``engine_loop``.
        model_name: the name in answers.
        max_sequences: completions that one body may ask for.
    """

    def __init__(self, llm: LLM, engine_loop: EngineLoop, *, model_name: str, max_sequences: int) -> None:
        self.llm = llm
        self.engine_loop = engine_loop
        self.model_name = model_name
        self.max_sequences = max_sequences
        # A copy, and one thread, for what takes longer with long texts: neither the event loop nor the engine waits.
        self._tokenizer = copy.deepcopy(llm.tokenizer)
        self._tokens = TokenBytes(self._tokenizer)
        self._decode_prompt = partial(decode, self._tokens, unfinished=True)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        engine = llm.engine
        self._intake = Intake(self._tokenizer, engine.intake.vocab_size, engine.max_model_len, 0)
        self._max_characters = llm.engine.max_model_len * _longest_token(self._tokenizer)

    def close(self) -> None:
        self._worker.shutdown(cancel_futures=True)

    async def complete(self, body: GeneratingBody) -> dict[str, Any]:
        """The whole answer.

        Raises:
            GossamerError: refused, or failed.
        """
        async with self._submitted(body, stream=False) as tickets:
            outputs = [await _last(ticket) for ticket in tickets]
        return body.answer(outputs, model=self.model_name, decode=self._decode_prompt)

    @asynccontextmanager
    async def stream(self, body: GeneratingBody) -> AsyncIterator[AsyncIterator[bytes]]:
        """The answer as server-sent events. Leaving the block, early or not, forgets what is unfinished.

        Raises:
            GossamerError: refused. What fails later is raised by the iterator.
        """
        async with self._submitted(body, stream=True) as tickets:
            yield _events(body.events(model=self.model_name, decode=self._decode_prompt), tickets)

    def with_ids(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """A body's prompt with its token ids, as the engine takes it. Runs in the worker.

        Raises:
            RequestError: it is empty, too long or no text; the chat template refuses the messages.
        """
        if "messages" in prompt:
            return {"prompt_token_ids": self.chat_ids(prompt["messages"]), "cache_salt": prompt["cache_salt"]}
        text_or_ids = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
        return prompt | {"prompt_token_ids": self.prompt_ids(text_or_ids)}

    def prompt_ids(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """The token ids of one prompt. Runs in the worker."""
        if isinstance(prompt, list):
            return self._intake.check_ids(prompt, "", "prompt")
        self._check_characters(len(prompt))
        return self._intake.encode(prompt, "", add_special_tokens=special)[1]

    def chat_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. Runs in the worker."""
        self._check_characters(sum(len(message["content"]) for message in messages))
        return self.llm.apply_chat_template(messages, tokenizer=self._tokenizer)

    def conversation_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """The token ids that all conversations begin with that begin with these messages. Runs in the worker."""
        turns = [self.chat_ids([*messages, {"role": "user", "content": text}]) for text in ("A", "b")]
        common = next((i for i, (a, b) in enumerate(zip(*turns, strict=False)) if a != b), min(map(len, turns)))
        return turns[0][:common]

    async def generate(self, prompt: dict[str, Any], params: SamplingParams) -> RequestOutput:
        """The engine's output for one of its own prompts.

        Raises:
            RequestError
        """
        ticket = await self.engine_loop.submit(f"req-{uuid.uuid4().hex}", prompt, params, stream=False)
        try:
            return await _last(ticket)
        finally:
            self.engine_loop.release(ticket)

    def decode(self, ids: list[int]) -> str:
        """The text of token ids. Runs in the worker."""
        return decode(self._tokens, ids, skip_special_tokens=False)

    async def in_worker(self, function: Callable[[], T]) -> T:
        """Run something that takes a while."""
        return await asyncio.get_running_loop().run_in_executor(self._worker, function)

    def _check_characters(self, count: int) -> None:
        if count > self._max_characters:
            raise PromptTooLongError(
                f"This model's maximum context length is {self.llm.engine.max_model_len} tokens. However, the prompt "
                f"has {count} characters, which are more tokens than that",
                param="prompt",
            )

    @asynccontextmanager
    async def _submitted(self, body: GeneratingBody, *, stream: bool) -> AsyncIterator[list[Ticket]]:
        """The body's prompts in the engine, for as long as the block lasts."""
        params = body.to_sampling_params(advised=self.llm.sampling_defaults)
        prompts = body.engine_prompts()
        count = params.n * len(prompts)
        if count > self.max_sequences:
            raise RequestError(f"{count} completions are more than the {self.max_sequences} of one request", param="n")
        self.engine_loop.check_room(count)  # before the work of making tokens
        prompts = [await self.in_worker(partial(self.with_ids, prompt)) for prompt in prompts]
        if params.structured_outputs is not None:
            await self._compile(params, body)
        async with AsyncExitStack() as stack:
            tickets: list[Ticket] = []
            for prompt in prompts:
                ticket = await self.engine_loop.submit(f"req-{uuid.uuid4().hex}", prompt, params, stream=stream)
                stack.callback(self.engine_loop.release, ticket)
                tickets.append(ticket)
            yield tickets

    async def _compile(self, params: SamplingParams, body: GeneratingBody) -> None:
        """A large schema takes a while; the engine finds it compiled."""
        form = params.structured_outputs
        assert form is not None
        try:
            await self.in_worker(lambda: self.llm.engine.factory.grammars.constraint(form))
        except InvalidSamplingParamsError as error:
            if body.response_format is not None:  # under the name that the client knows
                error.param = "response_format"
            raise


async def _last(ticket: Ticket) -> RequestOutput:
    async for output in ticket.updates():
        last = output
    return last


async def _events(answer: StreamedAnswer, tickets: list[Ticket]) -> AsyncIterator[bytes]:
    if len(tickets) == 1:
        async for output in tickets[0].updates():
            for event in answer.events(0, output):
                yield event
    else:
        async for index, output in _merged(tickets):
            for event in answer.events(index, output):
                yield event
    outputs = [ticket.output for ticket in tickets if ticket.output is not None]
    for event in answer.end(outputs):
        yield event


async def _merged(tickets: list[Ticket]) -> AsyncIterator[tuple[int, RequestOutput]]:
    """Updates of several requests, as they come."""
    changed = asyncio.Event()
    changed.set()  # some may have changed before all of them wake the same reader
    for ticket in tickets:
        ticket.changed = changed
    last: list[RequestOutput | None] = [None] * len(tickets)
    while not all(output is not None and output.finished for output in last):
        await changed.wait()
        changed.clear()
        for index, ticket in enumerate(tickets):
            if ticket.output is not last[index] and ticket.output is not None:
                if ticket.output.error is not None:
                    raise ticket.output.error
                last[index] = ticket.output
                yield index, ticket.output


def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token: no text of more characters per token exists."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)
