"""Traces: which requests come when. One JSON object per line, without any text.

The first line says what the file is:

    {"format": "gossamer-trace-1", "model": "smollm2-135m", "block_tokens": 16}

and each other line is a request:

    {"t": 0.125, "chain": ["8a1f...", ...], "prompt_tokens": 530, "output_tokens": 24}

``t``: seconds since the beginning; with ``after``, the ``id`` of an earlier request, since the end of that one.
``chain``: hashes of :class:`~gossamer.distributed.routing.chain.ChainHasher`, as 16 hexadecimal digits; those behind
the prompt's end, if any, are of its answer, for prompts that go on from it.
``block_tokens``: tokens per hash. A server, which hashes bytes, leaves it out and says ``prompt_bytes`` with each
request instead; then it follows from all requests together, and is the same for all.
``id``, ``cached_tokens``, ``ttft`` (seconds), ``replica``: of a log; they are kept, and change nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.distributed.routing.chain import BLOCK_BYTES
from gossamer.errors import ConfigurationError

FORMAT = "gossamer-trace-1"
REQUIRED = ("t", "chain", "prompt_tokens", "output_tokens")
MAX_SECONDS = 1e12
OPTIONAL = ("id", "after", "prompt_bytes", "cached_tokens", "ttft", "replica")


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One line; see the module's documentation."""

    t: float
    chain: tuple[int, ...]
    prompt_tokens: int
    output_tokens: int
    id: str = ""
    after: str | None = None
    prompt_bytes: int | None = None
    cached_tokens: int | None = None
    ttft: float | None = None
    replica: str | None = None


@dataclass
class Trace:
    """Requests, each time they are iterated over from the first.

    Attributes:
        requests: in the order of ``t``; those with ``after`` behind the request they wait for.
        block_tokens: tokens per hash of all chains.
        longest: tokens of the longest prompt with its answer.
        model: that the requests were for; "" if that is not known.
        dependent: whether any request comes after another.
    """

    requests: Iterable[TraceRequest]
    block_tokens: int
    longest: int
    model: str = ""
    dependent: bool = False

    def __iter__(self) -> Iterator[TraceRequest]:
        return iter(self.requests)


def read_trace(path: Path) -> Trace:
    """A file of the format above.

    Raises:
        ConfigurationError: it cannot be read, is empty, or a line is not as it should be; says which.
    """
    try:
        with path.open(encoding="utf-8") as file:
            return _parse(path, file)
    except OSError as error:
        raise ConfigurationError(f"cannot read the trace {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigurationError(f"the trace {path} is no text in UTF-8") from None


def _parse(path: Path, lines: Iterable[str]) -> Trace:
    header: dict[str, Any] | None = None
    requests: list[TraceRequest] = []
    known: set[str] = set()
    latest = -math.inf
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            values = json.loads(line)
        except (ValueError, RecursionError):
            raise ConfigurationError(f"{where}: not JSON; each line is one object") from None
        if not isinstance(values, dict):
            raise ConfigurationError(f"{where}: expected an object, got {line.strip()[:40]}")
        if header is None:
            header = _header(values, where)
            continue
        request = _request(values, where)
        if request.after is None:
            if request.t < latest:
                raise ConfigurationError(f"{where}: t goes back from {latest} to {request.t}; sort the requests by t")
            latest = request.t
        elif request.after not in known:
            raise ConfigurationError(f"{where}: it comes after {request.after!r}, which no line above has as its id")
        if request.id:
            if request.id in known:
                raise ConfigurationError(f"{where}: the id {request.id!r} is there twice")
            known.add(request.id)
        requests.append(request)
    if header is None or not requests:
        raise ConfigurationError(f"the trace {path} has no requests")
    dependent = any(each.after is not None for each in requests)
    longest = max(each.prompt_tokens + each.output_tokens for each in requests)
    return Trace(requests, _block(header, requests, path), longest, header.get("model", ""), dependent)


def _header(values: dict[str, Any], where: str) -> dict[str, Any]:
    if values.get("format") != FORMAT:
        raise ConfigurationError(f'{where}: a trace begins with {{"format": "{FORMAT}"}}, got {values.get("format")!r}')
    if unknown := sorted(values.keys() - {"format", "model", "block_tokens"}):
        raise ConfigurationError(f"{where}: unknown field {unknown[0]!r}")
    if not isinstance(values.get("model", ""), str):
        raise ConfigurationError(f"{where}: model must be a name, got {values['model']!r}")
    if "block_tokens" in values:
        _count(values, "block_tokens", where, least=1)
    return values


def _request(values: dict[str, Any], where: str) -> TraceRequest:
    if unknown := sorted(values.keys() - {*REQUIRED, *OPTIONAL}):
        raise ConfigurationError(f"{where}: unknown field {unknown[0]!r}; known are {', '.join(REQUIRED + OPTIONAL)}")
    if missing := [name for name in REQUIRED if name not in values]:
        raise ConfigurationError(f"{where}: {missing[0]} is missing")
    for name, least in (("prompt_tokens", 1), ("output_tokens", 1), ("cached_tokens", 0), ("prompt_bytes", 1)):
        if values.get(name) is not None:
            _count(values, name, where, least=least)
    for name in ("t", "ttft"):
        value = values.get(name, 0.0)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_SECONDS:
            raise ConfigurationError(f"{where}: {name} must be seconds >= 0, got {value!r}")
    for name in ("id", "after", "replica"):
        if not isinstance(values.get(name), str | None):
            raise ConfigurationError(f"{where}: {name} must be a text, got {values[name]!r}")
    chain = values["chain"]
    try:
        keys = tuple(int(each, 16) for each in chain)
        valid = isinstance(chain, list) and all(0 <= key < 1 << 64 for key in keys)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ConfigurationError(f"{where}: chain must be a list of 64-bit numbers in hexadecimal digits")
    return TraceRequest(**{**values, "chain": keys, "id": values.get("id") or ""})


def _count(values: dict[str, Any], name: str, where: str, *, least: int) -> None:
    value = values[name]
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value < 1 << 40:
        raise ConfigurationError(f"{where}: {name} must be an integer of at least {least}, got {value!r}")


def _block(header: dict[str, Any], requests: list[TraceRequest], path: Path) -> int:
    if "block_tokens" in header:
        return int(header["block_tokens"])
    if any(each.prompt_bytes is None for each in requests):
        raise ConfigurationError(
            f"{path}: tokens per hash are not known; give block_tokens in its first line, or prompt_bytes in all others"
        )
    size = sum(each.prompt_bytes or 0 for each in requests)
    return max(round(BLOCK_BYTES * sum(each.prompt_tokens for each in requests) / size), 1)


def write_trace(path: Path, trace: Trace) -> int:
    """Returns how many requests were written.

    Raises:
        ConfigurationError: the file cannot be written.
    """
    header = {"format": FORMAT, "model": trace.model, "block_tokens": trace.block_tokens}
    count = 0
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(json.dumps(header) + "\n")
            for request in trace:
                file.write(json.dumps(_line(request)) + "\n")
                count += 1
    except OSError as error:
        raise ConfigurationError(f"cannot write the trace {path}: {error.strerror}") from None
    return count


def _line(request: TraceRequest) -> dict[str, Any]:
    values: dict[str, Any] = {"t": request.t, "chain": [f"{key:016x}" for key in request.chain]}
    values |= {"prompt_tokens": request.prompt_tokens, "output_tokens": request.output_tokens}
    optional = {name: getattr(request, name) for name in OPTIONAL}
    return values | {name: value for name, value in optional.items() if value not in (None, "")}
