"""``gossamer bench serve``: servers as processes, peers, rounds, and the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from fake_completions import STATUS, TOKENS, Characters, FakeServer, fake_server, small
from gossamer.bench import serve as serve_module
from gossamer.bench.memory_growth import anonymous_kilobytes
from gossamer.bench.peers import servers as servers_module
from gossamer.bench.peers.servers import SERVERS, ServerKind, ServerSetting, Start, server_names
from gossamer.bench.serve import bench_serve
from gossamer.bench.serve_contestants import OFFLINE, OURS, Contest, Contestant, ServeOptions
from gossamer.bench.serve_load import Load, LoadResult
from gossamer.bench.server_process import ServerProcess, free_port
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError, PeerError


@pytest.fixture(autouse=True)
def text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No character twice, so that other places are other texts."""
    monkeypatch.setattr("gossamer.bench.serve_load.reference_text", lambda: "".join(map(chr, range(0x4E00, 0x6000))))


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
    monkeypatch.setattr(servers_module, "resolve_model", lambda model: model)
    return ServerSetting(
        model=tmp_path, environments=tmp_path / "venvs", threads=2, clients=3, context=100, cache_bytes=10, port=7
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
        assert "7" in start.command and {"model.gguf", str(setting.model)} & set(start.command)
        assert start.command[0].startswith(str(setting.environments)) and start.find_version() == "version 7"

    def test_a_gguf_file_stays_as_it_is(self, setting: ServerSetting, tmp_path: Path) -> None:
        program = setting.environments / "llama.cpp" / "bin" / "llama-server"
        program.parent.mkdir(parents=True)
        program.touch(mode=0o755)
        file = tmp_path / "model.gguf"
        file.touch()
        weights = {
            model: SERVERS["llama.cpp"].start(replace(setting, model=model)).weights for model in (file, tmp_path)
        }
        assert weights == {file: "as they are", tmp_path: "Q8_0"}
        expected = {"auto": (None, "int8"), "int8": ("int8", "int8"), "none": (None, None)}
        for given, of_both in expected.items():
            options = ServeOptions(threads=1, quantization=given)
            config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=64))
            both = [Contest("m", path, config, small(), None, options, print) for path in (file, tmp_path)]
            assert tuple(each.quantization for each in both) == of_both

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
            command = [sys.executable, str(script), "0", *setting.model.parts[2:]]
            return Start(command, "int4", [sys.executable, "--version"], {"GREETING": "hello"}, announced=True)

        config = SimpleNamespace(
            max_position_embeddings=64, num_hidden_layers=1, num_key_value_heads=1, head_dim=8, num_attention_heads=1
        )
        config.get_text_config = lambda: config
        monkeypatch.setattr("gossamer.bench.serve_contestants.SERVERS", {"peer": ServerKind("peer", start)})
        monkeypatch.setattr(serve_module, "SETTLE_SECONDS", 0.0)
        monkeypatch.setattr(serve_module, "resolve_model", lambda model, as_file: Path("/", model))
        monkeypatch.setattr(serve_module, "load_config_and_tokenizer", lambda path: (config, Characters()))
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
            (["--quantization", "int4"], "quantization must be auto, int8 or none"),
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
