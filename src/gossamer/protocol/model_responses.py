"""``/v1/responses``: its body is translated to a conversation, and the answer told as items.

Nothing is stored: a client sends the whole conversation each time, which the prefix cache makes as cheap.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, PrivateAttr, model_validator

from gossamer.chat import Answer, AnswerReader, ChatFormat, Part, ToolUse
from gossamer.chat.answer_reader import new_call_id
from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.chat import ChatCompletionRequest
from gossamer.protocol.fields import Count, Fields, PositiveCount
from gossamer.protocol.logprobs import steps_of, within
from gossamer.protocol.responses import Decode, Json, new_head, usage
from gossamer.protocol.streaming import StreamedAnswer, named_event
from gossamer.sampling_params import SamplingParams

_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_LOGPROBS = "message.output_text.logprobs"


class TextSettings(Fields):
    """What the text of an answer looks like; ``format`` is OpenAI's ``response_format``, less its nesting."""

    format: dict[str, Any] | None = None
    verbosity: Any = None


class ReasoningSettings(Fields):
    """How much a model thinks first. Summaries are not made: thoughts are told as they are."""

    effort: str | None = None
    summary: Any = None
    generate_summary: Any = None


class ResponsesRequest(GeneratingBody, BaseModel):  # BaseModel for ruff, as in GeneratingBody
    """Body of ``POST /v1/responses``.

    Attributes:
        input: a question, or the items of a conversation: messages, calls of functions, and what these returned.
        instructions: the system message.
        tools: functions that the answer may call. Tools that OpenAI itself runs are passed over.
        max_output_tokens: tokens to generate at most.

    >>> ResponsesRequest.parse({"input": "Hi", "instructions": "Be brief."}).chat.chat_messages()
    [{'role': 'system', 'content': 'Be brief.'}, {'role': 'user', 'content': 'Hi'}]
    """

    url: ClassVar[str] = "/v1/responses"
    description: ClassVar[str] = "Answer a conversation, in items."
    prompt_field: ClassVar[str] = "input"

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: PositiveCount | None = None
    text: TextSettings | None = None
    reasoning: ReasoningSettings | None = None
    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    top_logprobs: Count = 0
    include: list[str] = []
    previous_response_id: str | None = None
    truncation: Literal["disabled"] | None = None
    chat_template_kwargs: dict[str, Any] = {}
    client_metadata: Any = None
    max_tool_calls: Any = None

    _chat: ChatCompletionRequest = PrivateAttr()

    @model_validator(mode="after")
    def _is_a_conversation(self) -> Self:
        if self.previous_response_id is not None:
            raise RequestError(
                "previous_response_id: no responses are stored here; send all items of the conversation as input",
                param="previous_response_id",
            )
        if self.n != 1:
            raise RequestError("n must be 1: a response is one answer", param="n")
        self._chat = ChatCompletionRequest.parse(self._as_chat())
        return self

    @property
    def chat(self) -> ChatCompletionRequest:
        """The same as a body of ``/v1/chat/completions``."""
        return self._chat

    @property
    def ignored(self) -> list[str]:
        names = ("client_metadata", "max_tool_calls")
        others = [f"tools.{place}" for place, each in enumerate(self.tools) if each.get("type") != "function"]
        return [*super().ignored, *(name for name in names if getattr(self, name) is not None), *others]

    def _as_chat(self) -> dict[str, Any]:
        asks = _LOGPROBS in self.include or self.top_logprobs > 0
        given: dict[str, Any] = {
            "messages": [*self._instructed(), *messages_of(self.input)],
            "tools": [_nested(tool) for tool in self.tools],
            "tool_choice": self._choice(),
            "parallel_tool_calls": self.parallel_tool_calls,
            "response_format": self._format(),
            "max_completion_tokens": self.max_output_tokens,
            "reasoning_effort": self.reasoning and self.reasoning.effort,
            "logprobs": asks,
            "top_logprobs": self.top_logprobs,
            "chat_template_kwargs": self.chat_template_kwargs,
        }
        own = self.model_fields_set & GeneratingBody.model_fields.keys() - {"response_format", "stream_options"}
        return {name: getattr(self, name) for name in own} | given

    def _instructed(self) -> list[dict[str, Any]]:
        return [] if self.instructions is None else [{"role": "system", "content": self.instructions}]

    def _choice(self) -> Any:
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") == "allowed_tools":
            listed = choice.get("tools")
            tools = [_nested(tool) for tool in listed if isinstance(tool, dict)] if isinstance(listed, list) else None
            return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode"), "tools": tools}}
        return _nested(choice)

    def _format(self) -> dict[str, Any] | None:
        format = None if self.text is None else self.text.format
        if not format or format.get("type") != "json_schema":
            return format
        return {"type": "json_schema", "json_schema": {name: each for name, each in format.items() if name != "type"}}

    # --- the engine's side is that of the conversation --------------------------------------------------------

    def tool_use(self) -> ToolUse | None:
        return self.chat.tool_use()

    def engine_prompts(self) -> list[Json]:
        return self.chat.engine_prompts()

    def to_sampling_params(self, *arguments: Any, **named: Any) -> SamplingParams:
        return self.chat.to_sampling_params(*arguments, **named)

    def _logprob_count(self) -> int | None:
        return self.top_logprobs

    # --- the answer -------------------------------------------------------------------------------------------

    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        [output] = outputs
        (completion,) = output.outputs
        answer = Answer.read(completion.text, self.chat.reader(chat))
        items = []
        if answer.reasoning:
            items.append(_reasoning(_id("rs"), answer.reasoning))
        if answer.content or not answer.calls:
            items.append(_message(_id("msg"), answer.content, self._logprobs(completion)))
        items += [_call(_id("fc"), call.id, call.name, call.arguments) for call in answer.calls]
        items[-1] |= _status(completion)
        return self.response(self.head(model), items, completion, outputs)

    def _logprobs(self, completion: CompletionOutput) -> list[Json]:
        steps = within(steps_of(completion.token_ids, completion.logprobs), len(completion.text))
        found = self.chat.logprobs_of(steps)
        return [] if found is None else found["content"]

    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        return _Events(self, self.head(model), chat)

    def head(self, model: str) -> Json:
        """The first fields of a response."""
        head = new_head("resp", "response", model)
        return {"id": head["id"].replace("-", "_"), "object": "response", "created_at": head["created"], "model": model}

    def response(
        self,
        head: Json,
        items: list[Json],
        completion: CompletionOutput | None = None,
        outputs: Sequence[RequestOutput] = (),
    ) -> Json:
        """The object that a response is, finished or not."""
        reason = completion and completion.finish_reason
        status = "in_progress" if reason is None else "incomplete" if reason == "length" else "completed"
        echoed = ("instructions", "max_output_tokens", "temperature", "top_p", "parallel_tool_calls", "top_logprobs")
        return {
            **head,
            "status": status,
            "output": items,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **{name: getattr(self, name) for name in echoed},
            "tools": self.tools,
            "tool_choice": self.tool_choice or "auto",
            "text": {"format": (self.text and self.text.format) or {"type": "text"}},
            "reasoning": {"effort": self.reasoning and self.reasoning.effort, "summary": None},
            "metadata": self.metadata or {},
            "previous_response_id": None,
            "store": False,
            "truncation": "disabled",
            "user": self.user,
            "usage": None if status == "in_progress" else _usage(outputs),
        }


