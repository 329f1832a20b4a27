"""From a request's body to its answer, whole or in a stream. Knows nothing of HTTP; batches use it too."""

from __future__ import annotations

import asyncio
import copy
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from gossamer.chat import Tool
from gossamer.engine.detokenizer import decode
from gossamer.engine.grammar.compiler import Grammar, GrammarCompiler
from gossamer.engine.intake import Intake
from gossamer.engine.token_bytes import TokenBytes
from gossamer.errors import PromptTooLongError, RequestError
from gossamer.outputs import RequestOutput
from gossamer.pooling.refusals import makes_no_embeddings
from gossamer.protocol import GeneratingBody, PoolingBody, StreamedAnswer
from gossamer.protocol.encoding import encode_json
from gossamer.protocol.field_names import naming
from gossamer.protocol.responses import usage
from gossamer.sampling_params import SamplingParams
from gossamer.server.engine_loop import EngineLoop, Ticket

if TYPE_CHECKING:
    from gossamer import LLM

T = TypeVar("T")
LONG_TEXT = 65_536  # characters of a prompt that others' prompts should not wait for


class Answering:
    """Answers bodies with one model.

    Args:
        llm: the model; its engine belongs to ``engine_loop``.
        model_name: the name in answers.
        max_sequences: completions that one body may ask for.
        max_logprobs: log-probabilities that one may ask for at each position.
        bodies: a thread for what is long in requests and answers, but no text.
    """

    def __init__(
        self,
        llm: LLM,
        engine_loop: EngineLoop,
        *,
        model_name: str,
        max_sequences: int,
        max_logprobs: int,
        bodies: ThreadPoolExecutor,
    ) -> None:
        self.llm = llm
        self.engine_loop = engine_loop
        self.model_name = model_name
        self.max_sequences = max_sequences
        self.max_logprobs = max_logprobs
        self._bodies = bodies
        # A copy, and one thread, for what takes longer with long texts: neither the event loop nor the engine waits.
        self._tokenizer = copy.deepcopy(llm.tokenizer)
        self._tokens = TokenBytes(self._tokenizer)
        self._decode_prompt = partial(decode, self._tokens, unfinished=True)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        # Long texts take seconds, in which the tokenizer lets other threads have Python's lock, and itself.
        self._long_worker = ThreadPoolExecutor(1, thread_name_prefix="long-texts")
        intake = llm.engine.intake
        self._intake = Intake(self._tokenizer, intake.vocab_size, intake.max_model_len, intake.max_cached_tokens)
        self._max_characters = llm.engine.max_model_len * _longest_token(self._tokenizer)

    async def stop(self) -> None:
        """Give up what is unfinished."""
        await self.engine_loop.stop()
        await asyncio.to_thread(self.engine_loop.engine.close)
        self._worker.shutdown(cancel_futures=True)
        self._long_worker.shutdown(cancel_futures=True)

    @property
    def has_free_places(self) -> bool:
        """Whether another sequence would be computed at once."""
        return self.engine_loop.has_free_places

    @property
    def failure(self) -> str | None:
        """Why nothing can be answered any more."""
        return self.engine_loop.failure

    async def complete(self, body: GeneratingBody | PoolingBody) -> dict[str, Any]:
        """The whole answer.

        Raises:
            GossamerError: refused, or failed.
        """
        if isinstance(body, PoolingBody):
            raise makes_no_embeddings(self.model_name)
        outputs = await self._outputs(body)
        return await self._away(outputs, lambda: self._answer(body, outputs))

    async def complete_json(self, body: GeneratingBody) -> bytes:
        """The whole answer, as JSON.

        Raises:
            GossamerError: refused, or failed.
        """
        outputs = await self._outputs(body)
        return await self._away(outputs, lambda: encode_json(self._answer(body, outputs)))

    async def _outputs(self, body: GeneratingBody) -> list[RequestOutput]:
        async with self._submitted(body, stream=False) as tickets:
            return [await _last(ticket) for ticket in tickets]

    def _answer(self, body: GeneratingBody, outputs: list[RequestOutput]) -> dict[str, Any]:
        return body.answer(outputs, model=self._name_for(body), decode=self._decode_prompt, chat=self.llm.chat_format)

    def _name_for(self, body: GeneratingBody) -> str:
        """The name of what answers: an adapter, or the model."""
        return body.adapter_among(self.llm.adapters) or self.model_name

    async def _away(self, outputs: list[RequestOutput], function: Callable[[], T]) -> T:
        """Run ``function`` elsewhere if it writes log-probabilities, of which there can be millions."""
        if not any(has_logprobs(output) for output in outputs):
            return function()
        return await asyncio.get_running_loop().run_in_executor(self._bodies, function)

    @asynccontextmanager
    async def stream(self, body: GeneratingBody) -> AsyncIterator[Stream]:
        """The answer as server-sent events. Leaving the block, early or not, forgets what is unfinished.

        Raises:
            GossamerError: refused. What fails later is raised by the iterator.
        """
        async with self._submitted(body, stream=True) as tickets:
            answer = body.events(model=self._name_for(body), decode=self._decode_prompt, chat=self.llm.chat_format)
            yield Stream(answer, _events(answer, _updates(tickets), tickets, self._away))

    def with_ids(self, prompt: dict[str, Any]) -> dict[str, Any]:
        """A body's prompt with its token ids, as the engine takes it. Runs in the worker.

        Raises:
            RequestError: it is empty, too long or no text; the chat template refuses the messages.
        """
        if "messages" in prompt:
            ids = self.chat_ids(
                prompt["messages"],
                prompt.get("tools", ()),
                prompt.get("template_kwargs"),
                add_generation_prompt=prompt.get("add_generation_prompt", True),
                continue_final_message=prompt.get("continue_final_message", False),
            )
        else:
            given = prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"]
            ids = self.prompt_ids(given, special=prompt.get("add_special_tokens", True))
        text, most = prompt.get("prompt"), prompt.get("truncate_prompt_tokens")
        if most is not None and len(ids) > most:
            text, ids = None, ids[-most:]
        prompt = {"cache_salt": prompt["cache_salt"]} | ({} if text is None else {"prompt": text})
        self._intake.check_length(len(ids), 1, "")  # what is too long is not worth the engine's time
        return prompt | {"prompt_token_ids": ids}

    def prompt_ids(self, prompt: str | list[int], *, special: bool = True) -> list[int]:
        """The token ids of one prompt. Runs in the worker."""
        if isinstance(prompt, list):
            return self._intake.check_ids(prompt, "", "prompt")
        self._check_characters(len(prompt))
        return self._intake.encode(prompt, "", add_special_tokens=special)[1]

    def chat_ids(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        **ending: bool,
    ) -> list[int]:
        """The token ids of a conversation, up to where the answer begins. Runs in the worker.

        Args:
            ending: ``add_generation_prompt`` and ``continue_final_message``.
        """
        self._check_characters(characters_of(messages))
        if len(messages) > self.llm.engine.max_model_len:  # the template writes at least a token for each
            raise PromptTooLongError(
                f"there are {len(messages)} messages, more than fit into the context of "
                f"{self.llm.engine.max_model_len} tokens",
                param="messages",
            )
        return self.llm.apply_chat_template(
            messages, tools=tools, template_kwargs=template_kwargs, tokenizer=self._tokenizer, **ending
        )

    def conversation_ids(
        self,
        messages: list[dict[str, Any]],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """The token ids that all conversations begin with that begin with these messages. Runs in the worker."""
        ends = ({"role": "user", "content": text} for text in ("A", "b"))
        turns = [self.chat_ids([*messages, end], tools, template_kwargs) for end in ends]
        common = next((i for i, (a, b) in enumerate(zip(*turns, strict=False)) if a != b), min(map(len, turns)))
        return turns[0][:common]

    async def count_tokens(self, body: GeneratingBody) -> int:
        """Tokens of the prompts of a body, which is not answered.

        Raises:
            RequestError: it is empty, too long or no text; the chat template refuses the messages.
        """
        with naming(body.field_names):
            prompts = body.engine_prompts()
            made = [await self.in_worker(partial(self.with_ids, prompt), _size(prompt)) for prompt in prompts]
        return sum(len(prompt["prompt_token_ids"]) for prompt in made)

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
        """The text of token ids. Runs in the worker.

        Raises:
            InvalidPromptError: the model does not have one of them.
        """
        known = self._intake.check_ids(ids, "", "tokens") if ids else []
        return decode(self._tokens, known, skip_special_tokens=False)

    def token_texts(self, ids: list[int]) -> list[str]:
        """The vocabulary's spelling of each token. Runs in the worker."""
        texts: list[str] = self._tokenizer.convert_ids_to_tokens(ids)
        return texts

    async def in_worker(self, function: Callable[[], T], size: int = 0) -> T:
        """Run something that takes a while, with texts or token ids of ``size`` altogether."""
        worker = self._worker if size < LONG_TEXT else self._long_worker
        return await asyncio.get_running_loop().run_in_executor(worker, function)

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
        with naming(body.field_names):
            async with self._computed(body, stream) as tickets:
                yield tickets

    @asynccontextmanager
    async def _computed(self, body: GeneratingBody, stream: bool) -> AsyncIterator[list[Ticket]]:
        """As :meth:`_submitted`; errors have the engine's names."""
        body.answered_by(self.llm.fingerprint)
        params = body.to_sampling_params(advised=self.llm.sampling_defaults, chat=self.llm.chat_format)
        prompts = body.engine_prompts()
        adapter = {"adapter": body.adapter_among(self.llm.adapters)}
        count = params.n * len(prompts)
        if count > self.max_sequences:
            raise RequestError(f"{count} completions are more than the {self.max_sequences} of one request", param="n")
        self._check_logprobs(params)
        async with AsyncExitStack() as stack:
            with self.engine_loop.reserved(count):  # before the work of making tokens
                prompts = [await self.in_worker(partial(self.with_ids, prompt), _size(prompt)) for prompt in prompts]
                await stack.enter_async_context(self._compiled(params))
            tickets: list[Ticket] = []
            for place, prompt in enumerate(prompts):
                request_id = f"req-{uuid.uuid4().hex}"
                draw = None if body.draw is None else body.draw + place
                ticket = await self.engine_loop.submit(request_id, prompt | adapter, params, stream=stream, draw=draw)
                stack.callback(self.engine_loop.release, ticket)
                tickets.append(ticket)
            try:
                yield tickets
            finally:
                if outputs := [ticket.output for ticket in tickets if ticket.output is not None]:
                    body.has_used(usage(outputs))

    def _check_logprobs(self, params: SamplingParams) -> None:
        asked = max(params.logprobs or 0, params.prompt_logprobs or 0)
        if asked > self.max_logprobs:
            raise RequestError(
                f"{asked} log-probabilities for each token are more than the {self.max_logprobs} of this server; "
                "--max-logprobs raises the limit",
                param="logprobs",
            )

    @asynccontextmanager
    async def _compiled(self, params: SamplingParams) -> AsyncIterator[None]:
        """The form that the answer must have, compiled, for as long as the block lasts."""
        if params.structured_outputs is None:
            yield
            return
        grammars = self.llm.engine.factory.grammars
        form = grammars.form(params.structured_outputs)
        opening = asyncio.ensure_future(self.in_worker(partial(grammars.open, form)))
        try:
            grammar = await asyncio.shield(opening)
        except asyncio.CancelledError:
            opening.add_done_callback(partial(_close_opened, grammars))
            raise
        try:
            settled = asyncio.wrap_future(grammar.settled)
            settled.add_done_callback(_seen)  # whatever it is, if nobody waits any more
            await asyncio.shield(settled)
            yield
        finally:
            grammars.close(grammar)


class Stream:
    """The events of an answer, and those that end it where it cannot go on."""

    def __init__(self, answer: StreamedAnswer, events: AsyncIterator[bytes]) -> None:
        self._events = events
        self.failed = answer.failed

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._events


def _seen(future: asyncio.Future[None]) -> None:
    if not future.cancelled():
        future.exception()


def _close_opened(grammars: GrammarCompiler, opening: asyncio.Future[Grammar]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        grammars.close(opening.result())


async def _last(ticket: Ticket) -> RequestOutput:
    async for output in ticket.updates():
        last = output
    return last


Away = Callable[[list[RequestOutput], Callable[[], list[bytes]]], Awaitable[list[bytes]]]


async def _events(
    answer: StreamedAnswer, updates: AsyncIterator[tuple[int, RequestOutput]], tickets: list[Ticket], away: Away
) -> AsyncIterator[bytes]:
    echoed: set[int] = set()  # prompts whose first event, which holds the prompt's log-probabilities, is written
    async for index, output in updates:
        if output.prompt_logprobs is not None and index not in echoed:
            echoed.add(index)
            events = await away([output], partial(_listed, answer, index, output))
        else:
            events = _listed(answer, index, output)
        for event in events:
            yield event
    outputs = [ticket.output for ticket in tickets if ticket.output is not None]
    for event in answer.end(outputs):
        yield event


def _listed(answer: StreamedAnswer, index: int, output: RequestOutput) -> list[bytes]:
    return list(answer.events(index, output))


async def _updates(tickets: list[Ticket]) -> AsyncIterator[tuple[int, RequestOutput]]:
    if len(tickets) == 1:
        async for output in tickets[0].updates():
            yield 0, output
        return
    async for update in _merged(tickets):
        yield update


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


def has_logprobs(output: RequestOutput) -> bool:
    """Whether log-probabilities were asked for."""
    return output.prompt_logprobs is not None or any(each.logprobs is not None for each in output.outputs)


def characters_of(messages: list[dict[str, Any]]) -> int:
    """Characters of a conversation's contents, the arguments of its calls included."""
    calls = (call["function"]["arguments"] for message in messages for call in message.get("tool_calls", ()))
    return sum(len(message["content"]) for message in messages) + sum(len(str(each)) for each in calls)


def _size(prompt: dict[str, Any]) -> int:
    """Characters or token ids of a body's prompt."""
    if "messages" in prompt:
        return characters_of(prompt["messages"]) + len(prompt["messages"])
    return len(prompt["prompt"] if "prompt" in prompt else prompt["prompt_token_ids"])


def _longest_token(tokenizer: Any) -> int:
    """Characters of the longest token: no text of more characters per token exists."""
    return max((len(token) for token in tokenizer.get_vocab()), default=1)
