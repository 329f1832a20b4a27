"""Text that is none: half of a surrogate pair, which JSON and Python can spell."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

_NO_TEXT = frozenset({int, float, bool, type(None)})


class LoneSurrogate(NamedTuple):
    """Half of a pair in a text. UTF-8 cannot write it, and no tokenizer takes it.

    Attributes:
        where: the text that holds it, ``messages.0.content`` for example.
        reason: a sentence that says so.
    """

    where: str
    reason: str


def find_lone_surrogate(value: Any, name: str) -> LoneSurrogate | None:
    r"""Half of a surrogate pair in a text called ``name``, or in one inside of lists and mappings.

    >>> find_lone_surrogate({"content": ["Hi \ud83d"]}, "messages.0").where
    'messages.0.content.0'
    """
    pending = [(name, value)]
    while pending:
        name, value = pending.pop()
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                code = f"U+{ord(value[error.start]):04X}"
                reason = f"{name} holds a lone surrogate ({code}), half of a pair, which is no Unicode character"
                return LoneSurrogate(name, reason)
        elif isinstance(value, Mapping):
            inside = f"{name}." if name else ""
            pending += [(f"{inside}{key}", each) for key, each in value.items() if type(each) not in _NO_TEXT]
            pending += [(f"a name in {name or 'it'}", key) for key in value]  # these first: the others show them
        elif isinstance(value, list | tuple):
            pending += [(f"{name}.{place}", each) for place, each in enumerate(value) if type(each) not in _NO_TEXT]
    return None
