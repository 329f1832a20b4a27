"""Calls in a conversation's history: their arguments come back in the spelling in which they were generated.

Clients send arguments back as text, templates want objects and spell them anew: ``1.50`` would become ``1.5``, and the
prefix cache end there. So what a template would spell in another way is hidden from it behind a stand-in.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Any

logger = logging.getLogger("gossamer.chat")

_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*"|[ \t\r\n]+|[,:]')
_ID_LENGTH = 9


def dumped(value: Any) -> str:
    """JSON as transformers' ``tojson`` writes it."""
    return json.dumps(value, ensure_ascii=False)


def as_object(given: Any) -> Any:
    """Arguments as an object. What is broken is one without fields: a client sends back what was cut once."""
    if not isinstance(given, str):
        return given
    try:
        value = json.loads(given)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    if given.strip():
        logger.warning("a tool call of the history has arguments that are no JSON object; they are left out")
    return {}


def as_text(given: Any) -> str:
    """Arguments as JSON, spelled as they came, with the blanks that templates write.

    >>> as_text('{"a":1.50,"b":"x: y"}')
    '{"a": 1.50, "b": "x: y"}'
    """
    if not isinstance(given, str) or not as_object(given):
        return dumped(as_object(given))
    return _TOKENS.sub(_respaced, given.strip())


def _respaced(found: re.Match[str]) -> str:
    text = found[0]
    return text if text.startswith('"') else "" if text.isspace() else f"{text} "


def short_id(id: str | None) -> str:
    """An id of nine letters and digits, the same for the same id.

    >>> short_id("call00001"), len(short_id("call_0123456789"))
    ('call00001', 9)
    """
    if id is not None and re.fullmatch(f"[A-Za-z0-9]{{{_ID_LENGTH}}}", id):
        return id
    return hashlib.sha256((id or "").encode()).hexdigest()[:_ID_LENGTH]


class StandIns:
    """Names that stand for texts while a template is run."""

    def __init__(self) -> None:
        self._key = secrets.token_hex(8)  # nobody's text holds one
        self._texts: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._texts)

    def add(self, text: str) -> str:
        """A name for ``text``."""
        name = f"spelled-{self._key}-{len(self._texts)}-"
        self._texts[name] = text
        return name

    def replaced(self, rendered: str) -> str | None:
        """What was rendered, with the texts in place of their names; ``None`` if the template left one out."""
        found = re.findall(f"spelled-{self._key}-[0-9]+-", rendered)
        if sorted(found) != sorted(self._texts):
            return None
        return re.sub(f'"?(spelled-{self._key}-[0-9]+-)"?', lambda match: self._texts[match[1]], rendered)

    def for_arguments(self, given: Any, *, each: bool) -> Any:
        """Arguments for a template that spells objects itself; as they are if it spells them as they came.

        Args:
            each: it spells each argument apart.
        """
        value, text = as_object(given), as_text(given)
        if dumped(value) == text:
            return value
        if not each:
            return self.add(text)
        raw = _members(text)
        return {
            key: member if isinstance(member, str) or dumped(member) == raw[key] else self.add(raw[key])
            for key, member in value.items()
        }


def _members(text: str) -> dict[str, str]:
    """The values of an object that is spelled as :func:`as_text` does, as text.

    >>> _members('{"a": 1.50, "b": [1, 2]}')
    {'a': '1.50', 'b': '[1, 2]'}
    """
    decoder, place = json.JSONDecoder(), 1
    members: dict[str, str] = {}
    while text[place] != "}":
        key, place = decoder.raw_decode(text, place)
        _, end = decoder.raw_decode(text, place + len(": "))
        members[key] = text[place + len(": ") : end]
        place = end + (len(", ") if text[end] == "," else 0)
    return members


def with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with ids that a template takes which wants them short."""
    found = dict(message)
    if message.get("tool_calls"):
        found["tool_calls"] = [{**call, "id": short_id(call.get("id"))} for call in message["tool_calls"]]
    if message.get("role") == "tool":
        found["tool_call_id"] = short_id(message.get("tool_call_id"))
    return found
