"""How families of models spell a call of a function. A new family is a line here, if its arguments are in JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CallFormat:
    """The spelling ``marker opening NAME middle ARGUMENTS closing``; with ``between`` before each further call.

    Attributes:
        marker: by which a call is known: no other text holds it.
        arguments: JSON, or a ``<parameter=KEY>`` for each.
        anchored: a call is all of an answer, from its first character on.
        several: whether an answer can hold more than one.
    """

    name: str
    marker: str
    opening: str
    middle: str
    closing: str
    between: str = "\n"
    arguments: Literal["json", "parameters"] = "json"
    anchored: bool = False
    several: bool = True


HERMES = CallFormat("hermes", "<tool_call>", '\n{"name": "', '", "arguments": ', "}\n</tool_call>")
LLAMA = CallFormat("llama", '{"name": "', "", '", "parameters": ', "}", anchored=True, several=False)
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", "", "[ARGS]", "", between="")
QWEN_XML = CallFormat(
    "qwen-xml", "<tool_call>", "\n<function=", ">\n", "</function>\n</tool_call>", arguments="parameters"
)

FORMATS = {each.name: each for each in (HERMES, LLAMA, MISTRAL, QWEN_XML)}

PARAMETER, PARAMETER_NAMED, PARAMETER_END = "<parameter=", ">\n", "\n</parameter>\n"


def spelled_in(text: str, name: str, key: str, value: str) -> CallFormat | None:
    """The format in which a rendered conversation spells the call ``name(key="value")``; ``None`` for none of these.

    >>> spelled_in('<tool_call>\\n{"name": "f", "arguments": {"k": "v"}}\\n</tool_call>', "f", "k", "v").name
    'hermes'
    """
    as_json, as_parameter = f'{{"{key}": "{value}"}}', f"{PARAMETER}{key}{PARAMETER_NAMED}{value}{PARAMETER_END}"
    for each in FORMATS.values():
        arguments = as_json if each.arguments == "json" else as_parameter
        if f"{each.marker}{each.opening}{name}{each.middle}{arguments}{each.closing}" in text:
            return each
    return None
