"""The functions that an answer may call."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jsonschema_rs

from gossamer.errors import RequestError

_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")
MAX_TOOLS = 1024


@cache
def _drafts() -> list[Any]:
    """What checks schemas: the newest draft, and the one that most are written for. Nothing is fetched for that."""
    return [
        jsonschema_rs.Draft202012Validator({"$ref": "https://json-schema.org/draft/2020-12/schema"}, retriever=_refuse),
        jsonschema_rs.Draft7Validator({"$ref": "http://json-schema.org/draft-07/schema#"}, retriever=_refuse),
    ]


def _refuse(uri: str) -> Any:
    raise ValueError(f"{uri} is not fetched")


@dataclass(frozen=True)
class Tool:
    """A function that can be called.

    Attributes:
        name: letters, digits, ``_``, ``-`` and ``.``, 64 at most.
        parameters: a JSON Schema of the object that holds the arguments; ``None`` where there are none.
        strict: a keyword of the schema that cannot be enforced refuses the request.
        description: what it does, for the model.

    Raises:
        RequestError: the name or the schema cannot be one.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    strict: bool = False
    description: str | None = None

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise RequestError(
                f"tools: {self.name[:80]!r} is no name of a function: that has 1 to 64 letters, digits, _, - or .",
                param="tools",
            )
        kind = "object" if self.parameters is None else self.parameters.get("type", "object")
        if kind != "object":
            raise RequestError(
                f"tools: the parameters of {self.name} are of the type {kind!r}; arguments are an object", param="tools"
            )
        schema = dict(self.parameters or {})
        if not any(draft.is_valid(schema) for draft in _drafts()):
            error = next(_drafts()[0].iter_errors(schema))
            where = "".join(f".{step}" for step in error.instance_path)
            raise RequestError(
                f"tools: the parameters of {self.name} are no JSON Schema: parameters{where}: {error.message[:200]}",
                param="tools",
            )

    def for_template(self) -> dict[str, Any]:
        """The tool as chat templates know it."""
        given = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": {key: each for key, each in given.items() if each is not None}}


@dataclass(frozen=True)
class ToolUse:
    """What an answer may do with tools.

    Attributes:
        tools: all that the prompt tells of, in its order.
        names: those that may be called; none for an answer that is told of tools, and has to do without.
        required: there is no answer without a call.
        parallel: there may be several calls.

    Raises:
        RequestError: two tools have one name, or a name is none of theirs.

    >>> [tool.name for tool in ToolUse([Tool("look"), Tool("go")], names=["go"]).callable]
    ['go']
    """

    tools: Sequence[Tool]
    names: Sequence[str] | None = None
    required: bool = False
    parallel: bool = True

    def __post_init__(self) -> None:
        if len(self.tools) > MAX_TOOLS:
            raise RequestError(f"{len(self.tools)} tools are more than {MAX_TOOLS}", param="tools")
        known = [tool.name for tool in self.tools]
        if len(set(known)) < len(known):
            twice = next(name for name in known if known.count(name) > 1)
            raise RequestError(f"tools: two functions have the name {twice!r}", param="tools")
        for name in self.names or ():
            if name not in known:
                raise RequestError(
                    f"tool_choice names the function {name!r}, which is not among the tools", param="tool_choice"
                )

    @property
    def callable(self) -> list[Tool]:
        """The tools that may be called."""
        return [tool for tool in self.tools if self.names is None or tool.name in self.names]
