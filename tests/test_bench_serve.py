"""``gossamer bench serve``: what its clients see of servers that behave well and badly, and what it makes of it."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httptools
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from gossamer.bench import serve as serve_module
from gossamer.bench.http_client import Address, Connection, EventSplitter
from gossamer.bench.memory_growth import anonymous_kilobytes, slope_per_minute
from gossamer.bench.peers import servers as servers_module
from gossamer.bench.peers.servers import SERVERS, ServerKind, ServerSetting, Start, server_names
from gossamer.bench.serve import bench_serve
from gossamer.bench.serve_contestants import OFFLINE, OURS, Contest, Contestant, ServeOptions
from gossamer.bench.serve_load import Load, LoadResult, Prompts, percentiles, run_load
from gossamer.bench.server_process import ServerProcess, free_port
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError, PeerError

TOKENS = 5
OK, ODD, STATUS, DROP, ERROR_EVENT, NO_DONE, GARBAGE, CLOSING, SILENT, HANGING_UP = range(10)
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def event(body: Any) -> bytes:
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


def events(count: int = TOKENS) -> list[bytes]:
    """Those of an answer: some texts are not ASCII, the one before the last is empty, then the usage."""
    texts = [f"é{number}" for number in range(count)] + [""]
    usage = {"prompt_tokens": 10, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 8}}
    heads = [event({"choices": [{"text": text}], "usage": None}) for text in texts]
    return [*heads, event({"choices": [], "usage": usage}), b"data: [DONE]\n\n"]


class FakeServer:
    """Speaks just enough HTTP. ``plan`` says how each completion, in the order of arrival, goes; then all go well."""

    def __init__(self, plan: list[int]) -> None:
        self.plan = list(plan)
        self.bodies: list[dict[str, Any]] = []
        self.connections = 0
        self.at_once = self.most_at_once = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while (head := await reader.readuntil(b"\r\n\r\n")) and await self._answer(head, reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # the client has gone, or the test is over
        finally:
            writer.close()

    async def _answer(self, head: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        fields = dict(line.split(b": ", 1) for line in head.strip().split(b"\r\n")[1:])
        body = await reader.readexactly(int(fields[b"content-length"]))
        if head.startswith(b"GET"):
            text = json.dumps({"data": [{"id": "fake"}]}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
            return True
        self.bodies.append(json.loads(body))
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return await self._complete(self.plan.pop(0) if self.plan else OK, writer)
        finally:
            self.at_once -= 1

    async def _complete(self, way: int, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection is kept."""
        if way == STATUS:
            writer.write(b"HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nbusy")
        elif way == GARBAGE:
            writer.write(b"SMTP ready\r\n")
        elif way == SILENT:
            await asyncio.sleep(5)
        elif not self.bodies[-1].get("stream"):
            text = json.dumps({"choices": [{"text": "all"}], "usage": {"completion_tokens": 9}}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(text) + text)
        elif way == CLOSING:  # as HTTP/1.0 did: the connection's end is the answer's
            writer.write(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n" + b"".join(events()))
            return False
        else:
            await self._stream(way, writer)
        await writer.drain()
        return way not in (DROP, GARBAGE, SILENT, HANGING_UP)

    async def _stream(self, way: int, writer: asyncio.StreamWriter) -> None:
        parts = events()
        if way == DROP:
            writer.write(HEAD + chunk(parts[0]) + chunk(parts[1])[:-9])
            return
        if way == NO_DONE:
            parts = parts[:-1]
        if way == ERROR_EVENT:
            parts = [parts[0], event({"error": {"message": "out of memory"}}), parts[-1]]
        wire = HEAD + b"".join(map(chunk, parts)) + b"0\r\n\r\n"
        step = 7 if way == ODD else len(wire)  # in the middle of heads, sizes, lines and characters
        for start in range(0, len(wire), step):
            writer.write(wire[start : start + step])
            await writer.drain()
            await asyncio.sleep(0.001)


@contextmanager
def fake_server(*plan: int) -> Iterator[FakeServer]:
    """In a thread, since the clients have an event loop of their own."""
    fake, loop, started = FakeServer(list(plan)), asyncio.new_event_loop(), threading.Event()

    async def run() -> None:
        server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        started.set()

    def work() -> None:
        loop.run_until_complete(run())
        loop.run_forever()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0.01))
        loop.close()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert started.wait(10)
    yield fake
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


