"""Other projects beside Gossamer: the protocol with a process, what becomes of those that fail, and the report."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gossamer import LLM, SamplingParams
from gossamer.bench.decode import bench_decode
from gossamer.bench.peers import contest as contest_module
from gossamer.bench.peers import registry
from gossamer.bench.peers.contest import Contest, PeerOptions, Sizes, peer_names
from gossamer.bench.peers.models import converted
from gossamer.bench.peers.process import Peer
from gossamer.bench.peers.registry import KINDS, PeerKind
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError, PeerError

# Decodes its own step numbers, and does what the last token of the first prompt tells it to.
FAKE = """
import os, sys, time

CRASH, HANG, SHORT, RAISE = 1, 2, 3, 4

class Decoder:
    def load(self, model, threads, sequences, context, cache_bytes, dtype):
        print("loading", model)
        os.system("echo from another process")
        return {"versions": {"fake": "1.0", "dtype": dtype}, "weights": "int4", "keys": os.environ["OMP_NUM_THREADS"]}

    def prepare(self, prompts, shared, steps):
        self.batch, self.step, self.trick = len(prompts), 0, prompts[0][-1]
        assert all(prompt[:shared] == prompts[0][:shared] for prompt in prompts)
        return {"prefill_s": 0.5}

    def decode(self, steps):
        if self.trick == CRASH and self.step:
            print("about to crash", file=sys.stderr, flush=True)
            os._exit(3)
        if self.trick == HANG and self.step:
            time.sleep(60)
        if self.trick == RAISE and self.step:
            raise MemoryError("no room for keys")
        tokens = list(range(self.step, self.step + steps - (self.trick == SHORT)))
        self.step += steps
        return {"seconds": 0.25 * steps, "tokens": [tokens] * self.batch}

    def release(self):
        return {}
