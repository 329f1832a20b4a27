"""The events of a stream: from the outputs so far to what is new in them.

An output of the engine holds everything generated until now. Whoever reads slowly gets several tokens in one event; no
event has to wait in a queue for them.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.requests import ChatCompletionRequest, CompletionRequest
from gossamer.protocol.responses import Json, chat_logprobs, completion_logprobs, pair_steps, usage

DONE = b"data: [DONE]\n\n"


def event(body: Json) -> bytes:
    """One server-sent event.

    >>> event({"text": "é"})
    b'data: {"text":"\\xc3\\xa9"}\\n\\n'
    """
    return f"data: {_json(body)}\n\n".encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(slots=True)
class _Sent:
    """How much of a choice has been sent."""

    characters: int = 0
    tokens: int = 0
    offset: int = 0  # characters of its tokens' texts; logprobs tell it
    begun: bool = False
    finished: bool = False


class StreamedAnswer:
    """Makes the events of one streamed answer.

    Args:
        request: the body that is answered.
        model: the name of the model that answers.
        decode: token ids -> text; used for ``echo`` of a prompt.
    """

    def __init__(
        self, request: CompletionRequest | ChatCompletionRequest, *, model: str, decode: Callable[[list[int]], str]
    ) -> None:
        self._request = request
        self._decode = decode
        self._chat = isinstance(request, ChatCompletionRequest)
        prefix, kind = ("chatcmpl", "chat.completion.chunk") if self._chat else ("cmpl", "text_completion")
        self._head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }
        self._usage = request.stream_options is not None and request.stream_options.include_usage
        # Everything but the choice is the same in all events, so it is written only once.
        self._before = f'data: {_json(self._head)[:-1]},"choices":['
        self._after = '],"usage":null}\n\n' if self._usage else "]}\n\n"
        self._sent: dict[int, _Sent] = {}

    def events(self, prompt_index: int, output: RequestOutput) -> Iterator[bytes]:
        """What is new in the output of one of the request's prompts."""
        for completion in output.outputs:
            index = prompt_index * self._request.n + completion.index
            sent = self._sent.setdefault(index, _Sent())
            if not sent.finished:
                yield from self._choice(index, sent, output, completion)

    def end(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        """The last events, once all outputs are complete."""
        if self._usage:
            yield event(self._head | {"choices": [], "usage": usage(outputs)})
        yield DONE

    def _choice(self, index: int, sent: _Sent, output: RequestOutput, completion: CompletionOutput) -> Iterator[bytes]:
        text = completion.text[sent.characters :]
        steps = pair_steps(completion.token_ids, completion.logprobs)[sent.tokens :]
        first = not sent.begun
        sent.begun = True
        sent.characters += len(text)
        sent.tokens = len(completion.token_ids)
        sent.finished = completion.finish_reason is not None
        ending = {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        if isinstance(self._request, ChatCompletionRequest):
            if first:
                yield self._event(
                    {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
                )
            logprobs = chat_logprobs(steps, self._request.top_logprobs) if self._request.logprobs else None
            choice: Json = {"index": index, "delta": {"content": text} if text else {}, "logprobs": logprobs}
        else:
            if first and self._request.echo:
                prompt = output.prompt if output.prompt is not None else self._decode(output.prompt_token_ids)
                text = prompt + text
                steps = [*pair_steps(output.prompt_token_ids, output.prompt_logprobs), *steps]
            logprobs = None
            if self._request.logprobs is not None:
                logprobs = completion_logprobs(steps, self._request.logprobs, self._decode, sent.offset)
                sent.offset += sum(map(len, logprobs["tokens"]))
            choice = {"index": index, "text": text, "logprobs": logprobs}
        if text or steps or sent.finished:
            yield self._event(choice | ending)

    def _event(self, choice: Json) -> bytes:
        return f"{self._before}{_json(choice)}{self._after}".encode()
