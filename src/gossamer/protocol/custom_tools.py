"""Custom tools of ``/v1/responses``: they are given a text. To the model, each is a function with one string."""

from __future__ import annotations

import json
import re
from typing import Any

_HEAD = re.compile(r'\s*\{\s*"input"\s*:\s*"')
# What stands for itself in a string of JSON, or is an escape that is complete.
_READABLE = re.compile(r'(?:[^"\\]|\\u[0-9A-Fa-f]{4}|\\[^u])*')
_HIGH_HALF = re.compile(r"[\ud800-\udbff]\Z")


def as_function(tool: dict[str, Any]) -> dict[str, Any]:
    """A custom tool as a function. A regular expression becomes a pattern; the model is told of another grammar.

    >>> as_function({"type": "custom", "name": "note"})["parameters"]["required"]
    ['input']
    """
    given: dict[str, Any] = {"type": "string"}
    description = tool.get("description") or ""
    grammar = _grammar(tool)
    if grammar.get("syntax") == "regex" and isinstance(grammar.get("definition"), str):
        given["pattern"] = f"^(?:{grammar['definition']})$"
    elif "definition" in grammar:
        description = f"{description}\n\nThe input follows this grammar:\n{grammar['definition']}".strip()
    parameters = {"type": "object", "properties": {"input": given}, "required": ["input"]}
    return {"name": tool.get("name"), "parameters": parameters} | ({"description": description} if description else {})


def unenforced(tool: dict[str, Any]) -> bool:
    """Whether the form of the tool's input is told to the model, and not enforced."""
    return _grammar(tool).get("syntax", "regex") != "regex"


def _grammar(tool: dict[str, Any]) -> dict[str, Any]:
    """The grammar of a tool's input, in either of the two nestings that OpenAI has for it."""
    format = tool.get("format")
    if not isinstance(format, dict) or format.get("type") != "grammar":
        return {}
    inner = format.get("grammar")
    return inner if isinstance(inner, dict) else format


class InputReader:
    """From the arguments of such a function, as they come, to the text.

    >>> reader = InputReader()
    >>> [reader.push(piece) for piece in ('{"input": "a', '\\\\', 'nb"}')]
    ['a', '', '\\nb']
    """

    def __init__(self) -> None:
        self._pending = ""
        self._within = self._ended = False

    def push(self, arguments: str) -> str:
        """What is known of the text once the arguments go on with these."""
        self._pending += arguments
        if not self._within:
            head = _HEAD.match(self._pending)
            if head is None:
                return ""
            self._pending, self._within = self._pending[head.end() :], True
        if self._ended:
            return ""
        found = _READABLE.match(self._pending)
        assert found is not None
        text: str = json.loads(f'"{found[0]}"', strict=False)
        rest = self._pending[found.end() :]
        self._ended = rest.startswith('"')
        if not self._ended and _HIGH_HALF.search(text):  # of a character that is two escapes
            text, rest = text[:-1], found[0][-6:] + rest
        self._pending = rest
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def input_of(arguments: str) -> str:
    """The text in whole arguments, or in what there is of them."""
    return InputReader().push(arguments)
