"""A load on a server with OpenAI's API: clients that each ask, read the answer as it comes, and ask again.

As in ``vllm bench serve --dataset-name prefix_repetition``, prompts begin with one of a few long prefixes, and each
goes on with a suffix of its own. Both are real text.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import random
import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httptools
import numpy as np

from gossamer.bench.http_client import Address, Connection, EventSplitter
from gossamer.bench.memory_growth import anonymous_kilobytes, slope_per_minute
from gossamer.errors import ConfigurationError
from gossamer.texts import reference_text

PERCENTILES = (50, 90, 99)
PAUSE = 0.1  # seconds that a client waits after an error
INDEX_METRIC = "gossamer:spec_decode_index_bytes"
INDEX_INTERVAL = 60.0  # seconds; asking more often would show in the memory that is watched
PATIENCE = 3  # errors in a row, per client, after which the load is given up


@dataclass(frozen=True, kw_only=True)
class Load:
    """What clients ask of a server.

    Attributes:
        clients: that ask at the same time; each waits for its answer.
        requests: of all clients together.
        seconds: ask for so long instead; what has begun then is finished.
        prefix: tokens that prompts share.
        suffix: tokens that each prompt has of its own.
        new: tokens of an answer; ends of sequences are ignored.
        num_prefixes: prefixes, which prompts take in turn.
        stream: read answers token by token; otherwise only their end is seen.
        token_ids: send the numbers of tokens instead of text.
        seed: where in the text suffixes begin.
        timeout: seconds until an answer is given up.

    Raises:
        ConfigurationError: a value is out of its range, or not exactly one of requests and seconds is given.
    """

    clients: int = 64
    requests: int | None = None
    seconds: float | None = None
    prefix: int = 2048
    suffix: int = 64
    new: int = 64
    num_prefixes: int = 1
    stream: bool = True
    token_ids: bool = False
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if (self.requests is None) == (self.seconds is None):
            raise ConfigurationError("a load has either a number of requests or a number of seconds")
        for name in ("clients", "requests", "seconds", "prefix", "suffix", "new", "num_prefixes", "timeout"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigurationError(f"{name} must be more than 0, got {value}")


class Prompts:
    """The prompts of a load, by number. No two suffixes begin at the same place, until the text has no other place.

    Args:
        tokenizer: of the model; the server's need not be the same, but its prompts will have other lengths then.
        load: says what they are like.
    """

    def __init__(self, tokenizer: Any, load: Load) -> None:
        self._ids = tokenizer.encode(reference_text(), add_special_tokens=False)
        self._tokenizer = tokenizer
        self._load = load
        # each prefix begins one token further than the end of the last, so that a short text does not give the same
        prefixes = [self._window(i * (load.prefix + 1), load.prefix) for i in range(load.num_prefixes)]
        self._prefixes = [self._form(prefix) for prefix in prefixes]
        size = len(self._ids)
        # neighbours do not overlap, and a step that has no factor in common with the size comes to every place
        self._step = next(step for step in itertools.count(load.suffix) if math.gcd(step, size) == 1)
        self._start = random.Random(load.seed).randrange(size)

    def __getitem__(self, number: int) -> Any:
        """A text, or a list of token ids."""
        suffix = self._window(self._start + number * self._step, self._load.suffix)
        return self._prefixes[number % len(self._prefixes)] + self._form(suffix)

    def _form(self, ids: list[int]) -> Any:
        return ids if self._load.token_ids else self._tokenizer.decode(ids)

    def _window(self, start: int, length: int) -> list[int]:
        start %= len(self._ids)
        ids: list[int] = self._ids[start : start + length]
        while len(ids) < length:
            ids = ids + self._ids[: length - len(ids)]
        return ids


@dataclass
class LoadResult:
    """What the clients saw. Times are in seconds.

    Attributes:
        duration: from the first request to the last answer.
        asked: requests that were sent; ``completed`` those with an answer.
        errors: what the others ended with, and how many of them.
        connections: that clients had to open; as many as there are clients, where the server keeps them.
        prompt_tokens, completion_tokens: of completed requests, as the server counts them; of one that does not count,
            events with text are counted as tokens.
        cached_tokens: prompt tokens that the server had already; ``None`` if it does not tell.
        short_answers: completed with fewer tokens than were asked for.
        ttft: time to the first text, of each request; only of streams.
        itl: between two events with text; only of streams.
        e2e: from the request to the end of its answer.
        client_cpu: processor time that the clients took from the server.
        memory: seconds from the start, and kilobytes the server has for itself.
        indices: the same, and kilobytes of what our server looks drafts up in, which grows until it is full.
    """

    duration: float = 0.0
    asked: int = 0
    completed: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    connections: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int | None = None
    short_answers: int = 0
    ttft: array[float] = field(default_factory=lambda: array("d"))
    itl: array[float] = field(default_factory=lambda: array("d"))
    e2e: array[float] = field(default_factory=lambda: array("d"))
    client_cpu: float = 0.0
    memory: list[tuple[float, float]] = field(default_factory=list)
    indices: list[tuple[float, float]] = field(default_factory=list)

    @property
    def output_tokens_per_s(self) -> float:
        return self.completion_tokens / self.duration if self.duration else 0.0

    @property
    def requests_per_s(self) -> float:
        return self.completed / self.duration if self.duration else 0.0

    @property
    def cached_share(self) -> float | None:
        """The share of the prompts' tokens that came from the cache."""
        return None if self.cached_tokens is None else self.cached_tokens / max(self.prompt_tokens, 1)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; times in milliseconds, those of many requests as percentiles."""
        return {
            "duration_s": self.duration,
            "asked": self.asked,
            "completed": self.completed,
            "errors": dict(self.errors),
            "connections": self.connections,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "short_answers": self.short_answers,
            "cached_share": self.cached_share,
            "output_tokens_per_s": self.output_tokens_per_s,
            "requests_per_s": self.requests_per_s,
            "ttft_ms": percentiles(self.ttft),
            "itl_ms": percentiles(self.itl),
            "e2e_ms": percentiles(self.e2e),
            "client_cores": self.client_cpu / self.duration if self.duration else 0.0,
            "memory": self._memory() if self.memory else None,
        }

    def _memory(self) -> dict[str, Any]:
        first, last = self.memory[0][1], self.memory[-1][1]
        return {
            "first_kb": first,
            "last_kb": last,
            "kb_per_minute": slope_per_minute(self.memory),
            "index_kb_per_minute": slope_per_minute(self.indices),
        }


def percentiles(seconds: Sequence[float]) -> dict[str, float] | None:
    """In milliseconds; between two values in proportion. ``None`` if there are no values.

    >>> percentiles([0.001, 0.003])
    {'p50': 2.0, 'p90': 2.8, 'p99': 2.98}
    """
    if not len(seconds):
        return None
    values = np.percentile(np.asarray(seconds), PERCENTILES) * 1e3
    return {f"p{which}": round(float(value), 6) for which, value in zip(PERCENTILES, values, strict=True)}


class _Answer:
    """One answer while it arrives."""

    def __init__(self, stream: bool) -> None:
        self.started = self.last = time.perf_counter()
        self.ttft: float | None = None
        self.gaps: list[float] = []
        self.usage: dict[str, Any] = {}
        self.error: str | None = None
        self.done = not stream  # a stream says itself when it is complete
        self._splitter = EventSplitter()

    def take(self, data: bytes) -> None:
        """A piece of a stream."""
        now = time.perf_counter()
        for event in self._splitter.feed(data):
            if event == b"[DONE]":
                self.done = True
            else:
                self.read(event, now)

    def read(self, data: bytes, now: float) -> None:
        """An event, or an answer that is no stream."""
        try:
            body = json.loads(data)
            if body.get("error"):
                self.error = "error in the stream"
                return
            self.usage = body.get("usage") or self.usage
            text = any(choice.get("text") for choice in body["choices"])
        except (ValueError, KeyError, AttributeError, TypeError):
            self.error = "not an answer of OpenAI's API"
            return
        if text and self.ttft is None:
            self.ttft = now - self.started
        elif text:
            self.gaps.append(now - self.last)
        if text:
            self.last = now


async def ask(connection: Connection, body: bytes, *, stream: bool) -> _Answer:
    """Send one request and read its answer; what goes wrong is noted in it."""
    answer = _Answer(stream)
    try:
        response = await connection.request("POST", "/v1/completions", body, answer.take if stream else None)
    except TimeoutError:
        answer.error = "timeout"
    except ConnectionRefusedError:
        answer.error = "no connection"
    except httptools.HttpParserError:
        answer.error = "not HTTP"
    except OSError:
        answer.error = "disconnected"
    else:
        if response.status != 200:
            answer.error = f"status {response.status}"
        elif not stream:
            answer.read(response.body, time.perf_counter())
    if answer.error is None and not answer.done:
        answer.error = "incomplete stream"
    return answer


class _Run:
    """One load on one server."""

    def __init__(self, address: Address, model: str, load: Load, prompts: Prompts, first: int) -> None:
        self.result = LoadResult()
        self._address, self._model, self._load, self._prompts, self._first = address, model, load, prompts, first
        self._in_a_row = 0
        self._indices_seen = 0.0
        self._start = time.perf_counter()

    async def clients(self) -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._load.clients):
                group.create_task(self._client())

    async def watch(self, pid: int | None, progress: Callable[[str], None]) -> None:
        """Once a second, tell how far it is, and see how large the server is."""
        while True:
            progress(f"{self.result.completed} requests answered")
            if pid is not None and (size := anonymous_kilobytes(pid)) is not None:
                seconds = time.perf_counter() - self._start
                self.result.memory.append((seconds, size))
                if seconds - self._indices_seen >= INDEX_INTERVAL:
                    self._indices_seen = seconds
                    if (indices := await self._index_kilobytes()) is not None:
                        self.result.indices.append((seconds, indices))
            await asyncio.sleep(1.0)

    async def _index_kilobytes(self) -> float | None:
        """As our server's metrics say; ``None`` if there are none."""
        connection = Connection(self._address, self._load.timeout)
        try:
            answer = await connection.request("GET", "/metrics")
        except (OSError, httptools.HttpParserError):
            return None
        finally:
            connection.close()
        lines = answer.body.decode(errors="replace").splitlines()
        found = next((line for line in lines if line.startswith(INDEX_METRIC)), None)
        return None if found is None else float(found.split()[-1]) / 1e3

    async def _client(self) -> None:
        connection = Connection(self._address, self._load.timeout)
        try:
            while (body := self._next()) is not None:
                answer = await ask(connection, body, stream=self._load.stream)
                self._count(answer)
                if answer.error is not None:
                    await asyncio.sleep(PAUSE)
        finally:
            connection.close()
            self.result.connections += connection.opened

    def _next(self) -> bytes | None:
        """The body of the next request, or ``None`` if there are no more."""
        load, number = self._load, self.result.asked
        if self._in_a_row >= PATIENCE * load.clients:
            return None
        if load.requests is not None and number >= load.requests:
            return None
        if load.seconds is not None and time.perf_counter() - self._start >= load.seconds:
            return None
        self.result.asked += 1
        body = {
            "model": self._model,
            "prompt": self._prompts[self._first + number],
            "max_tokens": load.new,
            "temperature": 0,
            "ignore_eos": True,
        }
        if load.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        return json.dumps(body).encode()

    def _count(self, answer: _Answer) -> None:
        result = self.result
        now = time.perf_counter()
        result.duration = now - self._start
        if answer.error is not None:
            result.errors[answer.error] += 1
            self._in_a_row += 1
            return
        self._in_a_row = 0
        result.completed += 1
        events = len(answer.gaps) + (answer.ttft is not None)
        tokens = answer.usage.get("completion_tokens", events)
        result.completion_tokens += tokens
        result.short_answers += tokens < self._load.new
        result.prompt_tokens += answer.usage.get("prompt_tokens", 0)
        cached = (answer.usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if cached is not None:
            result.cached_tokens = (result.cached_tokens or 0) + cached
        result.e2e.append(now - answer.started)
        if self._load.stream and answer.ttft is not None:
            result.ttft.append(answer.ttft)
            result.itl.extend(answer.gaps)


def run_load(
    url: str,
    load: Load,
    prompts: Prompts,
    *,
    model: str,
    first: int = 0,
    pid: int | None = None,
    progress: Callable[[str], None] = lambda note: None,
) -> LoadResult:
    """Put a load on a server and return what its clients saw. Errors of single requests are counted, not raised.

    Args:
        url: of the server, without a path.
        load: what to ask.
        prompts: made for this load.
        model: the name that requests give.
        first: number of the first prompt; other numbers are other prompts.
        pid: the server's process, if its memory is to be watched.
        progress: told about once a second.
    """

    async def run() -> LoadResult:
        running = _Run(Address.parse(url), model, load, prompts, first)
        watching = asyncio.create_task(running.watch(pid, progress))
        used = time.process_time()
        await running.clients()
        running.result.client_cpu = time.process_time() - used
        watching.cancel()
        return running.result

    return asyncio.run(run())
