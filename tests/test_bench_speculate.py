"""``gossamer bench speculate``: tasks with good answers, outputs that are forced to them, peers, and the command."""

from __future__ import annotations

import ast
import json
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gossamer import LLM, SamplingParams
from gossamer.bench import speculate as bench
from gossamer.bench.peers import speculation as peers_module
from gossamer.bench.peers.servers import SERVERS, ServerKind, ServerSetting, Start
from gossamer.bench.peers.speculation import Ask, Drafting, PeerOptions, SpeculatingPeer
from gossamer.bench.server_process import free_port
from gossamer.bench.speculate import ForcedSampler, SpeculateOptions, bench_speculate
from gossamer.bench.speculate_edits import edits
from gossamer.bench.speculate_tasks import ITEMS, TASKS, Sizes, build_task
from gossamer.cli.app import app
from gossamer.engine.sampling import Sampler, SamplingState
from gossamer.errors import ConfigurationError, PeerError

TINY_CONTEXT = 1024
HARBOUR = Path(__file__).parent.parent / "examples" / "harbour"
SIZES = Sizes(len, 6000, 1500, HARBOUR)  # a token is a character
TEMPLATE = "{% for each in messages %}{{ each['content'] }}\n{% endfor %}"
SMALL: dict[str, Any] = {"rounds": 1, "requests": 2, "context": 1024, "new": 160, "batches": (1, 8)}
SOME = ("predicted-edit", "json", "chat")


class TestTasks:
    @pytest.mark.parametrize("name", TASKS)
    def test_they_are_the_same_every_time_and_fit(self, name: str) -> None:
        items = build_task(name, SIZES)
        assert items == build_task(name, SIZES) and len(items) == ITEMS
        assert len({item.answer for item in items}) == ITEMS
        for item in items:
            assert 0 < len(item.answer) <= SIZES.answer
            assert sum(len(each["content"]) for each in item.messages) <= SIZES.document + 400

    @pytest.mark.parametrize("name", TASKS)
    def test_there_are_enough_for_a_large_batch(self, name: str) -> None:
        items = build_task(name, SIZES, 64)
        prompts = {tuple(each["content"] for each in item.messages) for item in items}
        assert len(items) == len(prompts) and (len(items) == 64 or name == "harbour")

    @pytest.mark.parametrize("name", ["quotes", "summary", "harbour"])
    def test_all_ask_about_one_document(self, name: str) -> None:
        texts = ["\n".join(each["content"] for each in item.messages) for item in build_task(name, SIZES)]
        assert all(text[:3000] == texts[0][:3000] for text in texts) and len(set(texts)) == ITEMS

    def test_what_is_quoted_stands_in_the_document(self) -> None:
        for item in build_task("quotes", SIZES):
            assert item.answer.split("> ", 1)[1].rpartition("\n\n")[0] in item.messages[-1]["content"]
        for item in build_task("harbour", SIZES):
            assert item.answer in item.messages[0]["content"]

    def test_nothing_of_open_answers_stands_in_the_prompt(self) -> None:
        for item in build_task("chat", SIZES):
            assert len(item.messages[-1]["content"]) < 100 < len(item.answer)

    def test_edited_files_are_files_with_another_tree(self) -> None:
        for item in build_task("predicted-edit", SIZES):
            assert item.prediction is not None and item.prediction in item.messages[-1]["content"]
            assert ast.dump(ast.parse(item.prediction)) != ast.dump(ast.parse(item.answer))
        assert [item.answer for item in build_task("edit", SIZES)] == [
            item.answer for item in build_task("predicted-edit", SIZES)
        ]

    def test_every_kind_of_edit_does_what_it_says(self) -> None:
        found = {}
        for edit, _ in zip(edits(len, 3000), range(24), strict=False):
            found[edit.instruction.split()[0]] = edit
        renamed, logged, shortened = found["Rename"], found["Let"], found["Remove"]
        old, new = renamed.instruction.split("`")[1::2]
        names = {node.id for node in ast.walk(ast.parse(renamed.after)) if isinstance(node, ast.Name)}
        assert old not in names and new in names
        assert renamed.after.replace(new, old) == renamed.before
        functions = [node for node in ast.walk(ast.parse(logged.before)) if isinstance(node, ast.FunctionDef)]
        assert 0 < logged.after.count("logger.debug(") <= len(functions)
        without = "".join(line for line in logged.after.splitlines(keepends=True) if "logger.debug(" not in line)
        assert without == logged.before
        documented = [
            ast.get_docstring(node)
            for node in ast.walk(ast.parse(shortened.after))
            if hasattr(node, "args") and isinstance(node, ast.FunctionDef)
        ]
        assert len(shortened.after) < len(shortened.before) and documented.count(None) > len(documented) / 2

    def test_fields_are_those_of_the_schema(self) -> None:
        for item in build_task("json", SIZES):
            assert item.schema is not None
            (rows,) = json.loads(item.answer).values()
            assert rows and all(list(row) == item.schema["properties"]["records"]["items"]["required"] for row in rows)
            for row in rows:
                assert all(str(value) in item.messages[-1]["content"] for value in row.values())

    def test_what_leaves_no_room_is_told(self) -> None:
        with pytest.raises(ConfigurationError, match="quotes: a document of 10 tokens"):
            build_task("quotes", Sizes(len, 10, 10))
        with pytest.raises(ConfigurationError, match="--harbour names its directory"):
            build_task("harbour", Sizes(len, 6000, 1500, Path("/no/such/directory")))
        with pytest.raises(ConfigurationError, match="got 'poems'"):
            build_task("poems", SIZES)


