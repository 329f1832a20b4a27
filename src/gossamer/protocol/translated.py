"""Endpoints of another shape than ``/v1/chat/completions``, and the same meaning: their bodies become conversations."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, PrivateAttr, model_validator

from gossamer.chat import AnswerReader, Part, ToolUse
from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.chat import ChatCompletionRequest
from gossamer.protocol.field_names import FieldNames, naming, own_name
from gossamer.protocol.responses import Json
from gossamer.protocol.streaming import StreamedAnswer, named_event
from gossamer.sampling_params import SamplingParams


class TranslatedBody(GeneratingBody, BaseModel):  # BaseModel for ruff, as in GeneratingBody
    """A body that asks for one answer of a conversation; the engine sees only the conversation."""

    refuses: ClassVar[tuple[str, ...]] = ("prompt_logprobs", "return_token_ids")

    _chat: ChatCompletionRequest | None = PrivateAttr(None)
    _names: FieldNames = PrivateAttr({})  # of the conversation's fields

    @model_validator(mode="after")
    def _is_a_conversation(self) -> Self:
        if self.n != 1:
            raise RequestError("n must be 1: there is one answer", param="n")
        self._translate()
        return self

    def _translate(self) -> None:
        """Make the conversation."""
        given, self._names = self._as_chat()
        with naming(self._names):
            self._chat = ChatCompletionRequest.parse(given)

    @abstractmethod
    def _as_chat(self) -> tuple[Json, FieldNames]:
        """The same as a body of ``/v1/chat/completions``, and what the fields of that are called here.

        Raises:
            RequestError: something in it is not known here.
        """

    def _common_fields(self) -> Json:
        """The fields that were given, and that all bodies have."""
        names = self.model_fields_set & GeneratingBody.model_fields.keys() - {"stream_options"}
        return {name: getattr(self, name) for name in names}

    @property
    def chat(self) -> ChatCompletionRequest:
        """The conversation."""
        assert self._chat is not None
        return self._chat

    @property
    def field_names(self) -> FieldNames:
        inner = {name: own_name(own, self._names) for name, own in self.chat.field_names.items()}
        return {**self._names, **inner}

    @property
    def foreign_calls(self) -> dict[str, str]:
        return {own_name(path, self._names): name for path, name in self.chat.foreign_calls.items()}

    def tool_use(self) -> ToolUse | None:
        return self.chat.tool_use()

    def engine_prompts(self) -> list[Json]:
        return self.chat.engine_prompts()

    def to_sampling_params(self, *arguments: Any, **named: Any) -> SamplingParams:
        params = self.chat.to_sampling_params(*arguments, **named)
        self._sampling = self.chat._sampling
        return params

    def _logprob_count(self) -> int | None:
        return self.chat._logprob_count()


class PartEvents(StreamedAnswer):
    """Events of one answer that is told part by part: its thoughts, its text, its calls.

    Args:
        head: the first fields of the whole answer.
        reader: what reads the answer; ``None`` where all of it is text.
    """

    def __init__(self, head: Json, reader: AnswerReader | None) -> None:
        super().__init__(head, n=1, include_usage=False)
        self._reader = reader
        self._characters = 0
        self._begun = False
        self._last: CompletionOutput | None = None

    @abstractmethod
    def begin(self, output: RequestOutput) -> Iterator[bytes]:
        """The first events."""

    @abstractmethod
    def tell(self, part: Part) -> Iterator[bytes]:
        """The events of a part."""

    @abstractmethod
    def close(self) -> Iterator[bytes]:
        """The events behind the last part."""

    def choices(self, index: int, news: Any, output: RequestOutput) -> Iterator[Json]:
        raise AssertionError("there is one answer, without choices")

    def events(self, prompt_index: int, output: RequestOutput) -> Iterator[bytes]:
        if not self._begun:
            self._begun = True
            yield from self.begin(output)
        (completion,) = output.outputs
        if self._last is not None and self._last.finish_reason is not None:
            return
        self._last = completion
        text, self._characters = completion.text[self._characters :], len(completion.text)
        finished = completion.finish_reason is not None
        if self._reader is None:
            parts: Sequence[Part] = [Part("content", text)] if text else []
        else:
            parts = self._reader.push(text) + (self._reader.finish() if finished else [])
        for part in parts:
            yield from self.tell(part)
        if finished:
            yield from self.close()

    @staticmethod
    def _named(kind: str, /, **fields: Any) -> bytes:
        return named_event(kind, {"type": kind, **fields})
