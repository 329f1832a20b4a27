"""The blocks of ``/v1/messages``: read as messages of a conversation, and written as an answer."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable
from typing import Any

from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput
from gossamer.protocol.field_names import Conversation
from gossamer.protocol.responses import Json

# The line that one client heads its system prompt with differs in each request: no prefix behind it would be found.
_CHANGING = "x-anthropic-billing-header:"
_STOPS = {"stop": "end_turn", "length": "max_tokens"}


def system_text(system: str | list[Json]) -> str:
    """The system message, without a line that counts requests.

    Raises:
        RequestError: a block is none of text.

    >>> system_text([{"type": "text", "text": "x-anthropic-billing-header: cch=1;"}, {"type": "text", "text": "Hi"}])
    'Hi'
    """
    texts = [system] if isinstance(system, str) else [_text(block, f"system.{n}") for n, block in enumerate(system)]
    lines = "\n".join(texts).split("\n")
    return "\n".join(line for line in lines if not line.startswith(_CHANGING))


def read_turns(turns: Iterable[Json], made: Conversation) -> None:
    """Add messages as ``/v1/chat/completions`` has them: results of tools become messages of their own.

    Args:
        turns: messages of a user and an assistant.
        made: what they are added to.

    Raises:
        RequestError: a message or a block is none that is known here.

    >>> made = Conversation()
    >>> read_turns([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]}], made)
    >>> made.messages
    [{'role': 'tool', 'tool_call_id': 't', 'content': '1'}]
    """
    for place, turn in enumerate(turns):
        where = f"messages.{place}"
        role, content = turn.get("role"), turn.get("content")
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"{where}.role must be user, assistant or system", param=f"{where}.role")
        if not isinstance(content, str | list):
            raise RequestError(f"{where}.content must be a text or a list of blocks", param=f"{where}.content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role == "assistant":
            _read_answer(blocks, where, made)
        else:
            _read_turn(role, blocks, where, made)


def _read_turn(role: str, blocks: list[Any], where: str, made: Conversation) -> None:
    """What a user says: texts that follow each other are one message."""
    texts: list[str] = []
    for place, block in enumerate(blocks):
        name = f"{where}.content.{place}"
        if isinstance(block, dict) and block.get("type") == "tool_result":
            if texts:
                made.add({"role": role, "content": "\n".join(texts)}, where)
                texts = []
            made.add(_result(block, name), name, tool_call_id=f"{name}.tool_use_id")
        else:
            texts.append(_text(block, name))
    if texts or not blocks:
        made.add({"role": role, "content": "\n".join(texts)}, where)


def _result(block: Json, where: str) -> Json:
    given = block.get("content")
    if not isinstance(given, str | list | None):
        raise RequestError(f"{where}.content must be a text or a list of texts", param=f"{where}.content")
    parts = [given] if isinstance(given, str) else [_text(part, f"{where}.content") for part in given or ()]
    text = "\n".join(parts)
    if block.get("is_error"):
        text = f"Error: {text}"
    id = block.get("tool_use_id")
    if not isinstance(id, str):
        raise RequestError(f"{where}.tool_use_id must be a text", param=f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": id, "content": text}


def _read_answer(blocks: list[Any], where: str, made: Conversation) -> None:
    texts: list[str] = []
    thoughts: list[str] = []
    message: Json = {"role": "assistant"}
    made.add(message, where)
    for place, block in enumerate(blocks):
        name = f"{where}.content.{place}"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "redacted_thinking":  # another server's, and unreadable
            continue
        elif kind == "tool_use":
            message.setdefault("tool_calls", []).append(_call(block, name))
            made.name_call(name, id=f"{name}.id")
        else:
            texts.append(_text(block, name))
    message["content"] = "\n".join(texts)
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)


def _call(block: Json, where: str) -> Json:
    id, name, given = block.get("id"), block.get("name"), block.get("input")
    if not isinstance(id, str) or not isinstance(name, str) or not isinstance(given, dict):
        raise RequestError(f"{where}: a tool_use has an id, a name, and an object as its input", param=where)
    function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
    return {"id": id, "type": "function", "function": function}


def _text(block: Any, where: str) -> str:
    kind = block.get("type") if isinstance(block, dict) else None
    if kind != "text" or not isinstance(block.get("text"), str):
        raise RequestError(f"{where}: blocks of the type {kind!r} are not supported; only texts are", param=where)
    text: str = block["text"]
    return text


# --- the answer ------------------------------------------------------------------------------------------------


def new_tool_use_id() -> str:
    """``toolu_`` and 24 letters and digits."""
    return "toolu_" + "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(24))


def text_block(text: str) -> Json:
    """Text of an answer."""
    return {"type": "text", "text": text}


def thinking_block(text: str) -> Json:
    """Thoughts. Nobody signs them here."""
    return {"type": "thinking", "thinking": text, "signature": ""}


def tool_use_block(id: str, name: str, given: Json) -> Json:
    """A call."""
    return {"type": "tool_use", "id": id, "name": name, "input": given}


def ending(completion: CompletionOutput | None, *, calls: bool) -> Json:
    """Why an answer ended; nothing yet if it has not."""
    reason = None if completion is None else completion.finish_reason
    if completion is None or reason is None:
        return {"stop_reason": None, "stop_sequence": None}
    if isinstance(completion.stop_reason, str):
        return {"stop_reason": "stop_sequence", "stop_sequence": completion.stop_reason}
    stop = "tool_use" if calls and reason == "stop" else _STOPS.get(reason, reason)
    return {"stop_reason": stop, "stop_sequence": None}
