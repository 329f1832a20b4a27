"""``/v1/chat/completions``: its body, its answer, and the events of its answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, PrivateAttr, model_validator

from gossamer.chat import Answer, AnswerReader, ChatFormat, Part, ToolUse
from gossamer.chat.answer_reader import new_call_id
from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput, Logprob, RequestOutput
from gossamer.protocol.body import GeneratingBody
from gossamer.protocol.chat_messages import Messages, ToolField, template_messages, template_tools
from gossamer.protocol.field_names import FieldNames
from gossamer.protocol.fields import Count
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
from gossamer.sampling_params import ReasoningParams, StructuredOutputsParams


class ChatCompletionRequest(GeneratingBody, BaseModel):  # BaseModel for ruff, as in GeneratingBody
    """Body of ``POST /v1/chat/completions``.

    Attributes:
        max_completion_tokens: OpenAI's present name of ``max_tokens``; a body may use either.
        logprobs: return log-probabilities of the chosen tokens.
        top_logprobs: and of this many most probable ones at each position; the chosen one is always among them.
        tools: functions that the answer may call. Others than functions are passed over, and named in ``ignored``.
        tool_choice: ``"auto"``, ``"none"``, ``"required"``, or a function that has to be called, or some that may be.
        parallel_tool_calls: whether there may be several calls in one answer.
        reasoning_effort: ``"none"`` turns thoughts off; what else it means is the template's.
        max_reasoning_tokens: thoughts end after so many tokens, and the answer goes on.
        chat_template_kwargs: more variables of the chat template.
        continue_final_message: the answer goes on with the last message, which is an assistant's.
        echo: with ``continue_final_message``, the answer begins with the text that it goes on with.
        add_generation_prompt: begin an answer; ``False`` goes on where the template ends the last message.

    >>> ChatCompletionRequest.parse({"messages": [{"role": "user", "content": "Hi"}]}).chat_messages()
    [{'role': 'user', 'content': 'Hi'}]
    """

    url: ClassVar[str] = "/v1/chat/completions"
    description: ClassVar[str] = "Answer a conversation."
    prompt_field: ClassVar[str] = "messages"
    first_names: ClassVar[tuple[str, ...]] = ("functions", "function_call")

    messages: Messages
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: Count = 0
    tools: list[ToolField] = []
    tool_choice: Literal["auto", "none", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    max_reasoning_tokens: Count | None = None
    chat_template_kwargs: dict[str, Any] = {}
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    echo: bool = False

    _use: ToolUse | None = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _first_names(cls, body: object) -> object:
        """OpenAI's first names of tools and of their choice."""
        if not isinstance(body, dict) or not body.keys() & set(cls.first_names):
            return body
        given = dict(body)
        functions, choice = given.pop("functions", None), given.pop("function_call", None)
        if isinstance(functions, list) and "tools" not in given:
            given["tools"] = [{"type": "function", "function": each} for each in functions]
        if choice is not None and "tool_choice" not in given:
            given["tool_choice"] = {"type": "function", "function": choice} if isinstance(choice, dict) else choice
        return given

    @model_validator(mode="after")
    def _conversation_agrees(self) -> Self:
        self.chat_messages()
        self._use = self._find_tool_use()
        if self.echo and not self.continue_final_message:
            raise ValueError("echo needs continue_final_message: true, of which it tells the beginning")
        if self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise ValueError("continue_final_message begins no answer; add_generation_prompt must be false with it")
            last = self.messages[-1]
            if last.role != "assistant" or last.tool_calls:
                raise ValueError("continue_final_message needs an assistant's message without calls at the end")
        return self

    @model_validator(mode="after")
    def _fields_agree(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        limits = {self.max_completion_tokens, self.max_tokens} - {None}
        if len(limits) > 1:
            raise RequestError(
                "max_tokens and max_completion_tokens mean the same; give one of them", param="max_tokens"
            )
        return self

    def chat_messages(self) -> list[dict[str, Any]]:
        """The messages for a chat template."""
        return template_messages(self.messages)

    def tool_use(self) -> ToolUse | None:
        return self._use

    @property
    def field_names(self) -> FieldNames:
        limit = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().field_names, "logprobs": "top_logprobs", "max_tokens": limit}

    @property
    def foreign_calls(self) -> dict[str, str]:
        offered = {tool.function.name for tool in self.tools if tool.function is not None}
        return {
            f"messages.{place}.tool_calls.{number}.function.name": call.function.name
            for place, message in enumerate(self.messages)
            for number, call in enumerate(message.tool_calls or ())
            if call.function.name not in offered
        }

    def _find_tool_use(self) -> ToolUse | None:
        tools, choice = template_tools(self.tools), self.tool_choice
        if not tools:
            if choice not in (None, "auto", "none"):
                raise RequestError("tool_choice asks for a call; there are no tools", param="tool_choice")
            return None
        names, required = _chosen(choice)
        one = isinstance(choice, dict) and choice.get("type") != "allowed_tools"  # this one, and once
        return ToolUse(tools, names, required=required, parallel=self.parallel_tool_calls and not one)

    def template_kwargs(self) -> dict[str, Any]:
        """Variables of the chat template, besides messages and tools."""
        effort = self.reasoning_effort
        given: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
        if effort is not None:
            given["enable_thinking"] = effort != "none"
        return given | self.chat_template_kwargs

    @property
    def ignored(self) -> list[str]:
        others = [f"tools.{place}" for place, each in enumerate(self.tools) if each.type != "function"]
        return [*super().ignored, *others]

    def engine_prompts(self) -> list[Json]:
        use = self.tool_use()
        prompt = {
            "messages": self.chat_messages(),
            "tools": list(use.tools) if use else [],
            "template_kwargs": self.template_kwargs(),
            "add_generation_prompt": self.add_generation_prompt and not self.continue_final_message,
            "continue_final_message": self.continue_final_message,
            "cache_salt": self.cache_salt,
            "truncate_prompt_tokens": self.truncate_prompt_tokens,
        }
        return [prompt]

    def _form(self, chat: ChatFormat | None) -> StructuredOutputsParams | None:
        use, form = self.tool_use(), super()._form(chat)
        if chat is None:
            return form
        if use is None or not use.callable:
            begun = self.continue_final_message
            return form and chat.after_thoughts(form, self.template_kwargs(), begun=begun)
        if form is not None and form.json is None and not form.json_object:
            raise RequestError("tools go with a JSON Schema, not with another form", param="structured_outputs")
        schema = None if form is None else form.json if isinstance(form.json, dict) else {"type": "object"}
        return chat.form(use, self.template_kwargs(), schema, begun=self.continue_final_message)

    def _reasoning(self, chat: ChatFormat | None) -> ReasoningParams | None:
        if chat is None:
            return None
        return chat.reasoning(self.template_kwargs(), self.max_reasoning_tokens, begun=self.continue_final_message)

    def _shows_special_tokens(self, chat: ChatFormat | None) -> bool:
        """Whether special tokens spell calls or thoughts."""
        return chat is not None and chat.needs_special_tokens(self.tool_use())

    def reader(self, chat: ChatFormat | None) -> AnswerReader | None:
        """What reads an answer; ``None`` where all of it is content."""
        return (
            None
            if chat is None
            else chat.reader(self.tool_use(), self.template_kwargs(), begun=self.continue_final_message)
        )

    def answer(
        self, outputs: Sequence[RequestOutput], *, model: str, decode: Decode, chat: ChatFormat | None = None
    ) -> Json:
        [output] = outputs
        choices = [self._choice(completion, chat) for completion in output.outputs]
        body = envelope(new_head("chatcmpl", "chat.completion", model, self._fingerprint), choices, outputs)
        if self.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(output)
        if self.return_token_ids:
            body["prompt_token_ids"] = output.prompt_token_ids
            for choice, completion in zip(choices, output.outputs, strict=True):
                choice["token_ids"] = completion.token_ids
        return body

    def _choice(self, completion: CompletionOutput, chat: ChatFormat | None) -> Json:
        message: Json = {"role": "assistant", "content": self.echoed + completion.text, "refusal": None}
        calls = False
        reader = self.reader(chat)
        if reader is not None:
            answer = Answer.read(completion.text, reader)
            calls = bool(answer.calls)
            message["content"] = self.echoed + answer.content or (None if calls else "")
            if answer.reasoning:
                message["reasoning_content"] = answer.reasoning
            if calls:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                    for call in answer.calls
                ]
        steps = steps_of(completion.token_ids, completion.logprobs)
        return {
            "index": completion.index,
            "message": message,
            "logprobs": self.logprobs_of(within(steps, len(completion.text))),
            "finish_reason": _finish(completion.finish_reason, calls),
            "stop_reason": completion.stop_reason,
        }

    @property
    def echoed(self) -> str:
        """The text that answers begin with."""
        return self.messages[-1].content if self.echo and self.continue_final_message else ""

    def events(self, *, model: str, decode: Decode, chat: ChatFormat | None = None) -> StreamedAnswer:
        return _Events(self, new_head("chatcmpl", "chat.completion.chunk", model, self._fingerprint), chat)

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
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def _logprob_count(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


def _chosen(choice: Any) -> tuple[list[str] | None, bool]:
    """The names that may be called, and whether one has to be, of a ``tool_choice``."""
    if choice is None or choice == "auto":
        return None, False
    if choice == "none":
        return [], False
    if choice == "required":
        return None, True
    if choice.get("type") == "allowed_tools":
        allowed = choice.get("allowed_tools")
        allowed = allowed if isinstance(allowed, dict) else choice
        tools = allowed.get("tools")
        if not isinstance(tools, list):
            raise RequestError("tool_choice.allowed_tools.tools must be a list of functions", param="tool_choice")
        return [_function_name(each) for each in tools], allowed.get("mode") == "required"
    return [_function_name(choice)], True


def _function_name(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise RequestError(
            'tool_choice must be "auto", "none", "required", or {"type": "function", "function": {"name": ...}}',
            param="tool_choice",
        )
    return name


def _finish(reason: str | None, calls: bool) -> str | None:
    """Why an answer ended, in OpenAI's terms: an agent goes on if there are calls to make."""
    return "tool_calls" if calls and reason == "stop" else reason


class _Events(StreamedAnswer):
    def __init__(self, body: ChatCompletionRequest, head: Json, chat: ChatFormat | None) -> None:
        super().__init__(head, **body.streaming)
        self._body = body
        self._chat = chat
        self._readers: dict[int, AnswerReader | None] = {}
        self._called: set[int] = set()  # choices with a call

    def choices(self, index: int, news: News, output: RequestOutput) -> Iterator[Json]:
        if news.first:
            self._readers[index] = self._body.reader(self._chat)
            delta = {"role": "assistant", "content": self._body.echoed}
            yield {"index": index, "delta": delta, "finish_reason": None}
        steps = within(news.steps, news.length)
        reader = self._readers[index]
        if reader is None:
            if news.text or steps or news.finished:
                delta = {"content": news.text} if news.text else {}
                yield {"index": index, "delta": delta, "logprobs": self._body.logprobs_of(steps)} | news.ending
            return
        deltas = [
            self._delta(index, part) for part in reader.push(news.text) + (reader.finish() if news.finished else [])
        ]
        if steps and not deltas:
            deltas = [{}]
        logprobs = self._body.logprobs_of(steps)
        for delta in deltas:
            yield {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
            logprobs = None  # the first tells those of all that came with it
        if news.finished:
            finish = _finish(news.ending["finish_reason"], index in self._called)
            yield {"index": index, "delta": {}, "logprobs": None} | news.ending | {"finish_reason": finish}

    def _delta(self, index: int, part: Part) -> Json:
        if part.kind == "content":
            return {"content": part.text}
        if part.kind == "reasoning":
            return {"reasoning_content": part.text}
        self._called.add(index)
        if part.kind == "call":
            function = {"name": part.text, "arguments": ""}
            return {"tool_calls": [{"index": part.call, "id": new_call_id(), "type": "function", "function": function}]}
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
