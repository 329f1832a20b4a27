"""``/v1/responses``: its body is translated to a conversation, and the answer told as items.

A client may send the whole conversation each time, which the prefix cache makes cheap, or the id of the response that
it goes on from, where the server keeps responses.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, PrivateAttr

from gossamer.chat import Answer, ChatFormat
from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.chat import ChatCompletionRequest
from gossamer.protocol.custom_tools import as_function, unenforced
from gossamer.protocol.field_names import Conversation, FieldNames, Whole
from gossamer.protocol.fields import Count, Fields
from gossamer.protocol.logprobs import steps_of, within
from gossamer.protocol.response_events import ResponseEvents
from gossamer.protocol.response_items import ItemWriter, new_id, read_items, status_of
from gossamer.protocol.response_store import OwnedResponses
from gossamer.protocol.responses import Decode, Json, usage
from gossamer.protocol.streaming import StreamedAnswer, named_event
from gossamer.protocol.translated import TranslatedBody

_LOGPROBS = "message.output_text.logprobs"
_ENCRYPTED = "reasoning.encrypted_content"
_OFFERED = ("function", "custom")  # types of tools


class TextSettings(Fields):
    """What the text of an answer looks like; ``format`` is OpenAI's ``response_format``, less its nesting."""

    format: dict[str, Any] | None = None
    verbosity: Any = None