"""
CRASH, HANG, SHORT, RAISE = 1, 2, 3, 4


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "fake.py"
    path.write_text(FAKE)
    return path


@pytest.fixture
def peer(script: Path) -> Iterator[Peer]:
    peer = Peer("fake", sys.executable, script, threads=3, timeout=30)
    yield peer
    peer.close()


def load(peer: Peer) -> dict[str, Any]:
    return peer.request("load", model="m", threads=3, sequences=2, context=9, cache_bytes=9, dtype="float32")


class TestPeer:
    def test_answers_are_not_disturbed_by_what_is_printed(self, peer: Peer) -> None:
        answer = load(peer)
        assert answer["versions"] == {"fake": "1.0", "dtype": "float32"}
        assert answer["keys"] == "3"  # OMP_NUM_THREADS
        assert peer.request("prepare", prompts=[[7, 0], [7, 8]], shared=1, steps=9)["prefill_s"] == 0.5
        assert peer.request("decode", steps=2)["tokens"] == [[0, 1], [0, 1]]
        answer = peer.request("decode", steps=2)
        assert answer["tokens"] == [[2, 3], [2, 3]] and answer["idle_cpu_s"] < 1

    def test_processor_time_between_requests_is_told(self, tmp_path: Path) -> None:
        script = tmp_path / "busy.py"
        script.write_text(
            "import threading, time\n"
            "class Decoder:\n"
            "    def decode(self):\n"
            "        end = time.monotonic() + 0.4\n"
            "        threading.Thread(target=lambda: all(iter(lambda: time.monotonic() < end, False))).start()\n"
            "        return {}\n"
        )
        peer = Peer("busy", sys.executable, script, threads=1, timeout=30)
        try:
            peer.request("decode")
            time.sleep(0.6)
            assert peer.request("decode")["idle_cpu_s"] > 0.1
        finally:
            peer.close()

    def test_a_crash_is_reported_with_the_last_words_and_can_be_started_again(self, peer: Peer) -> None:
        load(peer)
        peer.request("prepare", prompts=[[CRASH]], shared=0, steps=9)
        peer.request("decode", steps=2)
        with pytest.raises(PeerError, match=r"fake ended during 'decode' \(exit code 3\)") as caught:
            peer.request("decode", steps=2)
        assert caught.value.peer == "fake" and caught.value.stderr[-1] == "about to crash"
        assert "about to crash" in str(caught.value)
        assert not peer.running
        assert load(peer)["weights"] == "int4"

    def test_a_peer_that_takes_too_long_is_ended(self, script: Path) -> None:
        peer = Peer("fake", sys.executable, script, threads=1, timeout=30)
        load(peer)
        peer.request("prepare", prompts=[[HANG]], shared=0, steps=9)
        peer.request("decode", steps=2)
        assert peer._process is not None
        process = peer._process.pid
        peer.timeout = 0.3
        with pytest.raises(PeerError, match=r"fake gave no answer to 'decode' within 0.3 s"):
            peer.request("decode", steps=2)
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)

    def test_nonsense_is_not_taken_for_an_answer(self, peer: Peer) -> None:
        peer._command = [sys.executable, "-c", "input(); print('not an answer', flush=True); input()"]
        with pytest.raises(PeerError, match="answered 'load' with 'not an answer"):
            load(peer)
        assert not peer.running

    def test_an_exception_is_named(self, peer: Peer) -> None:
        load(peer)
        peer.request("prepare", prompts=[[RAISE]], shared=0, steps=9)
        peer.request("decode", steps=2)
        with pytest.raises(PeerError, match="MemoryError: no room for keys") as caught:
            peer.request("decode", steps=2)
        assert caught.value.stderr[-1] == "MemoryError: no room for keys"

    def test_an_interpreter_that_is_not_there(self, script: Path) -> None:
        with pytest.raises(PeerError, match="fake cannot be started"):
            load(Peer("fake", "/no/such/python", script, threads=1, timeout=5))

    def test_a_script_that_cannot_be_imported(self, tmp_path: Path) -> None:
        script = tmp_path / "broken.py"
        script.write_text("import a_module_that_is_not_installed\n")
        peer = Peer("broken", sys.executable, script, threads=1, timeout=30)
        with pytest.raises(PeerError, match="ModuleNotFoundError: No module named 'a_module_that_is_not_installed'"):
            load(peer)

    def test_closing_twice_or_never_started(self, script: Path) -> None:
        peer = Peer("fake", sys.executable, script, threads=1, timeout=5)
        peer.close()
        load(peer)
        peer.close()
        peer.close()
        assert not peer.running


@pytest.fixture
def kinds(script: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, PeerKind]:
    """Peers of our own: one that runs here, one that would need an environment, one that copies the prefix."""
    kinds = {
        kind.name: kind
        for kind in (
            PeerKind("fake", str(script), own_environment=False),
            PeerKind("absent", str(script)),
            PeerKind("copying", str(script), copies="float32", own_environment=False),
        )
    }
    monkeypatch.setattr(contest_module, "KINDS", kinds)
    monkeypatch.setattr(contest_module, "resolve_model", lambda model, **_: Path(model))
    monkeypatch.setattr(contest_module, "SETTLE_SECONDS", 0.0)
    return kinds


def contest(tmp_path: Path, names: tuple[str, ...], *, timeout: float = 30, memory: int = 10**6) -> Contest:
    options = PeerOptions(names, tmp_path / "environments", timeout)
    sizes = Sizes([(2, 4), (3, 10**6)], suffix=1, new=8, numbers_per_token=10)
    return Contest(options, "model", sizes, threads=2, dtype=torch.bfloat16, memory=memory, progress=lambda note: None)


def prompts(batch: int, prefix: int, trick: int = 0) -> list[list[int]]:
    return [[9] * prefix + [trick] for _ in range(batch)]


class TestContest:
    def test_figures_are_medians_of_the_turns(self, tmp_path: Path, kinds: dict[str, PeerKind]) -> None:
        with contest(tmp_path, ("fake",)) as running:
            running.prepare(prompts(2, 4), 4)
            for _ in range(3):
                running.take_turns(2)
            (figures,) = running.results(4).values()
            assert figures == {
                "prefix_tokens_per_s": 8.0,
                "decode_tokens_per_s": 8.0,
                "step_ms": 250.0,
                "step_ms_range": (250.0, 250.0),
            }
            report = running.report()["fake"]
            assert report["versions"] == {"fake": "1.0", "dtype": "bfloat16"} and report["weights"] == "int4"

    def test_who_is_not_installed_or_has_no_room_does_not_stop_the_others(
        self, tmp_path: Path, kinds: dict[str, PeerKind]
    ) -> None:
        with contest(tmp_path, ("absent", "copying", "fake")) as running:
            running.prepare(prompts(3, 10**4), 10**4)
            running.take_turns(2)
            results = running.results(10**4)
            assert results["absent"]["error"] == "absent is not installed (make bench-peers)"
            assert "1.2 MB of keys and values" in results["copying"]["error"]
            assert results["fake"]["step_ms"] == 250.0
            running.release()
            running.prepare(prompts(2, 4), 4)
            running.take_turns(2)
            assert "step_ms" in running.results(4)["copying"]
            assert running.report()["absent"] == {"error": "absent is not installed (make bench-peers)"}

    @pytest.mark.parametrize(
        ("trick", "reason"),
        [(CRASH, "ended during"), (HANG, "no answer"), (SHORT, "decoded 2 tokens in 2 sequences, not 2 in each of 2")],
    )
    def test_who_fails_is_out_for_one_combination(
        self, tmp_path: Path, kinds: dict[str, PeerKind], trick: int, reason: str
    ) -> None:
        with contest(tmp_path, ("fake",), timeout=2) as running:
            running.prepare(prompts(2, 4, trick), 4)
            running.take_turns(2)
            assert reason in running.results(4)["fake"]["error"]
            running.take_turns(2)  # nothing happens
            running.release()
            running.prepare(prompts(2, 4), 4)
            running.take_turns(2)
            assert running.results(4)["fake"]["step_ms"] == 250.0

    def test_copies_take_only_memory_that_is_free(
        self, tmp_path: Path, kinds: dict[str, PeerKind], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kinds["another"] = replace(kinds["copying"], name="another")
        monkeypatch.setattr(contest_module, "available_memory", lambda: 1500)  # each needs 2 x (4 + 1 + 8) x 10 x 4
        with contest(tmp_path, ("copying", "another")) as running:
            running.prepare(prompts(2, 4), 4)
            running.take_turns(2)
            results = running.results(4)
            assert "step_ms" in results["copying"]
            assert "MB of memory are free" in results["another"]["error"]

    def test_an_environment_counts_when_its_installation_was_finished(self, tmp_path: Path) -> None:
        kind = PeerKind("some", "some.py")
        (tmp_path / "some" / "bin").mkdir(parents=True)
        assert kind.python(tmp_path) is None
        (tmp_path / "some" / registry.INSTALLED).touch()
        assert kind.python(tmp_path) == tmp_path / "some" / "bin" / "python"

    def test_what_is_reserved_covers_every_combination(self) -> None:
        sizes = Sizes([(1, 500), (64, 100)], suffix=32, new=16, numbers_per_token=10)
        arguments = sizes.load_arguments()
        assert arguments["sequences"] == 64
        assert arguments["context"] >= 500 + 32 + 16
        assert arguments["cache_bytes"] >= 2 * 10 * (100 + 64 * (32 + 16))


def test_names() -> None:
    assert peer_names("all") == tuple(KINDS)
    assert peer_names("vllm,llama.cpp,vllm") == ("vllm", "llama.cpp")
    with pytest.raises(ConfigurationError, match="got 'ollama'"):
        peer_names("vllm,ollama")


def test_every_peer_has_its_script_and_its_pins() -> None:
    for kind in KINDS.values():
        assert (registry.HERE / kind.script).is_file()
        if kind.own_environment:
            pins = Path(__file__).parents[1] / "requirements-bench" / f"{kind.name}.txt"
            lines = [line for line in pins.read_text().splitlines() if line and not line.startswith("#")]
            assert lines and all("==" in line for line in lines)


def test_a_model_is_converted_once_and_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "weights").write_text("1")
    calls = []

    def convert(directory: Path) -> None:
        calls.append(directory)
        directory.mkdir()
        (directory / "converted").write_text((checkpoint / "weights").read_text())

    first = converted("fake", checkpoint, convert)
    assert converted("fake", checkpoint, convert) == first and len(calls) == 1
    (checkpoint / "weights").write_text("22")
    assert (converted("fake", checkpoint, convert) / "converted").read_text() == "22"


@pytest.fixture(scope="module")
def model(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=1024))


def test_transformers_decodes_what_we_decode(tiny: Path, llm: LLM) -> None:
    prefix = [5, 6, 7, 8, 9, 10]
    prompts = [[*prefix, 11, 12], [*prefix, 13, 14], [*prefix, 15, 16]]
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    expected = [
        list(output.outputs[0].token_ids) for output in llm.generate([{"prompt_token_ids": p} for p in prompts], params)
    ]
    peer = Peer("transformers", sys.executable, registry.HERE / "transformers.py", threads=1, timeout=120)
    try:
        peer.request("load", model=str(tiny), threads=1, sequences=3, context=20, cache_bytes=0, dtype="float32")
        peer.request("prepare", prompts=prompts, shared=len(prefix), steps=8)
        first, second = (peer.request("decode", steps=4)["tokens"] for _ in range(2))
    finally:
        peer.close()
    # the first token was chosen when the prompt was computed
    assert [a + b for a, b in zip(first, second, strict=True)] == [tokens[1:] for tokens in expected]


SIZES = ["--batch", "2", "--prefix", "40", "--suffix", "4", "--new", "8"]


def bench(model: str, *arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "decode", "--model", model, *SIZES, *arguments])


def test_transformers_beside_the_engines(model: str, tmp_path: Path) -> None:
    arguments = ["--peers", "vllm,transformers", "--peers-in", str(tmp_path), "--sharing", "attention"]
    result = bench(model, *arguments, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    own, vllm, transformers = report["results"]
    assert own["sharing"] == "attention" and own["prefix_tokens_per_s"] > 0
    assert (vllm["sharing"], vllm["runner"]) == ("peer", "vllm") and "not installed" in vllm["error"]
    assert (transformers["sharing"], transformers["runner"]) == ("peer", "transformers")
    assert transformers["error"] is None and transformers["prefix_tokens_per_s"] > 0
    assert transformers["decode_tokens_per_s"] == pytest.approx(2 / transformers["step_ms"] * 1e3)
    assert report["peers"]["transformers"]["versions"]["transformers"]


def test_the_table_names_peers_and_their_versions(model: str, tmp_path: Path) -> None:
    result = bench(model, "--peers", "all", "--peers-in", str(tmp_path), "--sharing", "attention")
    assert result.exit_code == 0, result.output
    assert "2 x 40 tokens, llama.cpp: llama.cpp is not installed (make bench-peers)" in result.output
    assert "transformers: transformers " in result.output and "prefix" in result.output


def test_a_peer_that_no_combination_was_for(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contest_module, "available_memory", lambda: 1)
    arguments = ["--peers", "transformers", "--sharing", "attention"]
    result = bench(model, *arguments)
    assert result.exit_code == 0, result.output
    assert "of memory are free" in result.output
    report = json.loads(bench(model, *arguments, "--json").stdout)["peers"]
    assert report == {"transformers": {"versions": {}, "weights": None, "keys": None, "idle_cores": 0.0}}


def test_a_gguf_file_is_given_to_who_reads_it(
    tmp_path: Path, kinds: dict[str, PeerKind], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve(model: str, as_file: bool) -> Path:
        asked.append(as_file)
        return Path(model)

    monkeypatch.setattr(contest_module, "resolve_model", resolve)
    for takes in (False, True):
        kinds["fake"] = replace(kinds["fake"], takes_files=takes)
        with contest(tmp_path, ("fake",)) as running:
            running.prepare(prompts(2, 4), 4)
    assert asked == [False, True]
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert KINDS["llama.cpp"].takes_files and KINDS["llama.cpp"].model(file, tmp_path, 1) == file


def test_without_peers_the_report_is_as_before(model: str) -> None:
    report = bench_decode(model, batches=[2], prefixes=[40], suffix=4, new=8, sharing=("attention",))
    assert "peers" not in report
    assert report["results"][0]["prefix_tokens_per_s"] is None


def test_unknown_peer(model: str) -> None:
    assert isinstance(bench(model, "--peers", "ollama").exception, ConfigurationError)
