"""JSON on its way out: a long answer is written in pieces, so that other threads get a turn between them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

DEPTH = 6  # of an answer's log-probabilities: choices, a choice, logprobs, content, a token
PIECE = 8192  # numbers or texts of a list


def encode_json(value: Any) -> bytes:
    """The value as compact JSON.

    `json.dumps` keeps Python's lock until all of it is written. Here it writes only what lies :data:`DEPTH` levels deep
    or holds no objects and lists, and no more than :data:`PIECE` values of a list at a time.

    >>> encode_json({"choices": [{"text": "é", "logprobs": None}], "usage": {}})
    b'{"choices":[{"text":"\\xc3\\xa9","logprobs":null}],"usage":{}}'
    """
    return "".join(_pieces(value, DEPTH)).encode()


def _pieces(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, dict) and depth and any(isinstance(each, dict | list) for each in value.values()):
        for place, (name, each) in enumerate(value.items()):
            yield f"{',' if place else '{'}{_dumps(name)}:"
            yield from _pieces(each, depth - 1)
        yield "}"
    elif isinstance(value, list) and depth and value and isinstance(value[0], dict | list):
        for place, each in enumerate(value):
            yield "," if place else "["
            yield from _pieces(each, depth - 1)
        yield "]"
    elif isinstance(value, list) and len(value) > PIECE:
        for start in range(0, len(value), PIECE):
            yield f"{',' if start else '['}{_dumps(value[start : start + PIECE])[1:-1]}"
        yield "]"
    else:
        yield _dumps(value)


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
