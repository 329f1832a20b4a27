"""``/v1/chat/completions``: its body, its answer, and the events of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from gossamer.outputs import Logprob, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.fields import Count, PositiveCount, drop_nulls
from gossamer.protocol.logprobs import Step, finite, most_probable, pair_steps, prompt_logprobs, token_text
from gossamer.protocol.responses import Decode, Json, envelope, new_head
from gossamer.protocol.streaming import News, StreamedAnswer

# Fields of messages that Gossamer does not offer: answers that are sent back as history carry these as null.
_NOT_OFFERED_IN_MESSAGES = frozenset({"name", "refusal", "tool_calls", "tool_call_id", "function_call", "audio"})


def _joined_parts(content: object) -> object:
    """Content may be a list of typed parts; chat templates of text models take one string."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not (isinstance(part, dict) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise ValueError('a content part must be {"type": "text", "text": ...}; other types are not supported')
        if not isinstance(part["text"], str):
            raise ValueError("the text of a content part must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


class ChatMessage(BaseModel):
    """One turn of a conversation, text only."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_joined_parts)]

    @model_validator(mode="before")
    @classmethod
    def _null_is_not_given(cls, message: object) -> object:
        return drop_nulls(message, _NOT_OFFERED_IN_MESSAGES)


#: The first message that is wrong refuses all of them: of thousands, one error is enough.
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, str]]:
    """Messages for a chat template. ``developer`` is OpenAI's later name of ``system``; templates know that."""
    return [
        {"role": "system" if message.role == "developer" else message.role, "content": message.content}
        for message in messages
    ]


class ChatCompletionRequest(GeneratingBody):
    """Body of ``POST /v1/chat/completions``.

    Attributes:
        max_completion_tokens: OpenAI's present name of ``max_tokens``; a body may use either.
        logprobs: return log-probabilities of the chosen tokens.
        top_logprobs: and of this many most probable ones at each position.

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

    def prompts(self) -> list[Json]:
        return [{"messages": self.chat_messages(), "cache_salt": self.cache_salt}]

    def answer(self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode) -> Json:
        [output] = outputs
        choices = [
            {
                "index": completion.index,
                "message": {"role": "assistant", "content": completion.text, "refusal": None},
                "logprobs": self.logprobs_of(pair_steps(completion.token_ids, completion.logprobs)),
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
        return _logprobs(steps, self.top_logprobs) if self.logprobs else None

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
        if news.text or news.steps or news.finished:
            delta = {"content": news.text} if news.text else {}
            yield {"index": index, "delta": delta, "logprobs": self._body.logprobs_of(news.steps)} | news.ending


def _logprobs(steps: list[Step], count: int) -> Json:
    """OpenAI's newer form: an object per token."""
    content = [
        _chat_token(candidates[token])
        | {"top_logprobs": [_chat_token(candidate) for candidate in most_probable(candidates, count)]}
        for token, candidates in steps
        if candidates is not None
    ]
    return {"content": content, "refusal": None}


def _chat_token(logprob: Logprob) -> Json:
    text = token_text(logprob)
    # A token may hold only part of a character; its text is then a replacement sign, whose bytes would be wrong.
    exact = "\N{REPLACEMENT CHARACTER}" not in text
    return {"token": text, "logprob": finite(logprob.logprob), "bytes": list(text.encode()) if exact else None}