def messages_of(given: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items as messages. What one answer is made of, its thoughts, its text and its calls, becomes one message.

    Raises:
        RequestError: an item is of a kind that is not known here, or lacks a field.

    >>> messages_of([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    ...              {"type": "function_call_output", "call_id": "c", "output": "1"}])[1]
    {'role': 'tool', 'tool_call_id': 'c', 'content': '1'}
    """
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    messages: list[dict[str, Any]] = []
    for place, item in enumerate(given):
        where, kind = f"input.{place}", item.get("type", "message")
        if kind == "message":
            role, content = _field(item, "role", where), _texts(item.get("content"), f"{where}.content")
            if role == "assistant":
                message = _open_answer(messages, "content")
                message["content"] = content
            else:
                messages.append({"role": role, "content": content})
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            _open_answer(messages, "reasoning_content")["reasoning_content"] = _texts(parts, f"{where}.content")
        elif kind == "function_call":
            function = {"name": _field(item, "name", where), "arguments": item.get("arguments") or ""}
            call = {"id": _field(item, "call_id", where), "type": "function", "function": function}
            _open_answer(messages, None).setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            output = _texts(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": _field(item, "call_id", where), "content": output})
        else:
            raise RequestError(f"{where}: items of the type {kind!r} are not supported", param=where)
    return messages


def _open_answer(messages: list[dict[str, Any]], key: str | None) -> dict[str, Any]:
    """The assistant's message at the end, for another part of it; a new one if there is none, or it has its ``key``."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (key is not None and (key in last or "tool_calls" in last)):
        messages.append({"role": "assistant"})
    return messages[-1]


def _field(item: dict[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name} must be a string", param=f"{where}.{name}")
    return value


def _texts(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for part in content if isinstance(content, list) else [None]:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, dict) else None
        if kind not in (*_TEXTS, "refusal") or not isinstance(text, str):
            raise RequestError(f"{where} must be a string or a list of texts; {kind!r} is not supported", param=where)
        texts.append(text)
    return "\n".join(texts)


def _nested(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool, or the choice of one, as ``/v1/chat/completions`` has it."""
    if tool.get("type") != "function":
        return {"type": str(tool.get("type"))}
    return {"type": "function", "function": {name: each for name, each in tool.items() if name != "type"}}


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def _reasoning(id: str, text: str) -> Json:
    return {"type": "reasoning", "id": id, "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def _output_text(text: str, logprobs: list[Json]) -> Json:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _message(id: str, text: str, logprobs: list[Json], status: str = "completed") -> Json:
    content = [_output_text(text, logprobs)]
    return {"type": "message", "id": id, "role": "assistant", "status": status, "content": content}


def _status(completion: CompletionOutput | None) -> Json:
    """What is different in the last item of an answer that was cut."""
    return {"status": "incomplete"} if completion is not None and completion.finish_reason == "length" else {}


def _call(id: str, call_id: str, name: str, arguments: str, status: str = "completed") -> Json:
    called = {"call_id": call_id, "name": name, "arguments": arguments}
    return {"type": "function_call", "id": id, **called, "status": status}


def _usage(outputs: Sequence[RequestOutput]) -> Json:
    counted = usage(outputs)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": counted["prompt_tokens_details"],
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
    }


class _Events(StreamedAnswer):
    """The events of a response: each has its number, and those of an item its place and its id."""

    def __init__(self, body: ResponsesRequest, head: Json, chat: ChatFormat | None) -> None:
        super().__init__(head, n=1, include_usage=False)
        self._body = body
        self._reader: AnswerReader | None = body.chat.reader(chat)
        self._number = 0
        self._characters = 0
        self._items: list[Json] = []  # those that are complete
        self._open: Json | None = None  # the one that is being told, and its text
        self._text = ""
        self._last: CompletionOutput | None = None

    def choices(self, index: int, news: Any, output: RequestOutput) -> Iterator[Json]:
        raise AssertionError("a response has no choices")

    def events(self, prompt_index: int, output: RequestOutput) -> Iterator[bytes]:
        if self._number == 0:
            started = self._body.response(self._head, [])
            yield self._event("response.created", response=started)
            yield self._event("response.in_progress", response=started)
        (completion,) = output.outputs
        if self._last is not None and self._last.finish_reason is not None:
            return
        self._last = completion
        text, self._characters = completion.text[self._characters :], len(completion.text)
        finished = completion.finish_reason is not None
        if self._reader is None:
            parts = [Part("content", text)] if text else []
        else:
            parts = self._reader.push(text) + (self._reader.finish() if finished else [])
        for part in parts:
            yield from self._tell(part)
        if finished:
            if not self._items and self._open is None:
                yield from self._begin("message", "")
            yield from self._close(last=True)

    def end(self, outputs: Sequence[RequestOutput]) -> Iterator[bytes]:
        response = self._body.response(self._head, self._items, self._last, outputs)
        yield self._event(f"response.{response['status']}", response=response)

    def _event(self, name: str, /, **fields: Any) -> bytes:
        self._number += 1
        return named_event(name, {"type": name, "sequence_number": self._number - 1, **fields})

    def _of_item(self, name: str, /, **fields: Any) -> bytes:
        assert self._open is not None
        return self._event(name, item_id=self._open["id"], output_index=len(self._items), **fields)

    def _tell(self, part: Part) -> Iterator[bytes]:
        kind = {"content": "message", "reasoning": "reasoning"}.get(part.kind, "function_call")
        if part.kind == "call" or self._open is None or self._open["type"] != kind:
            yield from self._close()
            yield from self._begin(kind, part.text)
        if part.kind == "call":
            return
        self._text += part.text
        if part.kind == "content":
            yield self._of_item("response.output_text.delta", content_index=0, delta=part.text, logprobs=[])
        elif part.kind == "reasoning":
            yield self._of_item("response.reasoning_text.delta", content_index=0, delta=part.text)
        else:
            yield self._of_item("response.function_call_arguments.delta", delta=part.text)

    def _begin(self, kind: str, name: str) -> Iterator[bytes]:
        self._text = ""
        if kind == "message":
            self._open = _message(_id("msg"), "", [], "in_progress") | {"content": []}
        elif kind == "reasoning":
            self._open = _reasoning(_id("rs"), "") | {"content": []}
        else:
            self._open = _call(_id("fc"), new_call_id(), name, "", "in_progress")
        yield self._event("response.output_item.added", output_index=len(self._items), item=self._open)
        if kind == "message":
            yield self._of_item("response.content_part.added", content_index=0, part=_output_text("", []))

    def _close(self, *, last: bool = False) -> Iterator[bytes]:
        if self._open is None:
            return
        item, text = self._open, self._text
        if item["type"] == "message":
            logprobs = self._body._logprobs(self._last) if self._last is not None else []
            yield self._of_item("response.output_text.done", content_index=0, text=text, logprobs=logprobs)
            yield self._of_item("response.content_part.done", content_index=0, part=_output_text(text, logprobs))
            done = _message(item["id"], text, logprobs)
        elif item["type"] == "reasoning":
            yield self._of_item("response.reasoning_text.done", content_index=0, text=text)
            done = _reasoning(item["id"], text)
        else:
            yield self._of_item("response.function_call_arguments.done", name=item["name"], arguments=text)
            done = _call(item["id"], item["call_id"], item["name"], text)
        done |= _status(self._last) if last else {}
        yield self._event("response.output_item.done", output_index=len(self._items), item=done)
        self._items.append(done)
        self._open = None
