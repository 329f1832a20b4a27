"""From the text of an answer, as it comes, to its content, its thoughts, and its calls of functions."""

from __future__ import annotations

import json
import re
import secrets
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from gossamer.chat.call_formats import WILD, CallFormat, Tags
from gossamer.chat.tools import Tool


class Marks(NamedTuple):
    """The texts around thoughts."""

    begin: str
    end: str


THINK = Marks("<think>", "</think>")
#: Marks that templates may have.
MARKS = (THINK, Marks("[THINK]", "[/THINK]"))


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of an answer.

    Attributes:
        kind: what ``text`` goes on with: the content, the thoughts, or the arguments of the call number ``call``. A
            ``"call"`` begins one: ``text`` is the function's name.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = -1


def new_call_id() -> str:
    """``call_`` and 24 letters and digits, as OpenAI's."""
    return "call_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


@dataclass(slots=True)
class Call:
    """A call of a function; ``arguments`` is JSON, cut where the answer was."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=new_call_id)


@dataclass(slots=True)
class Answer:
    """A whole answer, or what there is of it."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    @classmethod
    def read(cls, text: str, reader: AnswerReader | None) -> Answer:
        """What a whole text says; without a reader it is all content."""
        if reader is None:
            return cls(content=text)
        answer = cls()
        for part in [*reader.push(text), *reader.finish()]:
            answer.add(part)
        return answer

    def add(self, part: Part) -> None:
        """Go on with ``part``."""
        if part.kind == "content":
            self.content += part.text
        elif part.kind == "reasoning":
            self.reasoning += part.text
        elif part.kind == "call":
            self.calls.append(Call(part.text))
        else:
            self.calls[part.call].arguments += part.text


class AnswerReader:
    """Reads one answer.

    What may be the beginning of a marker is held back until it is known; all else is told at once. The end of arguments
    is found by reading them, not by looking for what follows: a string may hold that as well.

    Args:
        format: how calls are spelled; ``None`` where there are none.
        tools: those that may be called.
        marks: what stands around the thoughts that may come first; ``None`` if there are none.
        opened: the prompt ends within these.

    >>> from gossamer.chat.call_formats import HERMES
    >>> reader = AnswerReader(HERMES, [Tool("look")])
    >>> for piece in ('Well.\\n<tool', '_call>\\n{"name": "look", "arguments": {"at', '": 1}}\\n</tool_call>'):
    ...     print([(part.kind, part.text) for part in reader.push(piece)])
    [('content', 'Well.')]
    [('call', 'look'), ('arguments', '{"at')]
    [('arguments', '": 1}')]
    """

    def __init__(
        self,
        format: CallFormat | None,
        tools: list[Tool] | None = None,
        *,
        marks: Marks | None = None,
        opened: bool = False,
    ) -> None:
        self._marks = marks or THINK
        self._format = format if tools else None
        self._tools = {tool.name: tool for tool in tools or ()}
        self._pending = ""
        self._ended = False
        self._calls = 0
        self._arguments: _Json | _Parameters | None = None
        self._state = self._thoughts if opened else self._beginning if marks else self._content
        self._blanks = ""  # in front of the marker that was read last
        self._further = False  # a call stands in front of the next one, of those that stand together
        self._begun = False  # something of the content was told
        self._strips = opened  # blanks in front of the next text are dropped

    def push(self, piece: str) -> list[Part]:
        """The parts that are known once ``piece`` has come."""
        self._pending += piece
        parts: list[Part] = []
        before = None
        while before != (before := (self._pending, self._state)):
            parts += self._state()
        return parts

    def finish(self) -> list[Part]:
        """The rest, at the end of the answer."""
        self._ended = True
        return self.push("")

    # --- states: each takes what it knows from the pending text, and may set another ---------------------------

    def _beginning(self) -> Iterator[Part]:
        text = self._pending.lstrip()
        begin = self._marks.begin
        if text.startswith(begin):
            self._pending, self._state, self._strips = text[len(begin) :], self._thoughts, True
        elif self._ended or not begin.startswith(text):
            self._state = self._content
        yield from ()

    def _thoughts(self) -> Iterator[Part]:
        text, found, rest = self._pending.partition(self._marks.end)
        if found:
            yield from self._told("reasoning", text.rstrip())
            self._pending, self._state, self._strips = rest, self._content, True
        else:
            yield from self._told_but(self._marks.end, "reasoning")

    def _content(self) -> Iterator[Part]:
        if self._format is None:
            yield from self._told_all()
            return
        marker = self._format.marker
        if self._format.anchored:
            text = self._pending.lstrip()
            if self._begun or not (text.startswith(marker) or (marker.startswith(text) and not self._ended)):
                yield from self._told_all()
            elif text.startswith(marker):
                self._pending, self._state = text[len(marker) :], self._head
            return
        text, found, rest = self._pending.partition(marker)
        if found:
            content = text.rstrip()
            yield from self._told("content", content)
            self._blanks = text[len(content) :]
            self._further = False
            self._pending, self._state = rest, self._head
        else:
            yield from self._told_but(marker, "content")

    def _head(self) -> Iterator[Part]:
        """What stands between the marker and the arguments."""
        assert self._format is not None
        begin = "" if self._further else self._format.begin
        heads = {f"{begin}{self._format.opening}{name}{self._format.middle}": name for name in self._tools}
        for head, name in heads.items():
            if self._pending.startswith(head):
                self._pending = self._pending[len(head) :]
                tool = self._tools[name]
                tags = self._format.tags
                self._arguments = _Json() if tags is None else _Parameters(tool.parameters or {}, tags)
                self._state = self._within_arguments
                yield Part("call", name, self._calls)
                return
        if any(head.startswith(self._pending) for head in heads):
            return  # not yet known; at the end, a call without a function is dropped
        self._state = self._content
        if not self._further:
            yield from self._told("content", self._blanks + self._format.marker)  # no call after all

    def _within_arguments(self) -> Iterator[Part]:
        assert self._arguments is not None
        told, self._pending = self._arguments.push(self._pending)
        if told:
            yield Part("arguments", told, self._calls)
        if self._arguments.done:
            self._calls += 1
            self._state = self._tail

    def _tail(self) -> Iterator[Part]:
        assert self._format is not None
        closing = self._format.closing
        begins = _begins(closing, self._pending)
        if not begins or len(self._pending) >= len(closing):
            self._pending = self._pending[len(closing) :] if begins else self._pending
            self._state, self._strips = (self._between if self._format.end else self._content), True
        yield from ()

    def _between(self) -> Iterator[Part]:
        """Behind a call of several that stand together."""
        assert self._format is not None
        end, repeat, text = self._format.end, self._format.repeat, self._pending
        if text.startswith(end):
            self._pending, self._state = text[len(end) :], self._content
        elif end.startswith(text) or (repeat.startswith(text) and text != repeat):
            self._pending = "" if self._ended else text  # of what the end of the answer cut, nothing is told
        elif text.startswith(repeat):
            self._pending, self._state, self._further = text[len(repeat) :], self._head, True
        else:
            self._state = self._content
        yield from ()

    # --- texts ------------------------------------------------------------------------------------------------

    def _told(self, kind: Literal["content", "reasoning"], text: str) -> Iterator[Part]:
        if self._strips:
            text = text.lstrip()
        if text:
            self._strips = False
            self._begun = self._begun or kind == "content"
            yield Part(kind, text)

    def _told_all(self) -> Iterator[Part]:
        text, self._pending = self._pending, ""
        yield from self._told("content", text)

    def _told_but(self, marker: str, kind: Literal["content", "reasoning"]) -> Iterator[Part]:
        """All but what may be the beginning of the marker, and blanks in front of it."""
        held = 0 if self._ended else _held(self._pending, marker)
        ready = self._pending[: len(self._pending) - held]
        self._pending = self._pending[len(ready) :]
        yield from self._told(kind, ready)


