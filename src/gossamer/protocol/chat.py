"""``/v1/chat/completions``: its body, its answer, and the events of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gossamer.outputs import Logprob, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.fields import Count, Fields, PositiveCount, drop_nulls
from gossamer.protocol.logprobs import (
    Step,
    finite,
    most_probable,
    prompt_logprobs,
    steps_of,
    token_id_text,
    token_text,
    within,
)
from gossamer.protocol.responses import Decode, Json, envelope, new_head
from gossamer.protocol.streaming import News, StreamedAnswer


def _joined_parts(content: object) -> object:
    """Content may be a list of typed parts; chat templates of text models take one string."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        given = drop_nulls(part)
        # An answer that is sent back may hold a part that says why there is no other.
        kind = "refusal" if isinstance(given, dict) and given.get("type") == "refusal" else "text"
        if not isinstance(given, dict) or given.keys() - {"annotations"} != {"type", kind} or given["type"] != kind:
            raise ValueError('a content part must be {"type": "text", "text": ...}; other types are not supported')
        if not isinstance(given[kind], str):
            raise ValueError("the text of a content part must be a string")
        texts.append(given[kind])
    return "\n".join(texts)


class ChatMessage(Fields):
    """One turn of a conversation, text only.

    Attributes:
        name: who speaks, if several share a role.
        refusal: of an answer without content, what it said instead.
        reasoning_content, reasoning: what a model thought before its answer; servers name it so or so.
        type, annotations: what answers hold besides; they do not influence what follows.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    type: Literal["message"] | None = None
    annotations: list[Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _answers_come_back(cls, message: object) -> object:
        """Answers are sent back as history with the fields that they were given."""
        if not isinstance(message, dict):
            return message
        given: dict[str, Any] = {name: each for name, each in message.items() if each is not None}
        if given.get("tool_calls") == []:
            del given["tool_calls"]
        if given.get("role") == "assistant" and "content" not in given:
            given["content"] = given.get("refusal", "")
        return given

    def for_template(self) -> dict[str, str]:
        """The message as chat templates know it. ``developer`` is OpenAI's later name of ``system``."""
        role = "system" if self.role == "developer" else self.role
        given = {"name": self.name, "reasoning_content": self.reasoning_content or self.reasoning}
        return {"role": role, "content": self.content} | {key: each for key, each in given.items() if each is not None}


#: The first message that is wrong refuses all of them: of thousands, one error is enough.
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages for a chat template."""
    return [message.for_template() for message in messages]


class ChatCompletionRequest(GeneratingBody):
    """Body of ``POST /v1/chat/completions``.

    Attributes:
        max_completion_tokens: OpenAI's present name of ``max_tokens``; a body may use either.
        logprobs: return log-probabilities of the chosen tokens.
        top_logprobs: and of this many most probable ones at each position; the chosen one is always among them.

    >>> ChatCompletionRequest.parse({"messages": [{"role": "user", "content": "Hi"}]}).chat_messages()
    [{'role': 'user', 'content': 'Hi'}]
    """

    url: ClassVar[str] = "/v1/chat/completions"
    description: ClassVar[str] = "Answer a conversation."
    prompt_field: ClassVar[str] = "messages"

    messages: Messages
    max_completion_tokens: PositiveCount | None = None
    logprobs: bool = False
    top_logprobs: Count = 0

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_completion_tokens and self.max_tokens and self.max_completion_tokens != self.max_tokens:
            raise ValueError("max_tokens and max_completion_tokens mean the same; give one of them")
        return self

    def chat_messages(self) -> list[dict[str, str]]:
        """The messages for a chat template."""
        return template_messages(self.messages)

    def engine_prompts(self) -> list[Json]:
        return [{"messages": self.chat_messages(), "cache_salt": self.cache_salt}]

    def answer(self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode) -> Json:
        [output] = outputs
        choices = [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": self.logprobs_of(
                    within(steps_of(completion.token_ids, completion.logprobs), len(completion.text))
                ),
                "finish_reason": completion.finish_reason,
                "stop_reason": completion.stop_reason,
            }
            for completion in output.outputs
        ]
        body = envelope(new_head("chatcmpl", "chat.completion", model), choices, outputs)
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output)
        return body

    def events(self, *, model: str, decode: Decode) -> StreamedAnswer:
        return _Events(self, new_head("chatcmpl", "chat.completion.chunk", model))

    def logprobs_of(self, steps: list[Step]) -> Json | None:
        """The log-probabilities that the body asks for, if it does."""
        if not self.logprobs:
            return None
        content = [
            self._token(step.token, step.candidates[step.token])
            | {"top_logprobs": [self._token(*each) for each in self._top(step)]}
            for step in steps
            if step.candidates is not None
        ]
        return {"content": content, "refusal": None}

    def _top(self, step: Step) -> list[tuple[int, Logprob]]:
        return most_probable(step, self.top_logprobs) if self.top_logprobs else []

    def _token(self, token: int, logprob: Logprob) -> Json:
        text, added = token_text(logprob), logprob.token_bytes
        return {
            "token": token_id_text(token) if self.return_tokens_as_token_ids else text,
            "logprob": finite(logprob.logprob),
            "bytes": list(text.encode() if added is None else added) or None,
        }

    def _token_limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def _logprob_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class _Events(StreamedAnswer):
    def __init__(self, body: ChatCompletionRequest, head: Json) -> None:
        super().__init__(head, n=body.n, include_usage=body.include_usage)
        self._body = body

    def choices(self, index: int, news: News, output: RequestOutput) -> Iterator[Json]:
        if news.first:
            yield {"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        steps = within(news.steps, news.length)
        if news.text or steps or news.finished:
            delta = {"content": news.text} if news.text else {}
            yield {"index": index, "delta": delta, "logprobs": self._body.logprobs_of(steps)} | news.ending
