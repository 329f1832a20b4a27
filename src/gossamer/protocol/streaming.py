"""The events of a stream: from the outputs so far to what is new in them.

An output of the engine holds everything generated until now. Whoever reads slowly gets several tokens in one event; no
event has to wait in a queue for them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.logprobs import Step, settled, steps_of
from gossamer.protocol.responses import Json, usage

DONE = b"data: [DONE]\n\n"


def event(body: Json) -> bytes:
    """One server-sent event.

    >>> event({"text": "é"})
    b'data: {"text":"\\xc3\\xa9"}\\n\\n'
    """
    return f"data: {_json(body)}\n\n".encode()


def named_event(name: str, body: Json) -> bytes:
    """One server-sent event with a name.

    >>> named_event("ping", {})
    b'event: ping\\ndata: {}\\n\\n'
    """
    return f"event: {name}\ndata: {_json(body)}\n\n".encode()


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


@dataclass(slots=True)
class _Sent:
    """How much of a choice has been sent."""

    characters: int = 0
    tokens: int = 0  # with their log-probabilities
    ids: int = 0  # of tokens, where these are asked for
    offset: int = 0  # characters that those tokens complete
    begun: bool = False
    finished: bool = False

    def take(self, completion: CompletionOutput) -> News:
        """What is new; from now on it counts as sent."""
        text = completion.text[self.characters :]
        new = None if completion.logprobs is None else completion.logprobs[self.tokens :]
        steps = steps_of(completion.token_ids[self.tokens :], new, self.offset)
        first = not self.begun
        self.begun = True
        self.characters += len(text)
        self.finished = completion.finish_reason is not None
        if not self.finished:
            steps = steps[: settled(steps, self.characters)]
        self.tokens += len(steps)
        self.offset = steps[-1].end if steps else self.offset
        ending = {"finish_reason": completion.finish_reason, "stop_reason": completion.stop_reason}
        return News(text, self.characters, steps, first, self.finished, ending)


@dataclass(frozen=True, slots=True)
class News:
    """What is new in a choice.

    Attributes:
        text: what the text goes on with.
        length: characters of the text, these included.
        steps: the tokens whose text is sent now, with their log-probabilities, if these were asked for.
        first: nothing of the choice has been sent before.
        finished: nothing comes after this.
        ending: the fields that say how the choice ended, or has not yet.
    """

    text: str
    length: int
    steps: list[Step]
    first: bool
    finished: bool
    ending: Json


class StreamedAnswer(ABC):
    """Makes the events of one streamed answer; each kind of body says how its choices look.

    Args:
        head: the first fields of each event.
        n: choices for each prompt.
        include_usage: the last event holds the usage.
        continuous_usage: all events hold it.
        token_ids: choices hold their new tokens, and the first of each the prompt's.
    """

    def __init__(
        self, head: Json, *, n: int, include_usage: bool, continuous_usage: bool = False, token_ids: bool = False
    ) -> None:
        self._head = head
        self._n = n
        self._usage = include_usage
        self._continuous = continuous_usage
        self._token_ids = token_ids
        self._outputs: dict[int, RequestOutput] = {}
        # Everything but the choice is the same in all events, so it is written only once.
        self._before = f'data: {_json(head)[:-1]},"choices":['
        self._after = '],"usage":null}\n\n' if include_usage else "]}\n\n"
        self._sent: dict[int, _Sent] = {}

    @abstractmethod
    def choices(self, index: int, news: News, output: RequestOutput) -> Iterator[Json]:
        """The choices that tell the news of choice ``index``: one for each event. ``output`` is that of its prompt."""

    def events(self, prompt_index: int, output: RequestOutput) -> Iterator[bytes]:
        """What is new in the output of one of the body's prompts."""
        self._outputs[prompt_index] = output
        after = self._after
        if self._continuous:
            after = f'],"usage":{_json(usage(list(self._outputs.values())))}}}\n\n'
        for completion in output.outputs:
            index = prompt_index * self._n + completion.index
            sent = self._sent.setdefault(index, _Sent())
            if not sent.finished:
                news = sent.take(completion)
                choices = list(self.choices(index, news, output))
                if self._token_ids and choices:
                    if news.first:
                        choices[0]["prompt_token_ids"] = output.prompt_token_ids
                    choices[-1]["token_ids"] = completion.token_ids[sent.ids :]
                    sent.ids = len(completion.token_ids)
                for choice in choices:
                    yield f"{self._before}{_json(choice)}{after}".encode()

    def end(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        """The last events, once all outputs are complete."""
        if self._usage:
            yield event(self._head | {"choices": [], "usage": usage(outputs)})
        yield DONE

    def failed(self, error: Json, status: int) -> Iterator[bytes]:
        """The last events of a stream that cannot go on.

        Args:
            error: a body as in :func:`~gossamer.protocol.errors.error_body`.
            status: that a response without a stream would have.
        """
        yield event(error)
        yield DONE