REFERENCE = [7, 8, 9, 3]


class TestForcedSampler:
    def sample(self, output: list[int], ahead: list[int]) -> int:
        state = SamplingState(SamplingParams(temperature=0), [1, 2], output, frozenset(), random.Random(0))
        logits = torch.zeros(1, 16)
        logits[0, 5] = 1
        forced = ForcedSampler(Sampler(), {(1, 2): REFERENCE})
        (token,) = forced.sample(logits, [state.behind(ahead) if ahead else state]).token_ids
        return token

    def test_the_references_next_token_comes(self) -> None:
        assert [self.sample(REFERENCE[:done], []) for done in range(4)] == REFERENCE

    def test_it_comes_behind_drafts_that_agree(self) -> None:
        assert self.sample([7], [8]) == 9 and self.sample([7], [8, 9]) == 3

    def test_behind_others_the_models_choice_stays(self) -> None:
        assert self.sample([7], [9]) == 5 and self.sample([7, 8, 9, 3], []) == 5


@pytest.fixture(scope="module")
def llm(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    template = tmp_path_factory.mktemp("template") / "template.jinja"
    template.write_text(TEMPLATE)
    return LLM(tiny, dtype="float32", chat_template=str(template))


@pytest.fixture(scope="module")
def report(llm: LLM) -> dict[str, Any]:
    return bench_speculate(llm, SpeculateOptions(**SMALL, tasks=SOME))


class TestMeasuring:
    def test_every_combination_has_figures(self, report: dict[str, Any]) -> None:
        rows = [(row["task"], row["batch"], row["mode"]) for row in report["results"]]
        assert rows == [(task, batch, mode) for task in SOME for batch in (1, 8) for mode in ("forced", "free")]
        for row in report["results"]:
            assert row["error"] is None, row
            assert row["tokens_per_s"] > 0 and row["ratio"] == pytest.approx(row["ratios"][0])
            assert row["requests"] == (2 if row["batch"] == 1 else 8) and row["prompt_tokens"] > 0

    def test_answers_are_the_same_with_drafts_and_without(self, report: dict[str, Any]) -> None:
        assert {row["same"] for row in report["results"]} == {1.0}

    def test_accepted_tokens_explain_tokens_per_step(self, report: dict[str, Any]) -> None:
        drafted = 0
        for row in report["results"]:
            assert row["accepted"] <= row["drafted"]
            steps = row["tokens"] / row["tokens_per_step"]
            # a step brings one token besides those that were accepted; drafts of the first step count as well
            assert row["tokens"] - steps == pytest.approx(row["accepted"], abs=row["requests"] * 64)
            drafted += row["drafted"]
            counts = row["by_source"].values()
            assert sum(each["draft_tokens"] for each in counts) == row["drafted"]
        assert drafted > 0

    def test_every_token_is_counted_once(self, llm: LLM, report: dict[str, Any]) -> None:
        row = next(row for row in report["results"] if row["task"] == "chat" and row["mode"] == "forced")
        options = SpeculateOptions(**SMALL)
        requests = bench._requests(llm, "chat", options)[:2]
        assert row["tokens"] == sum(len(each.reference) - 1 for each in requests)

    def test_the_engine_is_left_as_it_was(self, llm: LLM, report: dict[str, Any]) -> None:
        assert type(llm.engine.sampler) is Sampler and not llm.engine.requests

    def test_a_task_that_cannot_be_built_says_why_and_the_others_go_on(self, llm: LLM) -> None:
        options = SpeculateOptions(**SMALL | {"batches": (1,)}, tasks=("harbour", "chat"), modes=("free",))
        missing, chat = bench_speculate(llm, options)["results"]
        assert "--harbour names its directory" in missing["error"] and chat["error"] is None

    def test_an_answer_that_is_not_the_reference_is_no_result(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ForcedSampler, "_next", lambda self, state, token: token)
        options = SpeculateOptions(**SMALL | {"batches": (1,)}, tasks=("chat",), modes=("forced",))
        (row,) = bench_speculate(llm, options)["results"]
        assert row["error"] is not None and "is not the reference" in row["error"] and row["tokens_per_s"] is None

    def test_a_batch_needs_as_many_requests(self, llm: LLM) -> None:
        options = SpeculateOptions(**SMALL | {"batches": (500,)}, tasks=("chat",), modes=("free",))
        (row,) = bench_speculate(llm, options)["results"]
        assert "make no batch of 500" in row["error"]

    @pytest.mark.parametrize(
        ("wrong", "told"),
        [
            ({"tasks": ("poems",)}, "got 'poems'|got poems"),
            ({"modes": ()}, "got none"),
            ({"rounds": 0}, "at least 1"),
            ({"new": 8}, "new must be at least 16"),
            ({"context": 300}, "context 256 more than new"),
        ],
    )
    def test_options_that_have_no_meaning(self, wrong: dict[str, Any], told: str) -> None:
        with pytest.raises(ConfigurationError, match=told):
            SpeculateOptions(**wrong)


# Says how many tokens were asked for, half of them drafted; remembers the slots whose prompts it has computed.
SERVER = """
import http.server, json, sys, threading

class Handler(http.server.BaseHTTPRequestHandler):
    seen = {}
    log_message = lambda *arguments: None

    def do_GET(self):
        self.answer({})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        new = body["n_predict"]
        if new == 0:
            self.seen[body["id_slot"]] = body["prompt"]
        elif "crash" in sys.argv:
            import os
            print("out of slots", flush=True)
            os._exit(3)
        else:
            assert self.seen[body["id_slot"]] == body["prompt"] and body["temperature"] == 0
        timings = {"predicted_n": new, "predicted_ms": 10.0 * new}
        if "--spec-type" in sys.argv:
            timings |= {"predicted_ms": 5.0 * new, "draft_n": new, "draft_n_accepted": new // 2}
        self.answer({"timings": timings, "tokens": [1] * new})

    def answer(self, body):
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """llama.cpp's place is taken by a small server; what the list holds becomes arguments of it."""
    script, more = tmp_path / "server.py", []
    script.write_text(SERVER)

    def start(setting: ServerSetting) -> Start:
        command = [sys.executable, str(script), str(setting.port), *more]
        return Start(command, "int4", [sys.executable, "-c", "print('fake 1.0')"], {})

    monkeypatch.setitem(SERVERS, "llama.cpp", ServerKind("llama.cpp", start))
    return more


def setting() -> ServerSetting:
    return ServerSetting(
        model=Path("m"), environments=Path("e"), threads=1, clients=2, context=64, cache_bytes=0, port=free_port()
    )


ASKS = [Ask([1, 2, 3], 9), Ask([4, 5], 17)]


class TestPeers:
    def test_tokens_are_those_after_the_first_and_the_longest_answer_counts(self, fake: list[str]) -> None:
        peer = SpeculatingPeer("llama.cpp", "ngram-simple", setting, 30)
        try:
            together, apart = peer.answer(ASKS, 2), peer.answer(ASKS, 1)
        finally:
            peer.close()
        assert together.tokens == apart.tokens == 8 + 16 and together.drafted == 26 and together.accepted == 4 + 8
        assert together.seconds == pytest.approx(0.085) and apart.seconds == pytest.approx(0.13)
        assert together.sequence_steps == 12 and together.answers == [[1] * 9, [1] * 17]
        assert peer.report()["version"] == "fake 1.0" and "ngram-simple" in peer.report()["command"]

    @pytest.mark.parametrize(("mode", "starts"), [("ngram-simple", 1), ("ngram-mod", 2)])
    def test_what_keeps_earlier_answers_starts_again(
        self, fake: list[str], mode: str, starts: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        started = []
        real = peers_module.ServerProcess
        monkeypatch.setattr(peers_module, "ServerProcess", lambda *each: started.append(each) or real(*each))
        peer = SpeculatingPeer("llama.cpp", mode, setting, 30)
        try:
            peer.answer(ASKS, 2)
            peer.answer(ASKS, 2)
        finally:
            peer.close()
        assert len(started) == starts

    def test_one_that_crashes_says_its_last_words_and_can_be_asked_again(self, fake: list[str]) -> None:
        fake.append("crash")
        peer = SpeculatingPeer("llama.cpp", "none", setting, 30)
        try:
            with pytest.raises(PeerError, match=r"llama\.cpp none") as caught:
                peer.answer(ASKS, 1)
            assert caught.value.peer == "llama.cpp none"
            fake.clear()
            assert peer.answer(ASKS, 1).tokens == 24
        finally:
            peer.close()

    def test_they_stand_beside_ours(self, llm: LLM, fake: list[str]) -> None:
        peers = PeerOptions(
            ("llama.cpp", "vllm"), ("ngram-map-k",), environments=Path("/no/such/directory"), timeout=30
        )
        options = SpeculateOptions(**SMALL | {"batches": (8,)}, tasks=("chat",), peers=peers)
        report = bench_speculate(llm, options)
        forced, ours, base, drafting, missing = report["results"]
        assert (forced["mode"], ours["contestant"]) == ("forced", "gossamer")
        assert (base["contestant"], drafting["contestant"]) == ("llama.cpp none", "llama.cpp ngram-map-k")
        assert base["tokens_per_s"] == pytest.approx(8 * 159 / 1.6) and drafting["ratio"] == pytest.approx(2)
        assert drafting["over_peer"] == pytest.approx(ours["tokens_per_s"] / drafting["tokens_per_s"])
        assert drafting["tokens_per_step"] == pytest.approx(159 / 79)
        assert missing["contestant"] == "vllm none" and "is not installed" in missing["error"]
        assert report["peers"]["llama.cpp none"]["weights"] == "int4" and report["peers"]["vllm none"] == {}

    def test_ways_of_drafting_that_nobody_has(self) -> None:
        with pytest.raises(ConfigurationError, match="got 'eagle'"):
            PeerOptions(("llama.cpp",), ("eagle",))
        assert isinstance(peers_module.DRAFTING["vllm"], Drafting)


def test_the_command(tiny: Path, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    sizes = ["--batch", "1", "--rounds", "1", "--requests", "1", "--new", "64", "--tasks", "chat,harbour"]
    command = ["bench", "speculate", "--model", str(tiny), "--chat-template", str(template), *sizes]
    command += ["--harbour", str(tmp_path)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert "tok/step" in result.stdout and "chat" in result.stdout and "there is no document.md" in result.stdout
    result = CliRunner().invoke(app, [*command, "--mode", "free", "--json"])
    assert [row["task"] for row in json.loads(result.stdout)["results"]] == ["chat", "harbour"]
    refused = CliRunner().invoke(app, [*command, "--mode", "fast"])
    assert refused.exit_code != 0 and "got fast" in str(refused.exception)
