"""Batches over many processes, without the processes: grouping, parts, ownership, suspects, merging, tables."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from fake_llm import FakeLLM
from gossamer.batch.input_file import BatchLine
from gossamer.batch.output_file import OutputFile
from gossamer.batch.records import answer_record, refusal_record
from gossamer.cli.app import app
from gossamer.distributed import nodes
from gossamer.distributed.batch import grouping
from gossamer.distributed.batch.attempts import MOST_ALONE, Attempts, Record, groups, histories
from gossamer.distributed.batch.grouping import bounds, common, cuts, prompt_bytes, sort_key
from gossamer.distributed.batch.job import RayBatch
from gossamer.distributed.batch.job_directory import JobDirectory, complete_lines, read_json, write_json
from gossamer.distributed.batch.merge import merge
from gossamer.distributed.batch.ownership import Claim, OwnershipLost, Run, SeenClaim
from gossamer.distributed.batch.part_runner import ActorTask, PartOutput, PartRunner
from gossamer.distributed.batch.plan import answer_options, check_same, make_plan, read_plan, read_rows, row_places
from gossamer.distributed.batch.ray_job import _Watch
from gossamer.distributed.batch.source import Source
from gossamer.distributed.nodes import Node
from gossamer.distributed.quiet import quiet_ray
from gossamer.errors import CheckpointError, ConfigurationError, EngineError, OutputError
from test_batch import chat, completion, write

ALONE = 1 << 30  # rows that fit into a part


def line(number: int, prompt: Any, **fields: Any) -> BatchLine:
    request = completion(f"row-{number}", prompt, **fields)
    return BatchLine(number, request["custom_id"], request["url"], request["body"])


# --- grouping ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.text("ab", max_size=1200), min_size=2, max_size=2))
def test_what_keys_have_in_common_is_common_to_the_prompts(prompts: list[str]) -> None:
    one, other = (line(number, prompt) for number, prompt in enumerate(prompts))
    pairs = zip(prompt_bytes(one), prompt_bytes(other), strict=False)
    true = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    told = common(sort_key(one), sort_key(other))
    assert told <= true  # a hash stands for a whole block
    assert true - told < grouping.HEAD if told < 64 * grouping.HEAD else True


def test_prompts_begin_alike_where_tokens_do() -> None:
    def of(*messages: dict, **fields: Any) -> bytes:
        request = chat("a", *messages, **fields)
        return prompt_bytes(BatchLine(1, "a", request["url"], request["body"]))

    system, user = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    assert of(system, user).startswith(of(system))
    assert not of(system, user, tools=[tool]).startswith(of(system))
    assert not of(system, user, cache_salt="mine").startswith(of(system))  # nothing is shared between salts
    assert not of(system, user, model="adapter").startswith(of(system))
    ids = prompt_bytes(line(1, [5, 300, 70_000]))
    assert ids.startswith(prompt_bytes(line(2, [5, 300]))) and not ids.startswith(prompt_bytes(line(3, [5, 301])))
    assert prompt_bytes(line(1, "x", top_p="no number")) == b""  # refused later, with the reason


@given(
    st.lists(st.binary(max_size=40), max_size=80).map(sorted), st.integers(1, 20), st.integers(0, 20), st.integers(1, 5)
)
def test_parts_hold_every_row_once_within_their_limits(keys: list[bytes], least: int, more: int, actors: int) -> None:
    parts = cuts(keys, least, least + more)
    assert [row for part in parts for row in part] == list(range(len(keys)))
    assert all(least <= len(part) for part in parts[:-1])
    assert all(len(part) <= max(least + more, 1) for part in parts)
    low, high = bounds(max(len(keys), 1), actors, 4)
    assert 1 <= low <= high


def test_small_groups_stay_whole_and_a_large_one_is_split() -> None:
    rng = random.Random(4)
    heads = ["".join(rng.choices("xyz", k=400)) for _ in range(16)]
    rows = [line(number, heads[number % 16] + str(number)) for number in range(128)]
    keys = sorted((sort_key(row), row.number % 16) for row in rows)
    parts = cuts([key for key, _ in keys], *bounds(128, 2, 256))
    assert len(parts) == 2
    assert not {keys[place][1] for place in parts[0]} & {keys[place][1] for place in parts[1]}
    rows = [line(number, "x" * 4000 + str(number)) for number in range(4000)]
    keys_of_one = sorted(sort_key(row) for row in rows)
    parts = cuts(keys_of_one, *bounds(4000, 4, 16))
    assert max(map(len, parts)) <= 4000 / (4 * 4)


# --- plan -------------------------------------------------------------------------------------------------------------


def planned(directory: Path, *lines: object, max_num_seqs: int = ALONE, actors: int = 1) -> tuple[JobDirectory, Any]:
    job = JobDirectory(directory / "out.jsonl.parts")
    job.running.mkdir(parents=True, exist_ok=True)
    source = Source(write(directory / "in.jsonl", *lines))
    answers = answer_options({}, model="m", version="1", max_tokens=None, adapters={})
    return job, make_plan(job, source, answers, digest=source.digest(), actors=actors, max_num_seqs=max_num_seqs)


def test_a_plan_has_every_request_once_and_is_there_when_all_of_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    rows = [completion(f"{number}", f"{number % 5} prefix {number}") for number in range(50)]
    lines = [*rows[:20], b"{", completion("7", "twice"), *rows[20:], b"", completion("bad", "x", top_p=9)]
    job, plan = planned(tmp_path, *lines, max_num_seqs=2, actors=3)
    assert (plan.lines, plan.refused, sum(plan.parts)) == (53, 2, 51)
    found = [row for part in range(len(plan.parts)) for row in read_rows(job.rows(part))]
    numbers = {row.custom_id: row.number for row in found}
    assert len(found) == 51 and numbers["19"] == 20 and numbers["20"] == 23 and numbers["bad"] == 54
    assert read_plan(job) == plan
    job.plan.write_text("[]")
    with pytest.raises(CheckpointError, match="--overwrite"):
        read_plan(job)
    job.plan.unlink()

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        planned(tmp_path, *lines)
    assert read_plan(job) is None


def test_a_draw_is_the_rows_own(tmp_path: Path) -> None:
    job, _ = planned(tmp_path, *(completion(name) for name in "abc"))
    draws = {row.custom_id: row.draw for row in read_rows(job.rows(0))}
    job, _ = planned(tmp_path, completion("new"), *(completion(name) for name in "cba"))
    again = {row.custom_id: row.draw for row in read_rows(job.rows(0))}
    assert len(set(again.values())) == 4 and again.items() >= draws.items()


def test_another_input_and_other_options_are_refused_by_name(tmp_path: Path) -> None:
    _, plan = planned(tmp_path, completion("a"))
    check_same(plan, digest=plan.input, answers=plan.answers, source=tmp_path / "in.jsonl")
    write(tmp_path / "in.jsonl", completion("a"), completion("b"))
    with pytest.raises(ConfigurationError, match=r"in\.jsonl is not the input"):
        check_same(plan, digest=Source(tmp_path / "in.jsonl").digest(), answers=plan.answers, source=Path("in.jsonl"))
    for changed in ({"max_tokens": 5}, {"model": "other"}, {"gossamer": "2"}, {"dtype": "float32"}, {"seed": 1}):
        (name,) = changed
        with pytest.raises(ConfigurationError, match=f"^{name} was "):
            check_same(plan, digest=plan.input, answers=plan.answers | changed, source=Path("in.jsonl"))
    # what only changes how fast answers come may change
    faster = answer_options({"memory": "1GB", "max_num_seqs": 3}, model="m", version="1", max_tokens=None, adapters={})
    assert faster == plan.answers


# --- sources ----------------------------------------------------------------------------------------------------------


def test_a_directory_is_one_input(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write(folder / "b.jsonl", completion("c"), completion("a"))
    write(folder / "a.jsonl", completion("a"), b"", completion("b"))
    (folder / "notes.txt").write_text("not ours")
    found = list(Source(folder).lines())
    assert [(each.number, each.custom_id) for each in found] == [(1, "a"), (3, "b"), (4, "c"), (5, "a")]
    assert getattr(found[-1], "code", None) == "duplicate_custom_id"
    (folder / "c.parquet").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="two directories"):
        Source(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="no files"):
        Source(tmp_path / "empty")
    with pytest.raises(ConfigurationError, match="not there"):
        Source(tmp_path / "nowhere.jsonl")


def test_rows_of_parquet_are_the_lines_that_they_say(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    asked = [completion("a", "Grüße"), completion("b", "x", n=2), chat("c", {"role": "user", "content": None})]
    texts = [json.dumps(each["body"]) for each in asked]
    texts[2] = '{"messages": [], "n": 1}, "custom_id": "smuggled"'
    columns = {name: [each[name] for each in asked] for name in ("custom_id", "method", "url")}
    parquet.write_table(arrow.table(columns | {"body": texts}), tmp_path / "text.parquet")
    found = list(Source(tmp_path / "text.parquet").lines())
    assert [each.body for each in found[:2]] == [each["body"] for each in asked[:2]]
    assert (found[2].custom_id, found[2].code) == ("c", "invalid_body")
    parquet.write_table(arrow.table(columns | {"body": [each["body"] for each in asked]}), tmp_path / "struct.parquet")
    found = list(Source(tmp_path / "struct.parquet").lines())
    assert found[0].body == asked[0]["body"] and "n" not in found[0].body  # a null is a field that was not given
    parquet.write_table(arrow.table({"custom_id": ["a"]}), tmp_path / "less.parquet")
    with pytest.raises(ConfigurationError, match="no column 'method'"):
        list(Source(tmp_path / "less.parquet").lines())
    (tmp_path / "none.parquet").write_text("text")
    with pytest.raises(ConfigurationError, match="as Parquet"):
        list(Source(tmp_path / "none.parquet").lines())


# --- ownership --------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from(["claim", "check"]), max_size=30))
@settings(max_examples=30)
def test_of_all_owners_the_last_one_owns(actions: list[str]) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        claims: list[Claim] = []
        for action in actions:
            if action == "claim":
                claims.append(Claim(Path(name), "part"))
            for place, claim in enumerate(claims):
                if place == len(claims) - 1:
                    claim.check()
                else:
                    with pytest.raises(OwnershipLost):
                        claim.check()
        assert [claim.number for claim in claims] == list(range(1, len(claims) + 1))
        for claim in claims:
            claim.close()


def test_processes_that_claim_at_once_get_different_numbers(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from gossamer.distributed.batch.ownership import Claim\n"
        "print([Claim(Path(sys.argv[1]), 'part').number for _ in range(40)])"
    )
    programs = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) for _ in range(3)]
    numbers = [number for each in programs for number in json.loads(each.communicate()[0])]
    assert sorted(numbers) == list(range(1, 121))


def test_a_zombie_writes_nothing_that_counts(tmp_path: Path) -> None:
    rows = [completion(name) for name in "abcd"]
    job, plan = planned(tmp_path, *rows)
    places, by_id = row_places(job.rows(0)), {row.custom_id: row for row in read_rows(job.rows(0))}
    run = Run(job.path)
    above = SeenClaim(job.path, "run", run.number)
    zombie_claim = Claim(job.path, "part-00000.owner", above=above)
    zombie = PartOutput(job, 0, zombie_claim, places)
    zombie.append(answer_record(by_id["a"], {"from": "zombie"}))
    zombie.append(refusal_record(by_id["b"], EngineError("no")))
    successor = PartOutput(job, 0, Claim(job.path, "part-00000.owner", above=above), places)
    assert successor.answered == {"a", "b"}  # an error of this run counts as well
    with pytest.raises(OwnershipLost, match="writes no more"):
        zombie.append(answer_record(by_id["c"], {"from": "zombie"}))
    # even a line that was on its way when the successor came
    OutputFile.append(zombie._file, answer_record(by_id["d"], {"from": "zombie"}))
    for name in "cd":
        successor.append(answer_record(by_id[name], {"from": "successor"}))
    write_json(job.done(0), {})
    merge(job, plan, tmp_path / "out.jsonl", "jsonl")
    merged = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [each["custom_id"] for each in merged] == list("abcd")
    assert [each["response"]["body"].get("from") for each in merged] == ["zombie", None, "successor", "successor"]
    run.close()
    later = Run(job.path)  # another command: the error is tried again, and nobody of the first one may write
    with pytest.raises(OwnershipLost, match="another one has begun"):
        successor.append(answer_record(by_id["d"], {}))
    above = SeenClaim(job.path, "run", later.number)
    assert PartOutput(job, 0, Claim(job.path, "part-00000.owner", above=above), places).answered == set("acd")
    later.close()


def test_one_command_leads_a_job(tmp_path: Path) -> None:
    with Run(tmp_path) as first:
        with pytest.raises(ConfigurationError, match=f"process id {os.getpid()}"):
            Run(tmp_path)
        first.beat()
    with Run(tmp_path) as second:
        assert second.number == 2
    code = "import sys, os; from pathlib import Path; from gossamer.distributed.batch.ownership import Run\n"
    code += "Run(Path(sys.argv[1])); os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    with Run(tmp_path) as fourth:  # the third was killed
        assert fourth.number == 4


def test_a_command_on_a_machine_of_its_own_is_watched_for_signs_of_life(tmp_path: Path, monkeypatch: Any) -> None:
    from gossamer.distributed.batch import ownership

    monkeypatch.setattr(ownership, "BEAT", 0.03)
    monkeypatch.setattr(ownership, "EXPIRY", 0.3)
    (tmp_path / "run.1").write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    real_sleep, beats = ownership.time.sleep, iter(range(100))

    def other_writes(seconds: float) -> None:
        real_sleep(seconds)
        (tmp_path / "run.1").write_text(json.dumps({"host": "elsewhere", "pid": 7, "beat": next(beats)}))

    monkeypatch.setattr(ownership.time, "sleep", other_writes)
    with pytest.raises(ConfigurationError, match="on elsewhere with process id 7"):
        Run(tmp_path)
    monkeypatch.setattr(ownership.time, "sleep", real_sleep)
    with Run(tmp_path) as second:
        assert second.number == 2


# --- suspects ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [set(), {5}, {0, 63}, set(range(20, 24))])
def test_rows_that_kill_are_found_and_all_others_answered(tmp_path: Path, poison: set[int]) -> None:
    """Processes that die as soon as a row of poison is in them, which holds 16 rows at a time."""
    job = JobDirectory(tmp_path)
    rows, finished, given_up, deaths = list(range(64)), set(), set(), 0

    def live(epoch: int) -> bool:
        left = set(rows) - finished - given_up
        files = [job.attempts(0, number) for number in range(1, epoch)]
        records = histories(files, left, 1)
        given_up.update(row for row in left if records.get(row, Record()).given_up)
        attempts = Attempts(job.attempts(0, epoch), 1)
        for group in groups([row for row in rows if row in left - given_up], records):
            for start in range(0, len(group), 16):
                chunk = group[start : start + 16]
                for row in chunk:
                    attempts.begin(row)
                if poison & set(chunk):
                    return False
                finished.update(chunk)
        attempts.close(ended=True)
        return True

    while not live(deaths + 1):
        deaths += 1
        assert deaths < 40
    assert given_up == poison
    assert finished == set(rows) - poison
    assert deaths <= len(poison) * (2 + 2 + MOST_ALONE)


def test_a_killed_command_is_not_held_against_its_rows(tmp_path: Path) -> None:
    job = JobDirectory(tmp_path)
    for epoch in range(1, 9):
        Attempts(job.attempts(0, epoch), epoch).begin(1)  # each run is killed while it computes row 1
    files = [job.attempts(0, epoch) for epoch in range(1, 9)]
    assert histories(files, {1}, 9) == {}
    Attempts(job.attempts(0, 9), 9).begin(1)  # an actor dies, and another one of the same run takes the part
    assert histories([*files, job.attempts(0, 9)], {1}, 9) == {1: Record(1, 1, 1, 1)}


# --- an actor, in this process ----------------------------------------------------------------------------------------


class Drawing(FakeLLM):
    """The fake engine, which draws nothing, and so has no use for what selects draws; it notes it."""

    def __init__(self) -> None:
        super().__init__()
        add, self.draws = self.engine.add_request, []

        def add_request(*arguments: Any, draw: int, **options: Any) -> None:
            self.draws.append(draw)
            add(*arguments, **options)

        self.engine.add_request = add_request  # type: ignore[method-assign]


class Local(PartRunner):
    llm: Any

    def load(self) -> Any:
        return Drawing()


class Broken(PartRunner):
    def load(self) -> Any:
        raise ConfigurationError("this model cannot be loaded")


def actor(job: JobDirectory, run: int, kind: type[PartRunner] = Local) -> Callable[[int], dict[str, Any]]:
    runner = kind(ActorTask(str(job.path), run, "fake", "fake"))
    return lambda part: json.loads(runner({"part": [part]})["report"][0])


def test_an_actor_answers_its_part_and_goes_on_where_another_one_stopped(tmp_path: Path, monkeypatch: Any) -> None:
    job, _ = planned(tmp_path, *(completion(name, name) for name in "abcde"), completion("f", "FAIL"))
    run = Run(job.path)
    real_write, calls = os.write, []

    def filling(handle: int, data: bytes) -> int:
        calls.append(data)
        if b"batch_req" in data and sum(b"batch_req" in each for each in calls) > 3:
            raise OSError(28, "No space left on device")
        return real_write(handle, data)

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", filling)
        report = actor(job, run.number)(0)
    kind, message = report["error"]
    assert kind == "OutputError" and "No space left" in message and "--resume" in message
    kept = {json.loads(each)["custom_id"] for each in complete_lines(job.answer_files(0)[-1])}
    assert len(kept) == 3
    report = actor(job, run.number)(0)
    assert (report["answered"], report["failed"], report["error"]) == (5, 1, None)
    assert report["failures"][0][0] == 6
    begun = job.attempts(0, 2).read_text().splitlines()[1:-1]
    assert len(begun) == 3 and not {"abcdef"[int(each) - 1] for each in begun} & kept
    assert read_json(job.done(0))["answered"] == 5 and not job.progress(0).exists()
    run.close()
    with Run(job.path):  # another command has begun
        assert actor(job, run.number)(0)["error"][0] == "OwnershipLost"


def test_an_error_of_an_actor_is_told_and_not_raised(tmp_path: Path) -> None:
    job, _ = planned(tmp_path, completion("a"))
    with Run(job.path) as run:
        assert actor(job, run.number, Broken)(0)["error"] == ["ConfigurationError", "this model cannot be loaded"]
        assert actor(job, run.number)(7)["error"][0] == "EngineError"  # there is no such part
        watch = _Watch(job, run, 1, lambda _: None)
        watch.look()
        for _ in range(3):  # no process is left to say that it was done
            PartRunner._note_load(Local(ActorTask(str(job.path), run.number, "", "")), "begun")
        watch.look()  # each was done once
        for _ in range(4):
            with job.loads.open("a") as file:
                file.write(json.dumps([run.number, "begun"]) + "\n")
        with pytest.raises(EngineError, match="died while they loaded the model"):
            watch.look()


def test_ray_does_not_write_between_our_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with quiet_ray():
        for text in ("\x1b[33m(raylet)\x1b[0m A worker died", "{}", "(autoscaler +3s) more", "(rayleigh)"):
            print(text)
    assert capsys.readouterr().out == "{}\n(rayleigh)\n"


def test_a_process_that_hangs_ends_itself(tmp_path: Path) -> None:
    job, _ = planned(tmp_path, completion("a"))
    run = Run(job.path)
    code = (
        "import sys, time; from gossamer.distributed.batch import part_runner as module\n"
        "module.STUCK_SECONDS = 0.2\n"
        "class Stuck(module.PartRunner):\n"
        "    def load(self): return None\n"
        "    def _answer_group(self, *_): time.sleep(60)\n"
        "runner = Stuck(module.ActorTask(sys.argv[1], int(sys.argv[2]), '', ''))\n"
        "time.sleep(0.5); runner({'part': [0]})"
    )
    done = subprocess.run([sys.executable, "-c", code, str(job.path), str(run.number)], check=False, timeout=60)
    assert done.returncode == 70
    run.close()


def test_what_can_be_seen_without_a_cluster_is_refused_before_there_is_one(tmp_path: Path, monkeypatch: Any) -> None:
    source = write(tmp_path / "in.jsonl", completion("a"))

    def batch(**changes: Any) -> RayBatch:
        return RayBatch("model", **{"input": source, "output": tmp_path / "out", "address": "local"} | changes)

    assert batch().output_file == tmp_path / "out" / "answers.jsonl"
    assert batch(format="parquet").output_file == tmp_path / "out" / "answers.parquet"
    assert batch(output=tmp_path / "a.parquet").output_format == "parquet"
    for changes, message in (
        ({"input": tmp_path / "nowhere"}, "not there"),
        ({"output": tmp_path / "no" / "where" / "a"}, "does not exist"),
        ({"output": source, "overwrite": True}, "both input and output"),
        ({"resume": True, "overwrite": True}, "one of them"),
        ({"format": "csv"}, "jsonl or parquet"),
        ({"options": {"memory": "much"}}, "much"),
        ({"default_max_tokens": 0}, "max_tokens must be at least 1"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            batch(**changes)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "answers.jsonl").write_text("mine")
    with pytest.raises(ConfigurationError, match=r"--resume .* --overwrite"):
        batch()
    with pytest.raises(ConfigurationError, match="nothing to go on from"):
        batch(resume=True)
    (tmp_path / "out" / "answers.jsonl.parts").mkdir()
    (tmp_path / "out" / "answers.jsonl.parts" / "notes").write_text("mine")
    with pytest.raises(ConfigurationError, match="not the directory of a batch"):
        batch(overwrite=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigurationError, match=r"pip install 'gossamer\[ray\]'"):
        batch()


def test_machines_that_differ_are_refused_by_name() -> None:
    node = Node("id", "10.0.0.7", 4, 8 << 30)
    good = {"gossamer": nodes.gossamer.__version__, "host": "one", "error": None, "digest": "a" * 64, "lora": {}}
    nodes._check(node, good, None)
    nodes._check(node, good | {"host": "two"}, good)
    for told, message in (
        ({"gossamer": "0.0.1"}, r"10\.0\.0\.7 \(one\) has Gossamer 0\.0\.1, this one"),
        ({"digest": "b" * 64}, "another model or adapter"),
        ({"lora": {"sql": "b" * 64}}, "another model or adapter"),
        ({"error": "it does not see /shared"}, "does not see /shared"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            nodes._check(node, good | told, good)


def test_a_machine_tells_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    write(tmp_path / "witness", completion("a"))
    told = nodes.look(str(tmp_path / "nowhere"), {}, str(tmp_path / "witness"))
    assert "cannot find the model" in told["error"]
    assert "does not see" in nodes.look("x", {}, str(tmp_path / "parts" / "run.1"))["error"]


@pytest.mark.parametrize("flag", ["--actors=2", "--format=parquet", "--insecure"])
def test_flags_of_ray_need_it(tmp_path: Path, flag: str) -> None:
    arguments = ["batch", "model", str(write(tmp_path / "in", completion("a"))), "-o", str(tmp_path / "out"), flag]
    result = CliRunner().invoke(app, arguments)
    assert isinstance(result.exception, ConfigurationError) and "goes with --ray" in str(result.exception)


# --- merging ----------------------------------------------------------------------------------------------------------


def answered_job(tmp_path: Path, count: int = 40) -> tuple[JobDirectory, Any, list[str]]:
    names = [f"ü{number}\ud800" if number % 9 == 4 else f"row-{number}" for number in range(count)]
    lines: list[object] = [completion(name, f"{number % 3}") for number, name in enumerate(names)]
    job, plan = planned(tmp_path, *lines, b"[]", max_num_seqs=1, actors=3)
    assert len(plan.parts) > 3
    above = SeenClaim(job.path, "run", Run(job.path).number)
    for part in range(len(plan.parts)):
        claim = Claim(job.path, f"part-{part:05d}.owner", above=above)
        output = PartOutput(job, part, claim, row_places(job.rows(part)))
        rows = list(read_rows(job.rows(part)))
        random.Random(part).shuffle(rows)
        for row in rows:
            output.append(answer_record(row, {"number": row.number, "text": row.custom_id}))
        output.close()
    return job, plan, names


@pytest.mark.parametrize("format", ["jsonl", "parquet"])
def test_the_output_has_the_order_of_the_input(tmp_path: Path, format: str, monkeypatch: Any) -> None:
    from gossamer.distributed.batch import merge as module

    monkeypatch.setattr(module, "_OPEN_FILES", 2)
    job, plan, names = answered_job(tmp_path)
    output = tmp_path / f"out.{format}"
    merge(job, plan, output, format)
    if format == "jsonl":
        found = [json.loads(line) for line in output.read_bytes().splitlines()]
        assert [each["custom_id"] for each in found] == [*names, None]
        assert [each["response"]["body"]["number"] for each in found[:-1]] == list(range(1, len(names) + 1))
        assert found[0].keys() == {"id", "custom_id", "response", "error"}
        assert found[-1]["error"]["code"] == "invalid_line"
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = parquet.read_table(output).to_pylist()
        assert [json.loads(each["body"])["text"] for each in rows[:-1]] == names
        assert rows[0]["status_code"] == 200 and rows[-1]["status_code"] is None
        assert json.loads(rows[-1]["error"])["line"] == len(names) + 1
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["in.jsonl", "out.jsonl.parts", output.name])


def test_an_output_is_never_half_there(tmp_path: Path, monkeypatch: Any) -> None:
    job, plan, _ = answered_job(tmp_path)
    output = tmp_path / "out.jsonl"
    output.write_text("of an earlier run")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        for format in ("jsonl", "parquet"):
            with pytest.raises(OutputError, match=r"No space left.*--resume"):
                merge(job, plan, output, format)
    assert output.read_text() == "of an earlier run"
    last = job.answer_files(2)[-1]
    last.write_bytes(last.read_bytes()[:-9])  # torn
    with pytest.raises(OutputError, match="1 rows of part 2 have no line"):
        merge(job, plan, output, "jsonl")
    assert output.read_text() == "of an earlier run"
    assert not [each for each in tmp_path.iterdir() if each.name.endswith("draft")]
    assert len(list(complete_lines(last))) == plan.parts[2] - 1


def test_a_file_is_written_as_a_whole(tmp_path: Path, monkeypatch: Any) -> None:
    write_json(tmp_path / "a", [1])
    monkeypatch.setattr(
        json, "dump", lambda value, file: file.write("[2") and (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OutputError, match="full"):
        write_json(tmp_path / "a", [2])
    assert read_json(tmp_path / "a") == [1] and len(list(tmp_path.iterdir())) == 1
    assert read_json(tmp_path / "nothing") is None
