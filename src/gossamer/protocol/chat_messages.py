"""The messages and tools of a conversation, as clients send them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from gossamer.chat import Tool
from gossamer.errors import RequestError
from gossamer.protocol.fields import Fields, drop_nulls


def _joined_parts(content: object) -> object:
    """Content may be a list of typed parts; chat templates of text models take one string."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        given = drop_nulls(part)
        # An answer that is sent back may hold a part that says why there is no other.
        kind = "refusal" if isinstance(given, dict) and given.get("type") == "refusal" else "text"
        if not isinstance(given, dict) or given.get("type") != kind or kind not in given:
            raise ValueError('a content part must be {"type": "text", "text": ...}; other types are not supported')
        if not isinstance(given[kind], str):
            raise ValueError("the text of a content part must be a string")
        texts.append(given[kind])
    return "\n".join(texts)


class CalledFunction(Fields):
    """A function that was called; arguments are JSON in a string, from some clients the object itself."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Fields):
    """A call in the history. ``index`` is left over from a stream."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class ChatMessage(Fields):
    """One turn of a conversation, text only.

    Attributes:
        name: who speaks, if several share a role; of a tool's result, the tool.
        refusal: of an answer without content, what it said instead.
        reasoning_content, reasoning, thinking: what a model thought before its answer; servers name it so or so.
        tool_calls: functions that an answer called.
        tool_call_id: of a result, the call that it belongs to.
        type, annotations: what answers hold besides; they do not influence what follows.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_joined_parts)]
    name: str | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
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
        if given.get("role") == "function":  # OpenAI's first name of a result
            given["role"] = "tool"
        return given

    @model_validator(mode="after")
    def _fields_belong_to_the_role(self) -> ChatMessage:
        if self.tool_calls and self.role != "assistant":
            raise ValueError(f"tool_calls belong to an assistant's message, not to one of the role {self.role}")
        return self

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates know it. ``developer`` is OpenAI's later name of ``system``."""
        role = "system" if self.role == "developer" else self.role
        given: dict[str, Any] = {
            "name": self.name,
            "reasoning_content": self.reasoning_content or self.reasoning or self.thinking,
            "tool_calls": self.tool_calls and [_call_for_template(call) for call in self.tool_calls],
            "tool_call_id": self.tool_call_id,
        }
        return {"role": role, "content": self.content} | {key: each for key, each in given.items() if each is not None}


def _call_for_template(call: ToolCall) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": call.function.arguments}
    return ({} if call.id is None else {"id": call.id}) | {"type": "function", "function": function}


#: The first message that is wrong refuses all of them: of thousands, one error is enough.
Messages = Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Messages for a chat template.

    Raises:
        RequestError: a result belongs to no call before it.
    """
    called: set[str] = set()
    for place, message in enumerate(messages):
        if message.tool_calls:
            called |= {call.id for call in message.tool_calls if call.id is not None}
        elif message.role == "tool" and message.tool_call_id is not None and message.tool_call_id not in called:
            where = f"messages.{place}.tool_call_id"
            raise RequestError(f"{where} is {message.tool_call_id[:80]!r}; no message before called that", param=where)
    return [message.for_template() for message in messages]


class FunctionField(Fields):
    """A function as it is offered."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolField(Fields):
    """A tool as it is offered. Only functions can be: tools that OpenAI itself runs are not here."""

    model_config = ConfigDict(extra="allow")

    type: str
    function: FunctionField | None = None

    @model_validator(mode="after")
    def _a_function_is_given(self) -> ToolField:
        if self.type == "function" and self.function is None:
            raise ValueError('a tool of type "function" needs the field function')
        return self


def template_tools(tools: Sequence[ToolField]) -> list[Tool]:
    """The functions among the tools.

    Raises:
        RequestError: one cannot be a function.
    """
    functions = [each.function for each in tools if each.function is not None and each.type == "function"]
    return [Tool(each.name, each.parameters, bool(each.strict), each.description) for each in functions]
