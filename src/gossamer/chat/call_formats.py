"""How families of models spell calls of functions. A new family is an entry here.

marker begin CALL (repeat CALL)* end        CALL = opening NAME middle ARGUMENTS closing
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

#: Stands for a letter or digit of an id that the model chooses, in ``closing``.
WILD = "\0"


class Tags(NamedTuple):
    """An argument that is no JSON by itself: ``opening KEY named VALUE closing``; strings stand there as they are."""

    opening: str
    named: str
    closing: str


@dataclass(frozen=True)
class CallFormat:
    """The spelling of the calls of an answer.

    Attributes:
        marker: by which calls are known: no other text holds it.
        begin, end: around all calls.
        opening, middle, closing: around the name and the arguments of each.
        repeat: in front of each further call.
        tags: around each argument; ``None`` where arguments are one JSON object.
        anchored: a call is all of an answer, from its first character on.
        several: whether an answer can hold more than one.
    """

    name: str
    marker: str
    opening: str
    middle: str
    closing: str
    repeat: str
    begin: str = ""
    end: str = ""
    tags: Tags | None = None
    anchored: bool = False
    several: bool = True

    @property
    def pieces(self) -> str:
        """All that is spelled besides names and arguments."""
        each = (self.marker, self.begin, self.opening, self.middle, self.closing, self.repeat, self.end)
        return "".join([*each, *(self.tags or ())])

    def spell(self, calls: list[tuple[str, str]]) -> str:
        """Calls as text, of names and arguments that are spelled already.

        >>> HERMES.spell([("look", '{"at": 1}')])
        '<tool_call>\\n{"name": "look", "arguments": {"at": 1}}\\n</tool_call>'
        """
        each = (f"{self.opening}{name}{self.middle}{arguments}{self.closing}" for name, arguments in calls)
        return f"{self.marker}{self.begin}{self.repeat.join(each)}{self.end}"


_NAMED, _NAMED_END = '{"name": "', '", "arguments": '

# Qwen 2.5 and 3, Hermes, Granite 4, SmolLM3 and others that were trained alike.
HERMES = CallFormat("hermes", "<tool_call>", f"\n{_NAMED}", _NAMED_END, "}\n</tool_call>", repeat="\n<tool_call>")
LLAMA = CallFormat("llama", _NAMED, "", '", "parameters": ', "}", repeat="", anchored=True, several=False)
# Mistral Small 3.2, Ministral, Devstral.
MISTRAL = CallFormat("mistral", "[TOOL_CALLS]", "", "[ARGS]", "", repeat="[TOOL_CALLS]")
# Mistral Nemo, and before it Mistral 7B 0.3.
_MISTRAL_ID = f', "id": "{WILD * 9}"}}'
MISTRAL_LIST = CallFormat(
    "mistral-list", "[TOOL_CALLS]", _NAMED, _NAMED_END, _MISTRAL_ID, repeat=", ", begin="[", end="]"
)
MISTRAL_SPACED_LIST = CallFormat(
    "mistral-spaced-list", "[TOOL_CALLS]", _NAMED, _NAMED_END, _MISTRAL_ID, repeat=", ", begin=" [", end="]"
)
# Qwen3-Coder, Qwen3.5, Nemotron 3.
QWEN_XML = CallFormat(
    "qwen-xml",
    "<tool_call>",
    "\n<function=",
    ">\n",
    "</function>\n</tool_call>",
    repeat="\n<tool_call>",
    tags=Tags("<parameter=", ">\n", "\n</parameter>\n"),
)
GLM = CallFormat(
    "glm",
    "<tool_call>",
    "",
    "\n",
    "</tool_call>",
    repeat="\n<tool_call>",
    tags=Tags("<arg_key>", "</arg_key>\n<arg_value>", "</arg_value>\n"),
)
_DEEPSEEK, _DEEPSEEK_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
# DeepSeek V3 and R1.
DEEPSEEK = CallFormat(
    "deepseek",
    _DEEPSEEK,
    "<｜tool▁call▁begin｜>function<｜tool▁sep｜>",
    "\n```json\n",
    "\n```<｜tool▁call▁end｜>",
    repeat="\n",
    end=_DEEPSEEK_END,
)
DEEPSEEK_V31 = CallFormat(
    "deepseek-v3.1",
    _DEEPSEEK,
    "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>",
    "<｜tool▁call▁end｜>",
    repeat="",
    end=_DEEPSEEK_END,
)
# Phi-4-mini.
PHI = CallFormat("phi", "<|tool_call|>", _NAMED, _NAMED_END, "}", repeat=", ", begin="[", end="]<|/tool_call|>")

_ALL = (HERMES, LLAMA, MISTRAL, MISTRAL_LIST, MISTRAL_SPACED_LIST, QWEN_XML, GLM, DEEPSEEK, DEEPSEEK_V31, PHI)
FORMATS = {each.name: each for each in _ALL}


def spelled_in(text: str, name: str, key: str, value: str) -> CallFormat | None:
    """The format in which a rendered conversation spells the call ``name(key="value")``; ``None`` for none of these.

    >>> spelled_in('<tool_call>\\n{"name": "f", "arguments": {"k": "v"}}\\n</tool_call>', "f", "k", "v").name
    'hermes'
    """
    for each in FORMATS.values():
        tags = each.tags
        arguments = f"{tags.opening}{key}{tags.named}{value}{tags.closing}" if tags else f'{{"{key}": "{value}"}}'
        if re.search(pattern_of(each.spell([(name, arguments)])), text):
            return each
    return None


def pattern_of(text: str) -> str:
    """A regular expression that matches a text with wild characters.

    >>> bool(re.fullmatch(pattern_of("[" + WILD * 2 + "]"), "[a1]"))
    True
    """
    return re.escape(text).replace(re.escape(WILD), "[A-Za-z0-9]")
