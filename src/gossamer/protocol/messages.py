"""``/v1/messages``, Anthropic's API: its body is translated to a conversation, and the answer told in blocks."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from gossamer.chat import Answer, ChatFormat, Part
from gossamer.errors import RequestError
from gossamer.outputs import RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.errors import anthropic_error
from gossamer.protocol.field_names import Conversation, FieldNames, Whole
from gossamer.protocol.fields import Count, Fields, Stops
from gossamer.protocol.message_blocks import (
    ending,
    new_tool_use_id,
    read_turns,
    system_text,
    text_block,
    thinking_block,
    tool_use_block,
)
from gossamer.protocol.responses import Decode, Json, usage
from gossamer.protocol.streaming import StreamedAnswer, named_event
from gossamer.protocol.translated import PartEvents, TranslatedBody


class OutputConfig(Fields):
    """What the text of an answer looks like, and how much a model thinks first."""

    format: dict[str, Any] | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None


class Thinking(Fields):
    """Whether a model thinks first, and how many tokens of it at most. ``display`` is told and changes nothing."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: Count | None = None
    display: Any = None


class ToolChoice(Fields):
    """Whether tools may be called, have to be, or one of them has to."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessagesRequest(TranslatedBody, BaseModel):  # BaseModel for ruff, as in GeneratingBody
    """Body of ``POST /v1/messages``.

    Attributes:
        messages: turns of a user and an assistant, each a text or a list of blocks. The answer goes on with a last one
            that is the assistant's.
        max_tokens: tokens to generate at most.
        system: the system message.
        tools: functions that the answer may call. Tools that Anthropic itself defines or runs are passed over.
        thinking: ``budget_tokens`` bounds thoughts.

    >>> body = {"system": "Be brief.", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    >>> MessagesRequest.parse(body).chat.chat_messages()
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
    """

    url: ClassVar[str] = "/v1/messages"
    description: ClassVar[str] = "Answer a conversation, in Anthropic's blocks."
    prompt_field: ClassVar[str] = "messages"
    advisory: ClassVar[tuple[str, ...]] = (
        *GeneratingBody.advisory,
        *("context_management", "container", "diagnostics", "inference_geo", "speed"),
    )
    neutral: ClassVar[tuple[str, ...]] = (*GeneratingBody.neutral, "stream_options", "cache_control", "mcp_servers")
    refuses: ClassVar[tuple[str, ...]] = (*TranslatedBody.refuses, "return_tokens_as_token_ids")

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Count
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: Stops = []
    tools: list[dict[str, Any]] = []
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    max_reasoning_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] = {}
    mcp_servers: Annotated[list[Any], Field(max_length=0)] = []
    cache_control: Any = None  # what can be shared is cached without
    context_management: Any = None
    container: Any = None
    diagnostics: Any = None
    inference_geo: Any = None
    speed: Any = None

    @property
    def ignored(self) -> list[str]:
        others = [f"tools.{place}" for place, tool in enumerate(self.tools) if not _is_function(tool)]
        return [*super().ignored, *others]

    def _as_chat(self) -> tuple[Json, FieldNames]:
        made = Conversation()
        if self.system is not None:
            made.add({"role": "system", "content": system_text(self.system)}, Whole("system"))
        read_turns(self.messages, made)
        messages = made.messages
        choice = self.tool_choice or ToolChoice(type="auto")
        config = self.output_config or OutputConfig()
        given: Json = {
            "messages": messages,
            "stop": [*self.stop, *self.stop_sequences],
            "tools": [_nested(tool) for tool in self.tools],
            "tool_choice": self._choice(choice) if self.tools or choice.type in ("any", "tool") else None,
            "parallel_tool_calls": not choice.disable_parallel_tool_use,
            "response_format": _format(config.format) or self.response_format,
            "reasoning_effort": config.effort,
            "chat_template_kwargs": self._thinking() | self.chat_template_kwargs,
            "max_reasoning_tokens": self._most_thoughts(),
        }
        if messages[-1]["role"] == "assistant" and "tool_calls" not in messages[-1]:
            given["continue_final_message"] = True
        return self._common_fields() | given, made.names | self._other_names()

    def _other_names(self) -> dict[str, str]:
        """What the fields of the conversation are called here, besides messages."""
        names = {"reasoning_effort": "output_config.effort"}
        if self.stop_sequences:
            names["stop"] = "stop_sequences"
        if self.max_reasoning_tokens is None:
            names["max_reasoning_tokens"] = "thinking.budget_tokens"
        if self.output_config is not None and self.output_config.format is not None:
            names["response_format"] = Whole("output_config.format")
        for place in range(len(self.tools)):
            names[f"tools.{place}.function"] = f"tools.{place}"
            names[f"tools.{place}.function.parameters"] = f"tools.{place}.input_schema"
        return names

    def _thinking(self) -> Json:
        kind = None if self.thinking is None else self.thinking.type
        return {} if kind in (None, "adaptive", "between_tools") else {"enable_thinking": kind == "enabled"}

    def _most_thoughts(self) -> int | None:
        if self.max_reasoning_tokens is not None or self.thinking is None:
            return self.max_reasoning_tokens
        return self.thinking.budget_tokens

    @staticmethod
    def _choice(choice: ToolChoice) -> Any:
        if choice.type == "tool":
            if choice.name is None:
                raise RequestError("tool_choice.name names the function; it is missing", param="tool_choice.name")
            return {"type": "function", "function": {"name": choice.name}}
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]

    # --- the answer -------------------------------------------------------------------------------------------

    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        [output] = outputs
        (completion,) = output.outputs
        answer = Answer.read(completion.text, self.chat.reader(chat))
        blocks = [thinking_block(answer.reasoning)] if answer.reasoning else []
        blocks += [text_block(answer.content)] if answer.content else []
        blocks += [tool_use_block(new_tool_use_id(), call.name, _object(call.arguments)) for call in answer.calls]
        head = self.head(model, outputs)
        return head | {"content": blocks, **ending(completion, calls=bool(answer.calls))}

    def head(self, model: str, outputs: Sequence[RequestOutput]) -> Json:
        """The message without its content, as it stands when it begins."""
        return {
            "id": f"msg_{uuid.uuid4().hex}",
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": counted(outputs),
        }

    @classmethod
    def error(cls, error: Json, status: int) -> Json:
        return anthropic_error(error, status)

    @classmethod
    def broken(cls, error: Json, status: int, told: int) -> bytes:
        return named_event("error", anthropic_error(error, status))

    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        return _Events(self, model, chat)


def counted(outputs: Sequence[RequestOutput]) -> Json:
    """Tokens of an answer; those that were in the cache are no part of ``input_tokens``."""
    tokens = usage(outputs)
    cached = tokens["prompt_tokens_details"]["cached_tokens"]
    return {
        "input_tokens": tokens["prompt_tokens"] - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": tokens["completion_tokens"],
        "output_tokens_details": {"thinking_tokens": tokens["completion_tokens_details"]["reasoning_tokens"]},
    }


def _is_function(tool: Json) -> bool:
    return tool.get("type", "custom") in ("custom", None)


def _nested(tool: Json) -> Json:
    """A tool as ``/v1/chat/completions`` has it."""
    if not _is_function(tool):
        return {"type": str(tool["type"])}
    names = {"name": "name", "description": "description", "input_schema": "parameters", "strict": "strict"}
    return {"type": "function", "function": {names[name]: each for name, each in tool.items() if name in names}}


def _format(format: Json | None) -> Json | None:
    if format is None:
        return None
    if format.get("type") != "json_schema" or not isinstance(format.get("schema"), dict):
        raise RequestError(
            'output_config.format must be {"type": "json_schema", "schema": ...}', param="output_config.format"
        )
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format["schema"]}}


def _object(arguments: str) -> Json:
    """The arguments of a call. Those that the end of the answer cut are none: the API has no broken ones."""
    try:
        given = json.loads(arguments)
    except ValueError:
        return {}
    return given if isinstance(given, dict) else {}


class _Events(PartEvents):
    """``message_start``, each block from ``start`` over its deltas to ``stop``, ``message_delta``, ``message_stop``."""

    _KINDS: ClassVar[dict[str, str]] = {"content": "text", "reasoning": "thinking", "call": "tool_use"}

    def __init__(self, body: MessagesRequest, model: str, chat: ChatFormat | None) -> None:
        super().__init__({}, body.chat.reader(chat))
        self._body, self._model = body, model
        self._place = -1  # of the block that is open
        self._open: str | None = None
        self._called = False

    def begin(self, output: RequestOutput) -> Iterator[bytes]:
        yield self._named("message_start", message=self._body.head(self._model, [output]))

    def tell(self, part: Part) -> Iterator[bytes]:
        kind = self._KINDS.get(part.kind, "tool_use")
        if part.kind == "call" or kind != self._open:
            yield from self.close()
            yield from self._begin_block(kind, part)
        if part.kind == "content":
            yield self._delta("text_delta", text=part.text)
        elif part.kind == "reasoning":
            yield self._delta("thinking_delta", thinking=part.text)
        elif part.kind == "arguments":
            yield self._delta("input_json_delta", partial_json=part.text)

    def _begin_block(self, kind: str, part: Part) -> Iterator[bytes]:
        self._place, self._open = self._place + 1, kind
        self._called = self._called or kind == "tool_use"
        block = {"text": text_block, "thinking": thinking_block}
        begun = block[kind]("") if kind in block else tool_use_block(new_tool_use_id(), part.text, {})
        yield self._named("content_block_start", index=self._place, content_block=begun)

    def close(self) -> Iterator[bytes]:
        if self._open == "thinking":
            yield self._delta("signature_delta", signature="")
        if self._open is not None:
            yield self._named("content_block_stop", index=self._place)
        self._open = None

    def end(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        yield self._named("message_delta", delta=ending(self._last, calls=self._called), usage=counted(outputs))
        yield self._named("message_stop")

    def failed(self, error: Json, status: int) -> Iterator[bytes]:
        yield self._named("error", error=anthropic_error(error, status)["error"])

    def _delta(self, kind: str, **fields: Any) -> bytes:
        return self._named("content_block_delta", index=self._place, delta={"type": kind, **fields})