class Characters:
    """A tokenizer of one token per character."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(each) for each in text]

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No character twice, so that other places are other texts."""
    monkeypatch.setattr("gossamer.bench.serve_load.reference_text", lambda: "".join(map(chr, range(0x4E00, 0x6000))))


def small(**changes: Any) -> Load:
    settings: dict[str, Any] = {"clients": 2, "requests": 6, "prefix": 20, "suffix": 5, "new": TOKENS, "timeout": 10.0}
    return Load(**(settings | changes))


def run(fake: FakeServer, load: Load, **options: Any) -> LoadResult:
    return run_load(fake.url, load, Prompts(Characters(), load), model="fake", **options)


class TestClients:
    def test_what_they_ask_and_what_they_count(self) -> None:
        load = small()
        with fake_server() as fake:
            result = run(fake, load, first=100)
        assert (result.asked, result.completed, result.errors, result.short_answers) == (6, 6, {}, 0)
        assert (result.completion_tokens, result.prompt_tokens, result.cached_tokens) == (6 * TOKENS, 60, 48)
        assert len(result.ttft) == len(result.e2e) == 6
        assert len(result.itl) == 6 * (TOKENS - 1)  # the event without text is no token's
        assert result.connections == fake.connections == fake.most_at_once == 2  # kept, one request at a time
        prompts = Prompts(Characters(), load)
        assert sorted(body["prompt"] for body in fake.bodies) == sorted(prompts[100 + i] for i in range(6))
        one = fake.bodies[0]
        assert one["ignore_eos"] is True and one["temperature"] == 0 and one["max_tokens"] == TOKENS
        assert one["stream_options"] == {"include_usage": True} and one["model"] == "fake"

    def test_where_a_stream_is_cut_does_not_matter(self) -> None:
        with fake_server(*[ODD] * 4) as fake:
            result = run(fake, small(clients=1, requests=4))
        assert (result.completed, result.errors, result.completion_tokens) == (4, {}, 4 * TOKENS)
        assert len(result.itl) == 4 * (TOKENS - 1)
        assert all(0 < first < end for first, end in zip(result.ttft, result.e2e, strict=True))

    @pytest.mark.parametrize(
        ("way", "kind"),
        [
            (STATUS, "status 429"),
            (DROP, "disconnected"),
            (ERROR_EVENT, "error in the stream"),
            (NO_DONE, "incomplete stream"),
            (GARBAGE, "not HTTP"),
        ],
    )
    def test_one_that_fails_is_counted_and_the_others_go_on(self, way: int, kind: str) -> None:
        with fake_server(OK, way) as fake:
            result = run(fake, small(clients=1, requests=4))
        assert result.errors == {kind: 1}
        assert (result.asked, result.completed, result.completion_tokens) == (4, 3, 3 * TOKENS)
        assert len(result.e2e) == 3

    def test_one_that_takes_too_long(self) -> None:
        with fake_server(SILENT) as fake:
            result = run(fake, small(clients=1, requests=2, timeout=0.2))
        assert result.errors == {"timeout": 1} and result.completed == 1

    def test_a_connection_may_end_with_the_answer(self) -> None:
        with fake_server(CLOSING, CLOSING) as fake:
            result = run(fake, small(clients=1, requests=3))
        assert (result.completed, result.errors, fake.connections) == (3, {}, 3)

    def test_a_connection_may_end_between_two_requests(self) -> None:
        with fake_server(*[HANGING_UP] * 5) as fake:
            result = run(fake, small(clients=1, requests=5))
        assert (result.completed, result.errors, len(fake.bodies)) == (5, {}, 5)
        assert result.connections == fake.connections == 5

    def test_answers_that_are_no_streams(self) -> None:
        with fake_server() as fake:
            result = run(fake, small(stream=False, new=20))
        assert (result.completed, result.completion_tokens, result.short_answers) == (6, 54, 6)
        assert not result.ttft and not result.itl and len(result.e2e) == 6
        assert "stream" not in fake.bodies[0] and result.to_dict()["itl_ms"] is None

    def test_a_server_that_is_gone_is_given_up(self) -> None:
        load = small(requests=1000)
        result = run_load("http://127.0.0.1:9", load, Prompts(Characters(), load), model="fake")
        assert result.completed == 0 and set(result.errors) == {"no connection"} and result.asked < 20
        assert result.to_dict()["output_tokens_per_s"] == 0

    def test_a_time_instead_of_a_number_of_requests(self) -> None:
        with fake_server() as fake:
            result = run(fake, small(requests=None, seconds=0.3), pid=os.getpid())
        assert result.asked == result.completed > 0 and result.duration >= 0.3
        assert result.memory and result.memory[0][1] > 1000
        assert result.to_dict()["memory"]["kb_per_minute"] is None  # no minute is over

    def test_a_server_that_counts_no_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        without = [each for each in events() if b"completion_tokens" not in each]
        monkeypatch.setitem(globals(), "events", lambda: without)
        with fake_server() as fake:
            result = run(fake, small())
        assert result.completion_tokens == 6 * TOKENS and result.cached_tokens is None
        assert result.to_dict()["cached_share"] is None


