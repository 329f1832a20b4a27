"""Fields by the names that a client has for them, where the body is translated on its way to the engine."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from gossamer.errors import RequestError

#: Path of a field where it is used -> path of the field that it was made from.
FieldNames = Mapping[str, str]


class Whole(str):
    """The path of a field that nothing within has a name of its own, such as a text that becomes a message."""


def own_name(path: str, names: FieldNames) -> str:
    """The client's name of a field: by the longest part of its path that has one.

    >>> own_name("messages.1.content", {"messages": "input", "messages.1": "input.0", "messages.0": Whole("rules")})
    'input.0.content'
    >>> own_name("messages.0.content", {"messages.0": Whole("rules")})
    'rules'
    """
    steps = path.split(".")
    for end in range(len(steps), 0, -1):
        name = names.get(".".join(steps[:end]))
        if name is not None:
            return str(name) if isinstance(name, Whole) else ".".join([name, *steps[end:]])
    return path


def within(where: str, name: str) -> str:
    """The path of a field within ``where``.

    >>> within("input.0", "content"), within(Whole("input"), "content")
    ('input.0.content', 'input')
    """
    return where if isinstance(where, Whole) else f"{where}.{name}"


@contextmanager
def naming(names: FieldNames) -> Iterator[None]:
    """Errors that leave the block name the client's fields, in ``param`` and in the message.

    >>> with naming({"max_tokens": "max_output_tokens"}):
    ...     raise RequestError("max_tokens must be at least 0, got -1", param="max_tokens")
    Traceback (most recent call last):
    ...
    gossamer.errors.RequestError: max_output_tokens must be at least 0, got -1
    """
    try:
        yield
    except RequestError as error:
        rename(error, names)
        raise


def rename(error: RequestError, names: FieldNames) -> None:
    """Make an error name the client's fields, in place."""
    given = error.param
    if given is not None:
        error.param = own_name(given, names)
        if error.message.startswith(given):
            error.message = error.param + error.message[len(given) :]
    # Messages name other fields too. A name with an underscore cannot be meant as a word.
    for name, own in names.items():
        if "_" in name and "." not in name and not error.message.startswith(own):
            error.message = re.sub(rf"(?<![\w.]){name}(?![\w.])", own, error.message)


@dataclass
class Conversation:
    """Messages that are made from something else, and what their fields are called there.

    Attributes:
        messages: as ``/v1/chat/completions`` has them.
        names: of their fields.

    >>> made = Conversation()
    >>> made.add({"role": "tool", "tool_call_id": "c"}, "input.0", tool_call_id="input.0.call_id")
    >>> own_name("messages.0.tool_call_id", made.names)
    'input.0.call_id'
    """

    messages: list[dict[str, Any]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, message: dict[str, Any], where: str, **fields: str) -> None:
        """One more message.

        Args:
            where: what it is made from.
            fields: what its fields are made from, where that has another name than in the message.
        """
        self.messages.append(message)
        self.names[f"messages.{len(self.messages) - 1}"] = where
        for name, own in fields.items():
            self.name(name, own)

    def name(self, path: str, own: str) -> None:
        """Say what a field of the last message is made from."""
        self.names[f"messages.{len(self.messages) - 1}.{path}"] = own

    def name_call(self, own: str, *, id: str) -> None:
        """Say what the last call of the last message is made from.

        Args:
            own: what has the fields of the function, ``name`` and ``arguments``.
            id: the field that is the call's id.
        """
        call = f"tool_calls.{len(self.messages[-1]['tool_calls']) - 1}"
        self.name(call, own)
        self.name(f"{call}.function", own)
        self.name(f"{call}.id", id)