class ReasoningSettings(Fields):
    """How much a model thinks first. Summaries are not made: thoughts are told as they are."""

    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponsesRequest(TranslatedBody, BaseModel):  # BaseModel for ruff, as in GeneratingBody
    """Body of ``POST /v1/responses``.

    Attributes:
        input: a question, or the items of a conversation: messages, calls of functions, and what these returned.
        instructions: the system message.
        tools: functions that the answer may call, and custom tools. Tools that OpenAI itself runs are passed over.
        previous_response_id: the conversation goes on from this response, which the server has kept. The instructions
            of that are not taken over.
        store: whether the response is kept; it is, unless this is false.
        max_output_tokens: tokens to generate at most.

    >>> ResponsesRequest.parse({"input": "Hi", "instructions": "Be brief."}).chat.chat_messages()
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
    """

    url: ClassVar[str] = "/v1/responses"
    description: ClassVar[str] = "Answer a conversation, in items."
    prompt_field: ClassVar[str] = "input"
    advisory: ClassVar[tuple[str, ...]] = (
        *(name for name in GeneratingBody.advisory if name != "store"),
        *("client_metadata", "max_tool_calls"),
    )
    neutral: ClassVar[tuple[str, ...]] = (*GeneratingBody.neutral, "stream_options", "truncation")

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Count | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    top_logprobs: Count = 0
    include: list[str] = []
    previous_response_id: str | None = None
    truncation: Literal["disabled"] | None = None
    max_reasoning_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] = {}
    client_metadata: Any = None
    max_tool_calls: Any = None

    _kept: OwnedResponses | None = PrivateAttr(None)
    _items: list[Json] = PrivateAttr([])  # of the whole conversation, once it is known
    _num_kept: int = PrivateAttr(0)  # of these, that are no part of the input

    def _translate(self) -> None:
        if self.previous_response_id is None and not any(_is_reference(item) for item in self._given()):
            self._resolve([], self._given())

    def remember(self, responses: OwnedResponses) -> None:
        """Go on from what is kept, and keep the answer.

        Raises:
            ResponseNotFoundError: the body goes on from what is not there.
            RequestError: the whole conversation is none.
        """
        self._kept = responses
        if self._chat is None:
            before = [] if self.previous_response_id is None else responses.conversation(self.previous_response_id)
            given = [responses.item(str(item.get("id"))) if _is_reference(item) else item for item in self._given()]
            self._resolve(before, given)

    def _resolve(self, before: list[Json], given: list[Json]) -> None:
        self._items, self._num_kept = [*before, *given], len(before)
        super()._translate()

    @property
    def chat(self) -> ChatCompletionRequest:
        """The same as a body of ``/v1/chat/completions``.

        Raises:
            RequestError: it goes on from a response, and none are kept where it is answered.
        """
        if self._chat is None:
            raise RequestError(
                "previous_response_id and references to items need a server that keeps responses; send all items of "
                "the conversation as input",
                param="previous_response_id" if self.previous_response_id else "input",
            )
        return self._chat

    def _given(self) -> list[Json]:
        """The input as items."""
        return [{"role": "user", "content": self.input}] if isinstance(self.input, str) else self.input

    @property
    def ignored(self) -> list[str]:
        ignored = super().ignored
        for place, tool in enumerate(self.tools):
            if tool.get("type") not in _OFFERED:
                ignored.append(f"tools.{place}")
            elif tool.get("type") == "custom" and unenforced(tool):
                ignored.append(f"tools.{place}.format")
        return ignored

    def _as_chat(self) -> tuple[Json, FieldNames]:
        made = Conversation()
        if self.instructions is not None:
            made.add({"role": "system", "content": self.instructions}, Whole("instructions"))
        places: list[str] = [Whole("previous_response_id")] * self._num_kept
        places += [Whole("input")] if isinstance(self.input, str) else [f"input.{n}" for n in range(len(self.input))]
        read_items(self._items, places, made)
        asks = _LOGPROBS in self.include or self.top_logprobs > 0
        given: dict[str, Any] = {
            "messages": made.messages,
            "tools": [_nested(tool) for tool in self.tools],
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format() or self.response_format,
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "max_reasoning_tokens": self.max_reasoning_tokens,
            "logprobs": asks,
            "top_logprobs": self.top_logprobs,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        return self._common_fields() | given, made.names | self._other_names()

    def _other_names(self) -> dict[str, str]:
        """What the fields of the conversation are called here, besides messages."""
        names = {"messages": "input", "reasoning_effort": "reasoning.effort"}
        if self.max_output_tokens is not None:
            names["max_completion_tokens"] = "max_output_tokens"
        if self.text is not None and self.text.format:
            names["response_format"] = names["response_format.json_schema"] = "text.format"
        for place, tool in enumerate(self.tools):
            custom = tool.get("type") == "custom"
            names[f"tools.{place}.function"] = f"tools.{place}"
            names[f"tools.{place}.function.parameters"] = f"tools.{place}.{'format' if custom else 'parameters'}"
        return names

    def _choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") != "allowed_tools":
            return _chosen(choice, "tool_choice")
        listed = choice.get("tools")
        if not isinstance(listed, list):
            raise RequestError("tool_choice.tools must be a list of functions", param="tool_choice.tools")
        tools = [_chosen(tool, f"tool_choice.tools.{place}") for place, tool in enumerate(listed)]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}

    def _format(self) -> dict[str, Any] | None:
        format = None if self.text is None else self.text.format
        if not format or format.get("type") != "json_schema":
            return format
        return {"type": "json_schema", "json_schema": {name: each for name, each in format.items() if name != "type"}}

    # --- the answer -------------------------------------------------------------------------------------------

    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        [output] = outputs
        (completion,) = output.outputs
        answer = Answer.read(completion.text, self.chat.reader(chat))
        write = self.writer()
        items = []
        if answer.reasoning:
            items.append(write.reasoning(new_id("rs", self.tag), answer.reasoning))
        if answer.content or not answer.calls:
            items.append(write.message(new_id("msg", self.tag), answer.content, self.logprobs(completion)))
        items += [write.call(new_id("fc", self.tag), call.id, call.name, call.arguments) for call in answer.calls]
        items[-1] |= status_of(completion)
        response = self.response(self.head(model), items, completion, outputs)
        self.keep(response)
        return response

    @classmethod
    def broken(cls, error: Json, status: int, told: int) -> bytes:
        about = {"code": error["error"]["code"], "message": error["error"]["message"], "param": error["error"]["param"]}
        return named_event("error", {"type": "error", "sequence_number": told} | about)

    def writer(self) -> ItemWriter:
        """What writes the items of the answer."""
        custom = frozenset(str(tool.get("name")) for tool in self.tools if tool.get("type") == "custom")
        return ItemWriter(custom, seals=_ENCRYPTED in self.include)

    def keep(self, response: Json) -> None:
        """Keep the answer, if it is to be kept."""
        if self._kept is not None and self.store is not False:
            items = [{"id": new_id("item"), "type": "message"} | item for item in self._items]
            self._kept.keep(response, items)

    def logprobs(self, completion: CompletionOutput) -> list[Json]:
        """Those of the text, if they were asked for."""
        steps = within(steps_of(completion.token_ids, completion.logprobs), len(completion.text))
        found = self.chat.logprobs_of(steps)
        return [] if found is None else found["content"]

    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        return ResponseEvents(self, self.head(model), chat)

    def head(self, model: str) -> Json:
        """The first fields of a response."""
        id = new_id("resp", self.tag)
        return {"id": id, "object": "response", "created_at": int(time.time()), "model": model}

    @property
    def tag(self) -> str:
        """Of the server that keeps the answer."""
        return "" if self._kept is None else self._kept.tag

    def response(
        self,
        head: Json,
        items: list[Json],
        completion: CompletionOutput | None = None,
        outputs: Sequence[RequestOutput] = (),
        error: Json | None = None,
    ) -> Json:
        """The object that a response is, finished or not; ``error`` says why there is no more of it."""
        reason = completion and completion.finish_reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        status = "failed" if error else status
        echoed = ("instructions", "max_output_tokens", "temperature", "top_p", "parallel_tool_calls", "top_logprobs")
        return {
            **head,
            "status": status,
            "output": items,
            "error": error,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: self._sampling.get(name, getattr(self, name)) for name in echoed},
            "tools": self.tools,
            "tool_choice": self.tool_choice or "auto",
            "text": {"format": (self.text and self.text.format) or {"type": "text"}},
            "reasoning": {"effort": self.reasoning and self.reasoning.effort, "summary": None},
            "metadata": self.metadata or {},
            "previous_response_id": self.previous_response_id,
            "store": self._kept is not None and self.store is not False,
            "truncation": "disabled",
            "user": self.user,
            "usage": _usage(outputs) if outputs else None,
        }


def _is_reference(item: Json) -> bool:
    return item.get("type") == "item_reference"


def _chosen(choice: Any, where: str) -> Json:
    """The choice of a tool, as ``/v1/chat/completions`` has it."""
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind not in _OFFERED:
        raise RequestError(f"{where}.type must be function or custom, got {kind!r}", param=f"{where}.type")
    name = choice.get("name")
    if not isinstance(name, str):
        raise RequestError(f"{where}.name must be a string", param=f"{where}.name")
    return {"type": "function", "function": {"name": name}}


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool as ``/v1/chat/completions`` has it."""
    if tool.get("type") == "custom":
        return {"type": "function", "function": as_function(tool)}
    if tool.get("type") != "function":
        return {"type": str(tool.get("type"))}
    return {"type": "function", "function": {name: each for name, each in tool.items() if name != "type"}}


def _usage(outputs: Sequence[RequestOutput]) -> Json:
    counted = usage(outputs)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": counted["prompt_tokens_details"],
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": counted["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": counted["total_tokens"],
    }