def _held(text: str, marker: str) -> int:
    """Characters at the end of a text that may be blanks and the beginning of the marker.

    >>> _held("Well. <tool", "<tool_call>")
    6
    """
    start = next((n for n in range(min(len(marker) - 1, len(text)), 0, -1) if text.endswith(marker[:n])), 0)
    return len(text) - len(text[: len(text) - start].rstrip())


def _begins(pattern: str, text: str) -> bool:
    """Whether a text begins as the pattern, which may have wild characters, or is the beginning of it."""
    pairs = zip(pattern, text, strict=False)
    return all(wanted == found or (wanted == WILD and found.isalnum()) for wanted, found in pairs)


_STRUCTURE = re.compile(r'["\\{}\[\]]')


class _Json:
    """Arguments in JSON: they end with the bracket that closes the first one."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = self._escaped = False

    def push(self, text: str) -> tuple[str, str]:
        """What belongs to the arguments, and what follows these."""
        place = 0
        while found := _STRUCTURE.search(text, place):
            if self._escaped and found.start() == 0 and place == 0:  # the backslash came with the piece before
                self._escaped, place = False, 1
                continue
            self._escaped = False
            character, place = found[0], found.end()
            if character == "\\":
                if self._in_string:
                    self._escaped, place = place == len(text), place + 1
            elif character == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += 1 if character in "{[" else -1
                if self._depth == 0:
                    self.done = True
                    return text[:place], text[place:]
        if text and place == 0:
            self._escaped = False
        return text, ""


class _Parameters:
    """Arguments between tags, told as JSON. The schema says which of them are strings."""

    def __init__(self, schema: Mapping[str, Any], tags: Tags) -> None:
        self._tags = tags
        self.done = False
        self._properties = schema.get("properties", {})
        self._key: str | None = None
        self._told = 0  # arguments
        self._opened = False  # the quote of a string is told

    def push(self, text: str) -> tuple[str, str]:
        """JSON of what is known, and what is not yet."""
        told = ""
        opening, named, closing = self._tags
        while True:
            if self._key is None:
                if text.startswith(opening) and named in text:
                    name, _, text = text[len(opening) :].partition(named)
                    told += f"{', ' if self._told else '{'}{json.dumps(name, ensure_ascii=False)}: "
                    self._key, self._opened, self._told = name, False, self._told + 1
                    continue
                if not (text.startswith(opening) or opening.startswith(text)):
                    self.done = True
                    return told + ("}" if self._told else "{}"), text
                return told, text
            value, found, rest = text.partition(closing)
            if self._is_string(self._key):
                if not found:
                    held = _held(text, closing)
                    value, rest = text[: len(text) - held], text[len(text) - held :]
                told += ("" if self._opened else '"') + json.dumps(value, ensure_ascii=False)[1:-1]
                told += '"' if found else ""
                self._opened = True
            elif found:
                told += _as_json(value)
            if not found:
                return told, rest if self._is_string(self._key) else text
            self._key, text = None, rest

    def _is_string(self, key: str) -> bool:
        schema = self._properties.get(key)
        return isinstance(schema, Mapping) and schema.get("type") == "string"


def _as_json(value: str) -> str:
    try:
        json.loads(value)
    except ValueError:
        return json.dumps(value, ensure_ascii=False)
    return value
