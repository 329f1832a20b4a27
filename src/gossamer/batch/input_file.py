"""Reads the lines of a batch input file, one at a time, and tells requests from lines that are none."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigurationError
from gossamer.protocol import all_bodies
from gossamer.protocol.decoding import InvalidJsonError, decode_json

#: No request is longer than this; it bounds the memory that a file without line breaks can take.
MAX_LINE_BYTES = 16 * 2**20

_FIELDS = ("custom_id", "method", "url", "body")


@dataclass(frozen=True, slots=True)
class BatchLine:
    """A line that is a request; whether its body can be honoured is decided later.

    Attributes:
        number: its place in the input, from 1.
        draw: selects the random stream of its first prompt if the body has no seed, that of the next prompt is the next
            one; ``None``: the order in which lines reach the engine does.
    """

    number: int
    custom_id: str
    url: str
    body: dict[str, Any]
    draw: int | None = None


@dataclass(frozen=True, slots=True)
class InvalidLine:
    """A line that is no request: why, and which field is to blame."""

    number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None


class _Invalid(Exception):
    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


def count_lines(path: Path) -> int:
    """Lines that are not blank: the number of output lines a complete run writes.

    Raises:
        ConfigurationError: the file cannot be read.
    """
    if path.exists() and not path.is_file():
        raise ConfigurationError(f"{path} is not a regular file; a batch reads its input twice")
    try:
        with path.open("rb") as file:
            return sum(1 for _ in raw_lines(file))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None


def read_lines(path: Path) -> Iterator[BatchLine | InvalidLine]:
    """Every line that is not blank, in order. Holds one line and the ids seen so far."""
    first_seen: dict[str, int] = {}
    with path.open("rb") as file:
        for number, raw in raw_lines(file):
            yield parse_line(number, raw, first_seen)


def raw_lines(file: BufferedReader) -> Iterator[tuple[int, bytes | None]]:
    """Number and content of each line that is not blank; ``None`` stands for a line that is too long."""
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)  # some editors put one there
        if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = file.readline(MAX_LINE_BYTES)
            yield number, None
        elif line := line.strip():
            yield number, line
        else:
            number += _skip_blank(file)


def _skip_blank(file: BufferedReader) -> int:
    """Pass over the blank lines that come next, a buffer at a time; returns how many."""
    number = 0
    while blank := len(buffered := file.peek()) - len(buffered.lstrip()):
        number += buffered.count(b"\n", 0, blank)
        file.read(blank)
    return number


def parse_line(number: int, raw: bytes | None, first_seen: dict[str, int]) -> BatchLine | InvalidLine:
    """A line as a request, or why it is none.

    Args:
        number: its place in the input.
        raw: its bytes; ``None`` for a line that is too long.
        first_seen: the ids before it, and their lines; its own is added.
    """
    custom_id = None
    try:
        fields = _decode(raw)
        custom_id = _custom_id(fields)
        if custom_id in first_seen:
            raise _Invalid(
                "duplicate_custom_id",
                f"custom_id {custom_id!r} was used before, in line {first_seen[custom_id]}",
                "custom_id",
            )
        first_seen[custom_id] = number
        return BatchLine(number, custom_id, *_request(fields))
    except _Invalid as error:
        return InvalidLine(number, custom_id, error.code, error.message, error.param)
    except Exception as error:  # whatever a line may hold: it is wrong with this line, and the others are read
        return InvalidLine(number, custom_id, "invalid_line", f"the line cannot be read: {error!r}")


def _decode(raw: bytes | None) -> dict[str, Any]:
    if raw is None:
        raise _Invalid("line_too_long", f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        fields = decode_json(raw, "the line")
    except InvalidJsonError as error:
        raise _Invalid(error.code, str(error)) from None
    if not isinstance(fields, dict):
        raise _Invalid("invalid_line", "the line must be a JSON object")
    return fields


def _custom_id(fields: dict[str, Any]) -> str:
    custom_id = fields.get("custom_id")
    if custom_id is None:
        raise _Invalid("missing_custom_id", "custom_id is missing", "custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise _Invalid("invalid_custom_id", "custom_id must be a non-empty string", "custom_id")
    return custom_id


def _request(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    unknown = [name for name in fields if name not in _FIELDS]
    if unknown:
        raise _Invalid("unknown_field", f"{unknown[0]} is no field of a batch line: {', '.join(_FIELDS)}", unknown[0])
    if fields.get("method") != "POST":
        raise _Invalid("invalid_method", f"method must be POST, got {fields.get('method')!r}", "method")
    url, body = fields.get("url"), fields.get("body")
    if not isinstance(url, str) or url not in all_bodies():
        raise _Invalid("invalid_url", f"url must be {' or '.join(all_bodies())}, got {url!r}", "url")
    if not isinstance(body, dict):
        raise _Invalid("invalid_body", "body must be a JSON object", "body")
    return url, body
