"""Real text to measure on: the language reference that comes with Python, 465,000 characters."""

from __future__ import annotations

from functools import cache
from pydoc_data import topics
from typing import Any


@cache
def reference_text() -> str:
    return "\n\n".join(topics.topics[name] for name in sorted(topics.topics))


def windows(tokenizer: Any, prefix: int, suffix: int, count: int) -> list[list[int]]:
    """``count`` prompts of ``prefix`` common tokens and ``suffix`` tokens of their own, all of real text."""
    text = reference_text()
    # 8 characters per token are more than enough; encoding all of the text would take seconds
    ids = tokenizer.encode(text[: 8 * (prefix + suffix * count)], add_special_tokens=False)
    while len(ids) < prefix + suffix * count:
        ids = ids + ids
    own = ids[prefix : prefix + suffix * count]
    return [ids[:prefix] + own[i * suffix : (i + 1) * suffix] for i in range(count)]
