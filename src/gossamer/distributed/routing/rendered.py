"""A prompt as bytes, without the tokenizer and the chat template of the model: what prompts begin with in common, these
bytes begin with in common, in the order in which chat templates write it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def rendered(prompt: Mapping[str, Any]) -> bytes:
    """The bytes of one of a body's ``engine_prompts()``.

    >>> rendered({"prompt": "Once"})
    b'Once'
    >>> first, *_ = conversation = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    >>> rendered({"messages": [first]})
    b'[][{},true][{"content":"Hi","role":"user"}'
    >>> rendered({"messages": conversation}).startswith(rendered({"messages": [first]}))
    True
    """
    if "messages" in prompt:
        form = [prompt.get("template_kwargs") or {}, prompt.get("add_generation_prompt", True)]
        messages = b",".join(_json(each) for each in prompt["messages"])
        return _json(prompt.get("tools") or []) + _json(form) + b"[" + messages
    given = prompt["prompt_token_ids"] if "prompt_token_ids" in prompt else prompt["prompt"]
    if isinstance(given, list):
        return b"".join(_token_bytes(each) for each in given)
    return str(given).encode("utf-8", "surrogatepass")


def scope(prompt: Mapping[str, Any], model: str) -> tuple[str, ...]:
    """What keeps equal prompts apart: the model or adapter that is to answer, and the ``cache_salt``."""
    return model, prompt.get("cache_salt") or ""


def _json(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=str)
    return text.encode("utf-8", "surrogatepass")


def _token_bytes(token: object) -> bytes:
    if isinstance(token, int) and 0 <= token < 2**32:
        return token.to_bytes(4, "big")
    return b"\xff" * 4  # whoever answers refuses it
