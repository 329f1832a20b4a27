"""A prompt as bytes, without the tokenizer and the chat template of the model: what prompts begin with in common, these
bytes begin with in common, in the order in which chat templates write it.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from typing import Any


def rendered(prompt: Mapping[str, Any]) -> bytes:
    """The bytes of one of a body's ``engine_prompts()``.

    >>> rendered({"prompt": "Once"})
    b'Once'
    >>> rendered({"messages": [{"role": "user", "content": "Hi"}]})
    b'\\x00user\\x00Hi'
    """
    if "messages" in prompt:
        parts = []
        if tools := prompt.get("tools"):
            parts.append(_json([[tool.name, tool.description, tool.parameters] for tool in tools]))
        if settings := prompt.get("template_kwargs"):
            parts.append(_json(settings))
        for message in prompt["messages"]:
            parts += ["\0", str(message.get("role")), "\0", str(message.get("content") or "")]
            if calls := message.get("tool_calls"):
                parts.append(_json(calls))
        return "".join(parts).encode("utf-8", "surrogatepass")
    if "prompt_token_ids" in prompt:
        return array("q", prompt["prompt_token_ids"]).tobytes()
    text = prompt["prompt"]
    return array("q", text).tobytes() if isinstance(text, list) else text.encode("utf-8", "surrogatepass")


def scope(prompt: Mapping[str, Any], model: str) -> tuple[str, ...]:
    """What keeps equal prompts apart: the model or adapter that is to answer, and the ``cache_salt``."""
    return model, prompt.get("cache_salt") or ""


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
