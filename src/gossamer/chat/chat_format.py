"""What a model's chat template can do with tools and thoughts, found by rendering conversations with it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import Any

from gossamer.chat.answer_reader import MARKS, AnswerReader, Marks, new_call_id
from gossamer.chat.call_formats import HERMES, CallFormat, spelled_in
from gossamer.chat.grammar import answer_grammar, thoughtful
from gossamer.chat.history import StandIns, as_object, as_text, dumped, with_short_ids
from gossamer.chat.tools import Tool, ToolUse
from gossamer.engine.chat_template import Message, render, render_text
from gossamer.errors import ConfigurationError, InvalidPromptError
from gossamer.sampling_params import ReasoningParams, StructuredOutputsParams

_PROBE = Tool(
    "probe_function", {"type": "object", "properties": {"probe_key": {"type": "string"}}}, description="Probe."
)
_INTRODUCTION = """# Functions

You can call these functions; each line describes one:
{tools}

To call a function, write its name and its arguments as JSON, like this:
{call}

What a function returns comes back in <tool_response>."""


class ChatFormat:
    """How one model is told of tools, and how it calls them.

    A template that shows tools, calls and results is used as it is. For another one, tools are described in the system
    message, calls are text of the assistant, and results come from the user.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template.
        defaults: variables of the template for conversations that do not give them.

    Attributes:
        calls: how a call is spelled.
        native: whether the template knows tools.
        marks: what stands around the thoughts that answers may begin with; ``None`` for a model that has none.
    """

    def __init__(self, tokenizer: Any, defaults: Mapping[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._defaults = dict(defaults or {})
        # What decides how the template is run, or is given in another way: another template is a program, for example.
        self._owned = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"} - {"documents"}
        if owned := self._defaults.keys() & self._owned:
            raise ConfigurationError(
                f"default_chat_template_kwargs: {min(owned)} is no variable of a template that can be given"
            )
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # Those that llguidance takes for special: no text holds them.
        self._special = {
            str(token.content): number
            for number, token in added.items()
            if token.special or (token.content.startswith("<") and token.content.endswith(">"))
        }
        self._hidden = [str(token.content) for token in added.values() if token.special]
        template = getattr(tokenizer, "chat_template", None)
        spelled = template if isinstance(template, str) else ""
        self.marks: Marks | None = next((each for each in MARKS if each.begin in spelled), None)
        found, self._as_text, self._short_ids = self._probe()
        self.native = found is not None
        self.calls: CallFormat = found or HERMES
        self._system = self._renders([{"role": "system", "content": "S"}, _USER])
        self._opens = lru_cache(64)(self._find_opened)
        self._closing = self._find_closing()

    def _probe(self) -> tuple[CallFormat | None, bool, bool]:
        """The format in which the template spells calls; whether it wants arguments as text; and ids that are short."""
        for wants_text in (False, True):
            arguments: Any = {"probe_key": "probe value"}
            call = {
                "id": "call00001",
                "type": "function",
                "function": {"name": _PROBE.name, "arguments": json.dumps(arguments) if wants_text else arguments},
            }
            result = {"role": "tool", "tool_call_id": "call00001", "name": _PROBE.name, "content": "probe result"}
            turns: list[Message] = [_USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result]
            text = self._text(turns, tools=[_PROBE.for_template()])
            shown = self._text([_USER], tools=[_PROBE.for_template()])
            if text is None or shown is None or _PROBE.name not in shown or "probe result" not in text:
                continue
            # behind the tools' description, which may hold an example
            if found := spelled_in(text, _PROBE.name, "probe_key", "probe value"):
                long = [turns[0], *(_with_long_id(turn) for turn in turns[1:])]
                return found, wants_text, self._text(long, tools=[_PROBE.for_template()]) is None
        return None, False, False

    def _text(self, messages: Sequence[Message], **options: Any) -> str | None:
        try:
            options = self._defaults | options
            return str(self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
        except Exception:  # templates are programs that come with the model and raise what they like
            return None

    def _renders(self, messages: Sequence[Message]) -> bool:
        return self._text(messages) is not None

    def opens_thoughts(self, template_kwargs: Mapping[str, Any]) -> bool:
        """Whether the prompt of an answer ends within thoughts."""
        if self.marks is None:
            return False
        variables = json.dumps(template_kwargs, sort_keys=True)
        return self._opens(variables) if len(variables) < 1024 else self._find_opened(variables)

    def _find_opened(self, template_kwargs: str) -> bool:
        text = self._text([_USER], add_generation_prompt=True, **json.loads(template_kwargs))
        return text is not None and self.marks is not None and text.rstrip().endswith(self.marks.begin)

    def _find_closing(self) -> str:
        """How the template ends thoughts: what it writes between them and the text of an answer."""
        if self.marks is None:
            return ""
        names = ("reasoning_content", "reasoning", "thinking")
        answer = {"role": "assistant", "content": "probe answer"} | dict.fromkeys(names, "probe thoughts")
        text = self._text([_USER, answer]) or ""
        between = text.partition("probe thoughts")[2].partition("probe answer")[0]
        return between if self.marks.end in between and len(between) < 64 else f"\n{self.marks.end}\n\n"

    @property
    def tools_stand_in(self) -> str:
        """Where a model is told of tools whose template knows none: its system message, or the user's first one."""
        return "the system message" if self._system else "the first message"

    # --- the prompt -------------------------------------------------------------------------------------------

    def prompt_ids(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        template_kwargs: Mapping[str, Any] | None = None,
        *,
        tokenizer: Any = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
    ) -> list[int]:
        """The token ids of a conversation.

        Args:
            messages: those of an assistant may have ``tool_calls``, those of the role ``tool`` answer them.
            tools: what the model is told of.
            template_kwargs: more variables of the template, such as ``enable_thinking``.
            tokenizer: a copy, for other threads.
            add_generation_prompt: go on to where the assistant's answer begins.
            continue_final_message: end within the last message.

        Raises:
            InvalidPromptError: a message is none, or the template refuses them.
        """
        if owned := (template_kwargs or {}).keys() & self._owned:
            raise InvalidPromptError(
                f"chat_template_kwargs: {min(owned)} is no variable of a template that can be given",
                param="chat_template_kwargs",
            )
        known = [tool.for_template() for tool in tools]
        if not self.native and (tools or any(_has_calls(message) for message in messages)):
            messages, known = self._as_texts(messages, known), []
        options = self._defaults | dict(template_kwargs or {}) | ({"tools": known} if known else {})
        if continue_final_message:
            add_generation_prompt, options["continue_final_message"] = False, True
        options["add_generation_prompt"] = add_generation_prompt
        tokenizer = tokenizer or self._tokenizer
        if not self.native:
            return render(tokenizer, messages, **options)
        hidden = StandIns()
        turns = [self._with_arguments(message, hidden) for message in messages]
        if hidden:
            with suppress(InvalidPromptError):  # of a template that looks into arguments; if it stays, it is said below
                text = hidden.replaced(render_text(tokenizer, turns, **options))
                if text is not None:
                    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return render(tokenizer, [self._with_arguments(message, None) for message in messages], **options)

    def _with_arguments(self, message: Message, hidden: StandIns | None) -> Message:
        """The message with calls as the template takes them; ``hidden``: what it would spell in another way."""
        if self._short_ids:
            message = with_short_ids(message)
        if not message.get("tool_calls"):
            return message
        calls = []
        for call in message["tool_calls"]:
            function = call["function"]
            arguments = function["arguments"]
            if self._as_text:
                arguments = as_text(arguments)
            elif hidden is not None:
                arguments = hidden.for_arguments(arguments, each=self.calls.tags is not None)
            else:
                arguments = as_object(arguments)
            calls.append({**call, "function": {**function, "arguments": arguments}})
        return {**message, "tool_calls": calls}

    def _as_texts(self, messages: Sequence[Message], tools: list[dict[str, Any]]) -> list[Message]:
        """The conversation in terms of a template that knows no tools."""
        turns: list[dict[str, Any]] = []
        for message in messages:
            if message.get("role") == "tool":
                text = f"<tool_response>\n{message.get('content') or ''}\n</tool_response>"
                if turns and turns[-1].get("results"):
                    turns[-1]["content"] += f"\n{text}"
                else:
                    turns.append({"role": "user", "content": text, "results": True})
            elif message.get("tool_calls"):
                content = message.get("content") or ""
                spelled = self._spelled(*message["tool_calls"])
                rest = {key: each for key, each in message.items() if key != "tool_calls"}
                turns.append({**rest, "content": f"{content}\n{spelled}" if content else spelled})
            else:
                turns.append(dict(message))
        if tools:
            example = {"function": {"name": "NAME", "arguments": {"ARGUMENT": "VALUE"}}}
            text = _INTRODUCTION.format(tools="\n".join(map(dumped, tools)), call=self._spelled(example))
            role = "system" if self._system else "user"
            if turns and turns[0].get("role") == role:
                turns[0]["content"] = "\n\n".join(each for each in (turns[0].get("content"), text) if each)
            else:
                turns.insert(0, {"role": role, "content": text})
        return [{key: each for key, each in turn.items() if key != "results"} for turn in turns]

    def _spelled(self, *calls: Mapping[str, Any]) -> str:
        functions = [call["function"] for call in calls]
        return self.calls.spell([(each["name"], as_text(each["arguments"])) for each in functions])

    # --- the answer -------------------------------------------------------------------------------------------

    def form(
        self,
        use: ToolUse,
        template_kwargs: Mapping[str, Any],
        schema: Mapping[str, Any] | None = None,
        *,
        begun: bool = False,
    ) -> StructuredOutputsParams | None:
        """What an answer must look like that may call tools; ``None`` if it may call none.

        Args:
            schema: of the text of an answer without calls.
            begun: the prompt holds the beginning of the answer, behind its thoughts.
        """
        if not use.callable:
            return None
        marks, opened = self._thoughts_of(template_kwargs, begun=begun)
        return answer_grammar(self.calls, use, self._special, marks=marks, opened=opened, schema=schema)

    def after_thoughts(
        self, form: StructuredOutputsParams, template_kwargs: Mapping[str, Any], *, begun: bool = False
    ) -> StructuredOutputsParams:
        """The form of an answer of which the text has ``form``, and that may begin with thoughts."""
        marks, opened = self._thoughts_of(template_kwargs, begun=begun)
        if marks is None or form.grammar is not None:
            return form
        return thoughtful(form, self._special, marks, opened=opened)

    def reasoning(
        self, template_kwargs: Mapping[str, Any], max_tokens: int | None = None, *, begun: bool = False
    ) -> ReasoningParams | None:
        """What the engine is told of thoughts; ``None`` if there are none. ``max_tokens`` is how many they may have."""
        marks, opened = self._thoughts_of(template_kwargs, begun=begun)
        if marks is None:
            return None
        return ReasoningParams(
            begin=marks.begin, end=marks.end, begun=opened, max_tokens=max_tokens, closing=self._closing
        )

    def _thoughts_of(self, template_kwargs: Mapping[str, Any], *, begun: bool) -> tuple[Marks | None, bool]:
        """The marks of the thoughts of an answer, and whether the prompt ends within them."""
        marks = None if begun else self.marks
        return marks, marks is not None and self.opens_thoughts(template_kwargs)

    def needs_special_tokens(self, use: ToolUse | None) -> bool:
        """Whether special tokens, which texts are made without, spell calls or thoughts."""
        spelled = self.calls.pieces if use and use.callable else ""
        spelled += "".join(self.marks or ())
        return any(token in spelled for token in self._hidden)

    def reader(
        self, use: ToolUse | None, template_kwargs: Mapping[str, Any], *, begun: bool = False
    ) -> AnswerReader | None:
        """What reads an answer; ``None`` where all of it is content. ``begun``: see :meth:`form`."""
        callable = use.callable if use else []
        marks, opened = self._thoughts_of(template_kwargs, begun=begun)
        if not callable and marks is None:
            return None
        return AnswerReader(self.calls if callable else None, callable, marks=marks, opened=opened)


def _has_calls(message: Message) -> bool:
    return bool(message.get("tool_calls")) or message.get("role") == "tool"


def _with_long_id(message: Message) -> Message:
    """A message of the probe with an id as they come over the API."""
    id = new_call_id()
    calls = [{**call, "id": id} for call in message.get("tool_calls", ())]
    return {**message, "tool_call_id": id} if message.get("role") == "tool" else {**message, "tool_calls": calls}


_USER = {"role": "user", "content": "U"}
