"""The blocks of ``/v1/messages``: read as messages of a conversation, and written as an answer."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Iterable, Iterator
from typing import Any

from gossamer.errors import RequestError
from gossamer.outputs import CompletionOutput
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
    texts = [system] if isinstance(system, str) else [_text(block, "system") for block in system]
    lines = "\n".join(texts).split("\n")
    return "\n".join(line for line in lines if not line.startswith(_CHANGING))


def messages_of(turns: Iterable[Json]) -> list[Json]:
    """Messages as ``/v1/chat/completions`` has them: results of tools become messages of their own.

    Raises:
        RequestError: a message or a block is none that is known here.

    >>> messages_of([{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t", "content": "1"}]}])
    [{'role': 'tool', 'tool_call_id': 't', 'content': '1'}]
    """
    messages: list[Json] = []
    for place, turn in enumerate(turns):
        where = f"messages.{place}"
        role, content = turn.get("role"), turn.get("content")
        if role not in ("user", "assistant", "system"):
            raise RequestError(f"{where}.role must be user, assistant or system", param=f"{where}.role")
        if not isinstance(content, str | list):
            raise RequestError(f"{where}.content must be a text or a list of blocks", param=f"{where}.content")
        blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if role == "assistant":
            messages.append(_answer(blocks, f"{where}.content"))
        else:
            messages += _turn(role, blocks, f"{where}.content")
    return messages


def _turn(role: str, blocks: list[Any], where: str) -> Iterator[Json]:
    """What a user says: texts that follow each other are one message."""
    texts: list[str] = []
    for place, block in enumerate(blocks):
        if isinstance(block, dict) and block.get("type") == "tool_result":
            if texts:
                yield {"role": role, "content": "\n".join(texts)}
                texts = []
            yield _result(block, f"{where}.{place}")
        else:
            texts.append(_text(block, f"{where}.{place}"))
    if texts or not blocks:
        yield {"role": role, "content": "\n".join(texts)}


def _result(block: Json, where: str) -> Json:
    given = block.get("content")
    parts = [given] if isinstance(given, str) else [_text(part, f"{where}.content") for part in given or ()]
    text = "\n".join(parts)
    if block.get("is_error"):
        text = f"Error: {text}"
    id = block.get("tool_use_id")
    if not isinstance(id, str):
        raise RequestError(f"{where}.tool_use_id must be a text", param=f"{where}.tool_use_id")
    return {"role": "tool", "tool_call_id": id, "content": text}


def _answer(blocks: list[Any], where: str) -> Json:
    texts, thoughts, calls = [], [], []
    for place, block in enumerate(blocks):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking" and isinstance(block.get("thinking"), str):
            thoughts.append(block["thinking"])
        elif kind == "redacted_thinking":  # another server's, and unreadable
            continue
        elif kind == "tool_use":
            id, name, given = block.get("id"), block.get("name"), block.get("input")
            if not isinstance(id, str) or not isinstance(name, str) or not isinstance(given, dict):
                raise RequestError(
                    f"{where}.{place}: a tool_use has an id, a name, and an object as its input",
                    param=f"{where}.{place}",
                )
            function = {"name": name, "arguments": json.dumps(given, ensure_ascii=False)}
            calls.append({"id": id, "type": "function", "function": function})
        else:
            texts.append(_text(block, f"{where}.{place}"))
    message: Json = {"role": "assistant", "content": "\n".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    return message | ({"tool_calls": calls} if calls else {})


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