class TestHttp:
    @given(st.lists(st.integers(0, 400), max_size=8), st.sampled_from([b"\n", b"\r\n"]))
    def test_events_do_not_depend_on_cuts(self, cuts: list[int], line_end: bytes) -> None:
        wire = b": hello\n\ndata: one\ndata: more\n\nevent: x\ndata:two\n\n" + b"".join(events())
        wire = wire.replace(b"\n", line_end)
        places = [0, *sorted(cuts), len(wire)]
        splitter = EventSplitter()
        found = [each for a, b in pairwise(places) for each in splitter.feed(wire[a:b])]
        assert found[:2] == [b"one\nmore", b"two"] and found[-1] == b"[DONE]"
        assert found[2:] == [each[6:-2] for each in events()]

    @pytest.mark.parametrize("url", ["127.0.0.1:80", "https://host", "http://", "http://host:port", "http://a:99999"])
    def test_addresses_that_are_none(self, url: str) -> None:
        with pytest.raises(ConfigurationError):
            Address.parse(url)

    def test_addresses(self) -> None:
        assert Address.parse("http://[::1]:80/proxy/v1/") == Address("::1", 80, "/proxy")

    def test_what_is_no_http_is_an_error(self) -> None:
        async def ask(url: str) -> None:
            connection = Connection(Address.parse(url), 5)
            try:
                await connection.request("POST", "/v1/completions", b"{}")
            finally:
                connection.close()

        with fake_server(GARBAGE) as fake, pytest.raises(httptools.HttpParserError):
            asyncio.run(ask(fake.url))


