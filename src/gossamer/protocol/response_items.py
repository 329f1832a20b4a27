"""The items of ``/v1/responses``: read as messages, and written as answers."""

from __future__ import annotations

import base64
import binascii
import json
import logging
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput
from gossamer.protocol.custom_tools import input_of
from gossamer.protocol.field_names import Conversation, within
from gossamer.protocol.responses import Json

logger = logging.getLogger("gossamer.protocol")
_TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")


def read_items(items: Sequence[dict[str, Any]], places: Sequence[str], made: Conversation) -> None:
    """Add items as messages. What one answer is made of, its thoughts, its text and its calls, becomes one message.

    Args:
        items: of the conversation.
        places: the field of the body that each is from.
        made: what they are added to.

    Raises:
        RequestError: an item is of a kind that is not known here, or lacks a field.

    >>> made = Conversation()
    >>> read_items([{"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    ...             {"type": "function_call_output", "call_id": "c", "output": "1"}], ["input.0", "input.1"], made)
    >>> made.messages[1]
    {'role': 'tool', 'tool_call_id': 'c', 'content': '1'}
    """
    for item, where in zip(items, places, strict=True):
        kind = item.get("type", "message")
        if kind == "message":
            _read_message(item, where, made)
        elif kind == "reasoning":
            _read_thoughts(item, where, made)
        elif kind in ("function_call", "custom_tool_call"):
            _read_call(item, where, made)
        elif kind in ("function_call_output", "custom_tool_call_output"):
            message = {"role": "tool", "tool_call_id": _field(item, "call_id", where)}
            message["content"] = _texts(item.get("output"), f"{where}.output")
            made.add(message, where, tool_call_id=within(where, "call_id"), content=within(where, "output"))
        else:
            raise RequestError(f"{where}: items of the type {kind!r} are not supported", param=where)


def _read_message(item: dict[str, Any], where: str, made: Conversation) -> None:
    role, content = _field(item, "role", where), _texts(item.get("content"), f"{where}.content")
    if role == "assistant":
        _open_answer(made, where, "content")["content"] = content
        made.name("content", within(where, "content"))
    else:
        made.add({"role": role, "content": content}, where)


def _read_thoughts(item: dict[str, Any], where: str, made: Conversation) -> None:
    thoughts = _texts(item.get("content"), f"{where}.content") or _sealed(item.get("encrypted_content"))
    thoughts = thoughts or _texts(item.get("summary"), f"{where}.summary")
    if thoughts:
        _open_answer(made, where, "reasoning_content")["reasoning_content"] = thoughts
        made.name("reasoning_content", within(where, "content"))


def _read_call(item: dict[str, Any], where: str, made: Conversation) -> None:
    arguments = item.get("arguments") or ""
    if item["type"] == "custom_tool_call":
        arguments = json.dumps({"input": _texts(item.get("input"), f"{where}.input")}, ensure_ascii=False)
    function = {"name": _field(item, "name", where), "arguments": arguments}
    call = {"id": _field(item, "call_id", where), "type": "function", "function": function}
    _open_answer(made, where, None).setdefault("tool_calls", []).append(call)
    made.name_call(where, id=within(where, "call_id"))


def _open_answer(made: Conversation, where: str, key: str | None) -> dict[str, Any]:
    """The assistant's message at the end, for another part of it; a new one if there is none, or it has its ``key``."""
    last = made.messages[-1] if made.messages else {}
    if last.get("role") != "assistant" or (key is not None and (key in last or "tool_calls" in last)):
        made.add({"role": "assistant"}, where)
    return made.messages[-1]


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


_SEAL = "gossamer:"


def sealed(thoughts: str) -> str:
    """Thoughts in the form of a field that clients keep without reading it; nothing about it is secret.

    >>> _sealed(sealed("Hm."))
    'Hm.'
    """
    return base64.b64encode((_SEAL + thoughts).encode()).decode()


def _sealed(given: object) -> str:
    """The thoughts in such a field; those of another server cannot be read, and are left out."""
    if not isinstance(given, str) or not given:
        return ""
    try:
        text = base64.b64decode(given, validate=True).decode()
    except (binascii.Error, ValueError):
        text = ""
    if not text.startswith(_SEAL):
        logger.warning("encrypted reasoning of another server is left out")
    return text.removeprefix(_SEAL) if text.startswith(_SEAL) else ""


def new_id(prefix: str, tag: str = "") -> str:
    """An id of a response or an item; ``tag`` says which server keeps it."""
    return f"{prefix}_{tag}{'_' if tag else ''}{uuid.uuid4().hex}"


def output_text(text: str, logprobs: list[Json]) -> Json:
    """The part of a message that holds its text."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def status_of(completion: CompletionOutput | None) -> Json:
    """What is different in the last item of an answer that was cut."""
    return {"status": "incomplete"} if completion is not None and completion.finish_reason == "length" else {}


@dataclass(frozen=True)
class ItemWriter:
    """Writes the items of one answer.

    Attributes:
        custom: names of tools that are given a text, not arguments.
        seals: thoughts are also given as ``encrypted_content``.
    """

    custom: frozenset[str] = frozenset()
    seals: bool = False

    def reasoning(self, id: str, text: str) -> Json:
        """Thoughts."""
        item: Json = {"type": "reasoning", "id": id, "summary": []}
        item["content"] = [{"type": "reasoning_text", "text": text}]
        return item | ({"encrypted_content": sealed(text)} if self.seals else {})

    def message(self, id: str, text: str, logprobs: list[Json], status: str = "completed") -> Json:
        """Text of the assistant."""
        content = [output_text(text, logprobs)]
        return {"type": "message", "id": id, "role": "assistant", "status": status, "content": content}

    def call(self, id: str, call_id: str, name: str, arguments: str, status: str = "completed") -> Json:
        """A call of a function, or of a custom tool."""
        item: Json = {"id": id, "call_id": call_id, "name": name, "status": status}
        if name in self.custom:
            return {"type": "custom_tool_call", "input": input_of(arguments)} | item
        return {"type": "function_call", "arguments": arguments} | item
