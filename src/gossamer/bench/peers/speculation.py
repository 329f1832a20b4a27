"""Other projects' servers that draft from what is there, each with one way of drafting, asked for the same answers.

Greedy, and what the model says: nobody can be forced to a reference through an API. Prompts are sent as tokens and
computed before the clock runs, as ours are. llama.cpp tells itself how long it generated, from an answer's first token
to its last; the longest of a group counts. vLLM does not, so its events are timed as they arrive.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httptools
import torch

from gossamer.bench.http_client import Address, Connection, EventSplitter
from gossamer.bench.peers.process import child_environment
from gossamer.bench.peers.registry import ENVIRONMENTS, chosen_names
from gossamer.bench.peers.servers import SERVERS, ServerSetting
from gossamer.bench.server_process import ServerProcess, free_port, get
from gossamer.engine.engine import Engine
from gossamer.errors import ConfigurationError, PeerError
from gossamer.models.resolve import resolve_model

NONE = "none"
_LLAMA_MODES = ("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache")
_POOLED = ("ngram-mod",)  # keeps what it has seen for all later requests, and would find its own answers there


@dataclass(frozen=True)
class Drafting:
    """A project with its ways of drafting.

    Attributes:
        modes: their names.
        arguments: of its server, for one of them.
        llama: whether it answers as llama.cpp's server does; otherwise as vLLM's.
    """

    modes: tuple[str, ...]
    arguments: Callable[[str], list[str]]
    llama: bool = True


DRAFTING = {
    "llama.cpp": Drafting(_LLAMA_MODES, lambda mode: ["--spec-type", mode]),
    "xllamacpp": Drafting(_LLAMA_MODES, lambda mode: ["--speculation", mode]),
    "vllm": Drafting(
        ("ngram",),
        lambda mode: ["--speculative-config", json.dumps({"method": mode, "num_speculative_tokens": 8})],
        llama=False,
    ),
}


@dataclass(frozen=True)
class PeerOptions:
    """What to compare with.

    Attributes:
        names: of projects in :data:`DRAFTING`.
        modes: ways of drafting, those that a project has; all by default. It always takes part without as well.
        environments: the directory with an environment for each project.
        timeout: seconds that a server may take to start, or for one answer.

    Raises:
        ConfigurationError: no project drafts in such a way.
    """

    names: tuple[str, ...] = ()
    modes: tuple[str, ...] = ()
    environments: Path = ENVIRONMENTS
    timeout: float = 600.0

    def __post_init__(self) -> None:
        known = dict.fromkeys(mode for each in DRAFTING.values() for mode in each.modes)
        if unknown := [mode for mode in self.modes if mode not in known]:
            raise ConfigurationError(f"ways of drafting are among {', '.join(known)}; got {unknown[0]!r}")


def peer_names(text: str) -> tuple[str, ...]:
    """``"llama.cpp"`` or ``"all"`` -> names.

    Raises:
        ConfigurationError: there is no such peer.

    >>> peer_names("xllamacpp, vllm")
    ('xllamacpp', 'vllm')
    """
    return chosen_names(text, DRAFTING)


@dataclass(frozen=True)
class Ask:
    """A prompt as tokens, tokens of its answer at most, and the schema that it must follow."""

    prompt: list[int]
    new: int
    schema: dict[str, Any] | None = None


@dataclass
class Turn:
    """What was measured of one contestant that answered all requests of a task once.

    Attributes:
        tokens, seconds: after the first token of each request, and the time they took.
        sequence_steps: how many times a sequence got tokens; 0 if that is not known.
        drafted, accepted: drafted tokens; those that were right.
        by_source: the same by where they were from, with the names of ``LLM.stats()``.
        answers: their tokens, where they are known.
    """

    tokens: int = 0
    seconds: float = 0.0
    sequence_steps: int = 0
    drafted: int = 0
    accepted: int = 0
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    answers: list[list[int]] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0


class SpeculatingPeer:
    """A server with one way of drafting, from its first request to :meth:`close`.

    Args:
        project: one of :data:`DRAFTING`.
        mode: one of its ways, or :data:`NONE`.
        setting: of the server; its port is chosen when it starts.
        timeout: see :class:`PeerOptions`.
    """

    def __init__(self, project: str, mode: str, setting: Callable[[], ServerSetting], timeout: float) -> None:
        self.name = f"{project} {mode}"
        self.base = f"{project} {NONE}"
        self._project, self._mode, self._setting, self._timeout = project, mode, setting, timeout
        self._drafting = DRAFTING[project]
        self._server: ServerProcess | None = None
        self._report: dict[str, Any] = {}

    def report(self) -> dict[str, Any]:
        """``version``, ``weights`` and ``command`` of the server, if it was started."""
        return dict(self._report)

    def answer(self, asks: Sequence[Ask], batch: int) -> Turn:
        """Answer all in groups of ``batch``.

        Raises:
            PeerError: the server cannot be started, ends, or does not answer as it should.
        """
        if self._mode in _POOLED:
            self.close()
        url = self._started()
        turn = Turn()
        group = _LlamaGroup if self._drafting.llama else _VllmGroup
        for first in range(0, len(asks), batch):
            try:
                asyncio.run(group(url, self._timeout, asks[first : first + batch]).answer(turn))
            except (OSError, httptools.HttpParserError, ValueError, LookupError, TypeError) as error:
                server = self._server
                self._server = None
                assert server is not None
                try:
                    server.check()  # says more, if it has ended
                finally:
                    server.stop()
                raise PeerError(f"gave no usable answer: {type(error).__name__}: {error}", peer=self.name) from error
        return turn

    def close(self) -> None:
        """End the server, if there is one; the next request starts another."""
        server, self._server = self._server, None
        if server is not None:
            server.stop()

    def _started(self) -> str:
        if self._server is not None:
            return self._server.url
        setting = self._setting()
        kind = SERVERS[self._project]
        found = kind.start(setting)
        command = found.command + ([] if self._mode == NONE else self._drafting.arguments(self._mode))
        if not self._report:
            self._report = {"version": found.find_version(), "weights": found.weights, "command": command}
        environment = child_environment(setting.threads) | found.environment
        url = None if found.announced else f"http://127.0.0.1:{setting.port}"
        server = ServerProcess(self.name, command, environment, url)
        try:
            server.wait_ready(kind.ready, self._timeout)
        except BaseException:
            server.stop()
            raise
        self._server = server
        return server.url


class _Group(ABC):
    """Requests that are answered at once."""

    def __init__(self, url: str, timeout: float, asks: Sequence[Ask]) -> None:
        self._url, self._address, self._timeout, self._asks = url, Address.parse(url), timeout, asks

    @abstractmethod
    async def answer(self, turn: Turn) -> None:
        """Compute the prompts, then answer them, and add what was measured to the turn."""

    async def _post(self, path: str, body: dict[str, Any], on_body: Callable[[bytes], None] | None = None) -> bytes:
        connection = Connection(self._address, self._timeout)
        try:
            response = await connection.request("POST", path, json.dumps(body).encode(), on_body)
        finally:
            connection.close()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {response.body[:300].decode(errors='replace')}")
        return response.body


class _LlamaGroup(_Group):
    async def answer(self, turn: Turn) -> None:
        await asyncio.gather(*(self._complete(slot, 0) for slot in range(len(self._asks))))
        told = await asyncio.gather(*(self._complete(slot, ask.new) for slot, ask in enumerate(self._asks)))
        timings = [each["timings"] for each in told]
        turn.tokens += sum(max(0, each["predicted_n"] - 1) for each in timings)
        turn.seconds += max(each["predicted_ms"] for each in timings) / 1e3
        turn.drafted += sum(each.get("draft_n", 0) for each in timings)
        turn.accepted += sum(each.get("draft_n_accepted", 0) for each in timings)
        # a step brings one token besides those that were accepted
        turn.sequence_steps += sum(
            max(0, each["predicted_n"] - 1 - each.get("draft_n_accepted", 0)) for each in timings
        )
        turn.answers += [list(each["tokens"]) for each in told]

    async def _complete(self, slot: int, new: int) -> dict[str, Any]:
        ask = self._asks[slot]
        body: dict[str, Any] = {"prompt": ask.prompt, "n_predict": new, "id_slot": slot, "temperature": 0}
        body |= {"cache_prompt": True, "return_tokens": True}
        if ask.schema is not None and new:
            body["json_schema"] = ask.schema
        answer = json.loads(await self._post("/completion", body))
        if not isinstance(answer, dict):
            raise ValueError("the answer is no JSON object")
        return answer


class _VllmGroup(_Group):
    async def answer(self, turn: Turn) -> None:
        await asyncio.gather(*(self._complete(ask, 1) for ask in self._asks))
        before = self._counters()
        told = await asyncio.gather(*(self._complete(ask, ask.new) for ask in self._asks))
        after = self._counters()
        turn.tokens += sum(tokens - 1 for tokens, _, _ in told)
        turn.seconds += max(last for _, _, last in told) - max(first for _, first, _ in told)
        turn.drafted += after[0] - before[0]
        turn.accepted += after[1] - before[1]
        turn.sequence_steps += sum(tokens - 1 for tokens, _, _ in told) - (after[1] - before[1])

    async def _complete(self, ask: Ask, new: int) -> tuple[int, float, float]:
        """Tokens of the answer, and when the first and the last event came."""
        times: list[float] = []
        counts: list[int] = []
        splitter = EventSplitter()

        def read(data: bytes) -> None:
            for event in splitter.feed(data):
                if event == b"[DONE]":
                    continue
                told = json.loads(event)
                if told.get("choices"):
                    times.append(time.perf_counter())
                if told.get("usage"):
                    counts.append(int(told["usage"]["completion_tokens"]))

        body: dict[str, Any] = {"prompt": ask.prompt, "max_tokens": new, "temperature": 0, "stream": True}
        body |= {"stream_options": {"include_usage": True}}
        if ask.schema is not None:
            body["structured_outputs"] = {"json": ask.schema}
        await self._post("/v1/completions", body, read)
        return counts[-1], times[0], times[-1]

    def _counters(self) -> tuple[int, int]:
        """Drafted and accepted tokens since the server was started."""
        response = get(self._url, "/metrics")
        text = "" if response is None else response.body.decode(errors="replace")
        found = []
        for kind in ("draft", "accepted"):
            counter = re.search(rf"^vllm:spec_decode_num_{kind}_tokens_total\{{.*\}} (\S+)$", text, re.MULTILINE)
            found.append(int(float(counter.group(1))) if counter else 0)
        return found[0], found[1]


@contextmanager
def open_peers(
    options: PeerOptions, model: str, engine: Engine, batch: int, context: int, progress: Callable[[str], None]
) -> Iterator[list[SpeculatingPeer]]:
    """All peers with all their ways, as long as the block; each starts with its first request."""

    def setting() -> ServerSetting:
        return ServerSetting(
            model=resolve_model(model, as_file=True),
            environments=options.environments,
            threads=torch.get_num_threads(),
            clients=batch,
            context=context,
            cache_bytes=batch * context * engine.runner.layout.bytes_per_token,
            port=free_port(),
        )

    with ExitStack() as stack:
        peers = []
        for name in options.names:
            modes = [mode for mode in DRAFTING[name].modes if not options.modes or mode in options.modes]
            for mode in (NONE, *modes):
                peer = SpeculatingPeer(name, mode, setting, options.timeout)
                stack.callback(peer.close)
                peers.append(peer)
        yield peers
