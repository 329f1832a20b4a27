"""JSON from outside: whatever is wrong with it is a ``ValueError`` of ours that says what.

Reading JSON takes as long as there are values in it, not bytes: eight megabytes of empty lists keep Python's lock for
seconds. So the values of a long document are counted, in arrays, before it is read.
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple, NoReturn

import numpy as np

SHORT = 64 * 2**10  # bytes that are read without counting; also what the server reads in its event loop
MAX_DEPTH = 500  # objects and lists in each other
MAX_CONTAINERS = 32_768  # objects and lists
MAX_MEMBERS = 32_768  # of all objects together
MAX_ITEMS = 262_144  # values of all lists and objects together


class InvalidJsonError(ValueError):
    """Bytes that are no usable JSON.

    Attributes:
        code: ``"invalid_utf8"`` or ``"invalid_json"``.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def decode_json(raw: bytes, what: str) -> Any:
    """The value that ``raw`` holds; messages call it ``what``.

    Raises:
        InvalidJsonError: it is no UTF-8, no JSON (``NaN`` is none), nested too deeply, or long and holding
            more than :data:`MAX_CONTAINERS` objects and lists, :data:`MAX_MEMBERS` members or :data:`MAX_ITEMS` values.

    >>> decode_json(b'{"top_p": NaN}', "the line")
    Traceback (most recent call last):
    ...
    gossamer.protocol.decoding.InvalidJsonError: the line is not JSON: NaN is no JSON number
    """
    if len(raw) > SHORT:
        _check_size(raw, what)
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        message = f"{what} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}"
        raise InvalidJsonError("invalid_utf8", message) from None
    except RecursionError:
        raise InvalidJsonError("invalid_json", f"{what} is not usable JSON: it is nested too deeply") from None
    except ValueError as error:
        raise InvalidJsonError("invalid_json", f"{what} is not JSON: {error}") from None


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON number")


def _check_size(raw: bytes, what: str) -> None:
    shape = measure(raw)
    if shape.depth > MAX_DEPTH:
        raise InvalidJsonError("invalid_json", f"{what} is not usable JSON: it is nested too deeply")
    for name, count, limit in (
        ("objects and lists", shape.containers, MAX_CONTAINERS),
        ("members of objects", shape.members, MAX_MEMBERS),
        ("values", shape.separators, MAX_ITEMS),
    ):
        if count > limit:
            raise InvalidJsonError("invalid_json", f"{what} holds {count} {name}; at most {limit} are read")


class Shape(NamedTuple):
    """What a JSON text holds outside of its strings: opening brackets, colons, commas, and brackets that are open."""

    containers: int
    members: int
    separators: int
    depth: int


def measure(raw: bytes) -> Shape:
    r"""The shape of a JSON text, in a few passes over its bytes.

    >>> measure(rb'{"a,": ["\\", 1, "\",\""]}')
    Shape(containers=2, members=1, separators=2, depth=2)
    """
    # Inside of strings, a backslash takes the next character along: without these two, every quote is one of JSON's.
    quotes = np.frombuffer(raw.replace(b"\\\\", b"  ").replace(b'\\"', b"  "), np.uint8) == ord('"')
    outside = np.frombuffer(raw, np.uint8)[~np.logical_xor.accumulate(quotes)]
    counts = np.bincount(outside, minlength=256)
    containers, members, separators = counts[list(b"{[")].sum(), counts[ord(":")], counts[ord(",")]
    depth = _STEPS[outside].cumsum(dtype=np.int32).max(initial=0)
    return Shape(int(containers), int(members), int(separators), int(depth))


_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"{[")], _STEPS[list(b"}]")] = 1, -1