class TestPrompts:
    def test_prefixes_in_turn_and_suffixes_that_begin_elsewhere(self) -> None:
        load = small(num_prefixes=2, token_ids=True)
        prompts = Prompts(Characters(), load)
        many = [prompts[number] for number in range(200)]
        assert {len(ids) for ids in many} == {25}
        assert {tuple(ids[:20]) for ids in many[::2]} == {tuple(many[0][:20])} != {tuple(many[1][:20])}
        assert len({tuple(ids[20:]) for ids in many}) == 200
        assert Prompts(Characters(), small(num_prefixes=2))[3] == Characters().decode(many[3])
        assert Prompts(Characters(), small(num_prefixes=2, seed=1, token_ids=True))[0][20:] != many[0][20:]

    def test_a_text_shorter_than_a_prompt(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gossamer.bench.serve_load.reference_text", lambda: "abcdefg")
        prompts = Prompts(Characters(), small(prefix=10, suffix=9, num_prefixes=2))
        assert prompts[0][:10] == "abcdefgabc" and prompts[1][:10] == "efgabcdefg"
        assert len({prompts[number][10:] for number in range(7)}) == 7

    @pytest.mark.parametrize(
        "change", [{"clients": 0}, {"new": 0}, {"seconds": 1.0}, {"requests": None}, {"timeout": math.inf}]
    )
    def test_loads_that_are_none(self, change: dict[str, Any]) -> None:
        with pytest.raises(ConfigurationError):
            small(**change)


class TestFigures:
    def test_percentiles(self) -> None:
        found = percentiles([number / 1e3 for number in range(101)])
        assert found == {"p50": 50, "p90": 90, "p99": 99}
        assert percentiles([0.5]) == {"p50": 500, "p90": 500, "p99": 500}
        assert percentiles([]) is None

    @given(st.floats(-1e4, 1e4), st.floats(0, 1e6))
    def test_the_slope_of_a_line_is_found_whatever_came_before(self, per_minute: float, start: float) -> None:
        line = [(second, start + per_minute * second / 60) for second in range(60, 180)]
        noise = [(second, 1e7 - second) for second in range(0, 60, 7)]
        assert slope_per_minute([*noise, *line]) == pytest.approx(per_minute, abs=1e-3)

    @pytest.mark.parametrize("samples", [[], [(10, 1.0), (20, 2.0)], [(70, 1.0)], [(70, 1.0), (70, 2.0)]])
    def test_no_slope_without_two_settled_samples(self, samples: list[tuple[float, float]]) -> None:
        assert slope_per_minute(samples) is None

    def test_memory_of_nobody(self) -> None:
        assert anonymous_kilobytes(2**22 + 1) is None


SERVER = """
import http.server, os, signal, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404)
        self.send_header("content-length", "0")
        self.end_headers()

if "fail" in sys.argv:
    sys.exit("the model is broken")
if "stubborn" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
server = http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
print(f"listening on http://127.0.0.1:{server.server_port}", os.environ.get("GREETING"), flush=True)
server.serve_forever()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


class TestServerProcess:
    def start(self, script: Path, *arguments: str, url: str | None = None) -> ServerProcess:
        return ServerProcess("fake", [sys.executable, str(script), *arguments], dict(os.environ), url)

    def test_the_address_is_read_in_its_log(self, script: Path) -> None:
        server = self.start(script, "0")
        try:
            server.wait_ready("/health", 20)
            assert server.url.startswith("http://127.0.0.1:") and anonymous_kilobytes(server.pid) is not None
            server.check()
            assert server.cpu_seconds() is not None
        finally:
            assert server.stop()

    def test_an_address_that_was_chosen_for_it(self, script: Path) -> None:
        port = free_port()
        server = self.start(script, str(port), url=f"http://127.0.0.1:{port}")
        try:
            server.wait_ready("/health", 20)
        finally:
            assert server.stop()

    def test_one_that_ends_says_why(self, script: Path) -> None:
        server = self.start(script, "0", "fail")
        with pytest.raises(PeerError, match="fake ended with exit code 1") as caught:
            server.wait_ready("/health", 20)
        assert caught.value.stderr == ["the model is broken"]
        server.stop()

    def test_one_that_is_never_ready(self, script: Path) -> None:
        server = self.start(script, "0")
        with pytest.raises(PeerError, match="was not ready within"):
            server.wait_ready("/never", 0.5)
        server.stop()

    def test_one_that_does_not_end_is_killed(self, script: Path) -> None:
        server = self.start(script, "0", "stubborn")
        server.wait_ready("/health", 20)
        assert not server.stop(0.2)

    def test_no_such_program(self) -> None:
        with pytest.raises(PeerError, match="cannot be started"):
            ServerProcess("fake", ["/no/such/program"], {})


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerSetting:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(servers_module, "_gguf", lambda setting: "model.gguf")
    return ServerSetting(
        checkpoint=tmp_path, environments=tmp_path / "venvs", threads=2, clients=3, context=100, cache_bytes=10, port=7
    )


class TestPeers:
    @pytest.mark.parametrize("name", SERVERS)
    def test_one_that_is_not_installed_says_what_to_do(self, name: str, setting: ServerSetting) -> None:
        with pytest.raises(PeerError, match=r"make bench-peers|bench\.md") as caught:
            SERVERS[name].start(setting)
        assert caught.value.peer == name

    @pytest.mark.parametrize("name", SERVERS)
    def test_one_that_is_installed_gets_room_and_threads(self, name: str, setting: ServerSetting) -> None:
        for directory, program in (("llama.cpp", "llama-server"), ("llama.cpp", "python"), ("vllm", "python")):
            file = setting.environments / directory / "bin" / program
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("#!/bin/sh\necho version 7\n")
            file.chmod(0o755)
            (setting.environments / directory / ".installed").touch()
        (setting.environments / "xllamacpp").symlink_to(setting.environments / "vllm")
        start = SERVERS[name].start(setting)
        assert "7" in start.command and {"model.gguf", str(setting.checkpoint)} & set(start.command)
        assert start.command[0].startswith(str(setting.environments)) and start.find_version() == "version 7"

    def test_names(self) -> None:
        assert server_names("all") == tuple(SERVERS) and server_names("") == ()
        with pytest.raises(ConfigurationError, match="--peers takes names among"):
            server_names("vllm,ollama")

    def test_a_version_that_cannot_be_asked_for(self) -> None:
        assert Start([], "int8", ["/no/such/program"], {}).find_version() is None
        assert Start([], "int8", [sys.executable, "-c", "raise SystemExit('1.0 is broken')"], {}).find_version() is None


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the benchmark with a fake in the place of our server, and an engine that has half of a second for all."""

    def take_stage(fake: FakeServer, script: Path, load: Load, **options: Any) -> dict[str, Any]:
        asked: list[int] = []

        @contextmanager
        def offline(contest: Contest) -> Iterator[Contestant]:
            def run(load: Load, first: int) -> LoadResult:
                assert load.requests is not None
                asked.append(load.requests)
                return LoadResult(0.5, load.requests, load.requests, completion_tokens=load.requests * load.new)

            yield Contestant(OFFLINE, run)

        def start(setting: ServerSetting) -> Start:
            assert setting.context > 30 and setting.cache_bytes > 0
            command = [sys.executable, str(script), "0", *setting.checkpoint.parts[2:]]
            return Start(command, "int4", [sys.executable, "--version"], {"GREETING": "hello"}, announced=True)

        config = SimpleNamespace(
            max_position_embeddings=64, num_hidden_layers=1, num_key_value_heads=1, head_dim=8, num_attention_heads=1
        )
        config.get_text_config = lambda: config
        contestants = "gossamer.bench.serve_contestants"
        monkeypatch.setattr(f"{contestants}.load_config", lambda path: config)
        monkeypatch.setattr(f"{contestants}.SERVERS", {"peer": ServerKind("peer", start)})
        monkeypatch.setattr(serve_module, "SETTLE_SECONDS", 0.0)
        monkeypatch.setattr(serve_module, "resolve_model", lambda model: Path("/", model))
        monkeypatch.setattr(serve_module, "load_tokenizer", lambda path: Characters())
        monkeypatch.setattr(Contest, "ours", lambda contest: contest.at(OURS, fake.url))
        monkeypatch.setattr(Contest, "offline", offline)
        report = bench_serve("m", load, ServeOptions(threads=1, **options), repeats=2)
        return report | {"asked": asked}

    return take_stage


class TestRun:
    def test_rounds_and_medians(self, stage: Callable[..., dict[str, Any]], script: Path) -> None:
        with fake_server() as fake:
            report = stage(fake, script, small(), urls={"other": fake.url, "gone": "http://127.0.0.1:9"})
        assert [row["name"] for row in report["results"]] == [OURS, OFFLINE, "other", "gone"]
        ours, offline, other, gone = report["results"]
        assert report["asked"] == [2, 6, 6]  # a warm-up of one request per client, and the rounds
        assert len(fake.bodies) == 2 * 14 and {body["max_tokens"] for body in fake.bodies[:4]} == {4}
        assert len({body["prompt"] for body in fake.bodies}) == 14  # new ones in each round, the same for each server
        assert len(ours["rounds"]) == 2 and ours["errors"] == {} and ours["ttft_ms"]["p50"] > 0
        assert ours["http_cost"] == pytest.approx(1 - ours["over_offline"]) and offline["over_offline"] is None
        assert offline["output_tokens_per_s"] == 6 * TOKENS / 0.5 and offline["itl_ms"] is None
        assert other["command"] == fake.url and "http_cost" not in other
        assert gone["error"] == "gone cannot be reached at http://127.0.0.1:9"
        json.dumps(report)

    def test_where_the_load_is_a_time_the_engine_gets_as_much_as_the_server(
        self, stage: Callable[..., dict[str, Any]], script: Path
    ) -> None:
        with fake_server() as fake:
            report = stage(fake, script, small(requests=None, seconds=0.1))
        assert report["asked"][1:] == [each["asked"] for each in report["results"][0]["rounds"]]

    def test_a_server_that_answers_nothing_is_out(self, stage: Callable[..., dict[str, Any]], script: Path) -> None:
        with fake_server() as fake:
            report = stage(fake, script, small(), peers=("peer",))  # answers /health, but has no models
        (peer,) = [row for row in report["results"] if row["name"] == "peer"]
        assert "which model it has" in peer["error"] and peer["ended"] is True
        assert peer["weights"] == "int4" and peer["version"].startswith("Python 3")

    def test_a_load_of_errors_is_no_result(self, stage: Callable[..., dict[str, Any]], script: Path) -> None:
        with fake_server(*[STATUS] * 100) as fake:
            report = stage(fake, script, small(), offline=False)
        assert report["results"][0]["error"] == "gossamer answered no request: status 429 (2 times)"

    def test_prompts_that_do_not_fit(self, stage: Callable[..., dict[str, Any]], script: Path) -> None:
        with fake_server() as fake, pytest.raises(ConfigurationError, match="do not fit into the context"):
            stage(fake, script, small(prefix=60))


class TestCommand:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--requests", "5", "--seconds", "2"], "--requests cannot be given together"),
            (["--requests", "5", "--soak"], "--requests cannot be given together"),
            (["--peers", "ollama"], "--peers takes names among"),
            (["--url", "http://127.0.0.1:1"], "--url takes NAME="),
            (["--url", "a=127.0.0.1"], "a server's address is such as"),
            (["--url", "vllm=http://127.0.0.1:1"], "needs another name"),
            (["--quantization", "int4"], "quantization must be int8 or none"),
        ],
    )
    def test_options_that_have_no_meaning(self, arguments: list[str], message: str) -> None:
        result = CliRunner().invoke(app, ["bench", "serve", *arguments])
        assert isinstance(result.exception, ConfigurationError)
        assert message in str(result.exception)

    @pytest.mark.parametrize("soak", [False, True])
    def test_the_table_and_what_stands_below_it(self, soak: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        given: dict[str, Any] = {}
        row = {"command": "c", "version": "v 1", "weights": "int8", "error": None, "ended": True, "rounds": []}
        times = {"p50": 2.0, "p90": 3.0, "p99": 5.0}
        row |= {"output_tokens_per_s": 900.0, "requests_per_s": 14.0, "cached_share": 0.97, "client_cores": 0.1}
        row |= {"ttft_ms": times, "itl_ms": times, "e2e_ms": None, "server_cores": None, "idle_cores": 0.4}
        row |= {"errors": {"timeout": 2}, "short_answers": 3, "over_offline": 0.96}
        row |= {"memory": {"first_kb": 5e5, "last_kb": 6e5, "kb_per_minute": 12.4}}

        def bench(model: str, load: Load, options: ServeOptions, **others: Any) -> dict[str, Any]:
            given.update(load=load, options=options, **others)
            results = [row | {"name": OURS, "http_cost": 0.04}, {"name": "vllm", "error": "vllm is not installed"}]
            machine = {"cpu": "a processor", "threads": 2}
            return {"machine": machine, "model": model, "load": vars(load), "results": results}

        monkeypatch.setattr(serve_module, "bench_serve", bench)
        result = CliRunner().invoke(app, ["bench", "serve", "--url", "a=http://b:1", *(["--soak"] if soak else [])])
        assert result.exit_code == 0, result.output
        for text in (
            "900",
            "96.0%",
            "HTTP costs 4.0%",
            "timeout (2 times)",
            "3 answers had fewer",
            "0.4 processor cores",
        ):
            assert text in result.stdout
        assert "vllm is not installed" in result.stdout and given["options"].urls == {"a": "http://b:1"}
        assert (given["load"].seconds, given["load"].requests) == ((600, None) if soak else (None, 256))
        assert given["options"].offline is not soak and given["repeats"] == (1 if soak else 3)
        assert ("+12 kB/min" in result.stdout) is soak and ("p99 / p50 of ITL 2.50" in result.stdout) is soak

    @pytest.mark.slow
    def test_our_server_and_our_engine(self, make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
        model = make_tiny_llama(tmp_path / "model", max_position_embeddings=256)
        load = [
            "--clients",
            "3",
            "--requests",
            "6",
            "--prefix",
            "100",
            "--suffix",
            "10",
            "--new",
            "8",
            "--repeats",
            "1",
        ]
        result = CliRunner().invoke(app, ["bench", "serve", "--model", str(model), *load, "--json"])
        assert result.exit_code == 0, result.output
        ours, offline = json.loads(result.stdout)["results"]
        assert ours["error"] is None and offline["error"] is None and ours["ended"] is True
        assert ours["rounds"][0]["completion_tokens"] == offline["rounds"][0]["completion_tokens"] == 48
        assert ours["cached_share"] > 0.5 and ours["errors"] == {}

    @pytest.mark.slow
    def test_no_server_is_left_behind(self, make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
        model = make_tiny_llama(tmp_path / "model", max_position_embeddings=256)
        command = [sys.executable, "-c", "from gossamer.cli.app import main; main()", "bench", "serve"]
        process = subprocess.Popen([*command, "--model", str(model), "--prefix", "50", "--suffix", "9", "--new", "9"])
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        end = time.monotonic() + 60
        while not (found := children.read_text().split()) and time.monotonic() < end:
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
        assert found and not any(Path("/proc", pid).exists() for pid in found)


def test_ports_are_free() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", free_port()))
