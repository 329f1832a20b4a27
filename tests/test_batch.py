"""A batch answers every line, loses nothing that was answered, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from fake_llm import CONTEXT, FakeLLM, chat_prompt, expected_answer
from forked import Program
from gossamer.batch import BatchRunner, BatchSummary, input_file
from gossamer.errors import ConfigurationError, GossamerError

BATCH_COMMAND = "import gossamer, fake_llm; gossamer.LLM = fake_llm.FakeLLM; from gossamer.cli.app import main; main()"


def completion(custom_id: str, prompt: object = "Once", **fields: object) -> dict:
    body = {"prompt": prompt, "model": "gpt-4o-mini", "max_tokens": 30} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def chat(custom_id: str, *messages: dict, **fields: object) -> dict:
    body = {"messages": list(messages)} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def write(path: Path, *lines: object) -> Path:
    """Requests as JSON; bytes as they are."""
    raw = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"".join(line + b"\n" for line in raw))
    return path


def read(path: Path) -> list[dict]:
    data = path.read_bytes()
    assert data == b"" or data.endswith(b"\n")
    return [json.loads(line) for line in data.splitlines()]


def answers(path: Path) -> dict[str, list[str]]:
    """Texts by custom id; an id that is answered twice fails the test."""
    found = {}
    for record in read(path):
        if record["error"] is None and record["response"]["status_code"] == 200:
            assert record["custom_id"] not in found
            choices = record["response"]["body"]["choices"]
            found[record["custom_id"]] = [c["text"] if "text" in c else c["message"]["content"] for c in choices]
    return found


def errors(path: Path) -> dict[int, dict]:
    """Errors by line number, wherever in the record they stand."""
    found = [
        record["error"] or record["response"]["body"]["error"]
        for record in read(path)
        if record["error"] or record["response"]["status_code"] != 200
    ]
    return {error["line"]: error for error in found}


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "in.jsonl", tmp_path / "out.jsonl"


def run(paths: tuple[Path, Path], llm: FakeLLM | None = None, **options: object) -> BatchSummary:
    return BatchRunner(*paths, **options).run(llm or FakeLLM())


def test_every_request_gets_its_own_answer(paths):
    hello = {"role": "user", "content": "Grüße"}
    write(paths[0], completion("a", "Once"), chat("b", hello), completion("c", [72, 105], n=2))
    summary = run(paths)
    assert answers(paths[1]) == {
        "a": [expected_answer("Once")],
        "b": [expected_answer(chat_prompt([hello]))],
        "c": [expected_answer("Hi", 0), expected_answer("Hi", 1)],
    }
    assert (summary.total, summary.completed, summary.failed, summary.skipped) == (3, 3, 0, 0)
    assert summary.completion_tokens == sum(len(text) for texts in answers(paths[1]).values() for text in texts)
    assert summary.prompt_tokens == 4 + len(chat_prompt([hello])) + 2
    assert summary.tokens_saved == 3


def test_records_have_openais_shape(paths):
    write(paths[0], completion("a"), completion("b", top_p=2), b"{")
    run(paths)
    by_id = {record["custom_id"]: record for record in read(paths[1])}
    for record in by_id.values():
        assert record.keys() == {"id", "custom_id", "response", "error"}
        assert record["id"].startswith("batch_req_")
    assert by_id["a"]["response"].keys() == {"status_code", "request_id", "body"}
    assert by_id["a"]["response"]["body"]["model"] == "fake"
    refused = by_id["b"]
    assert (refused["error"], refused["response"]["status_code"]) == (None, 400)
    assert refused["response"]["body"]["error"]["param"] == "top_p"
    assert by_id[None]["response"] is None


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (b'{"custom_id": "a", ', "invalid_json", None),
        (b'{"custom_id": "a", "body": NaN}', "invalid_json", None),
        (b"[" * 100_000, "invalid_json", None),
        (b'{"custom_id": "\xff"}', "invalid_utf8", None),
        (b'"text"', "invalid_line", None),
        ({"method": "POST"}, "missing_custom_id", "custom_id"),
        (completion("a") | {"custom_id": 5}, "invalid_custom_id", "custom_id"),
        (completion("a") | {"method": "GET"}, "invalid_method", "method"),
        (completion("a") | {"url": "/v1/images/generations"}, "invalid_url", "url"),
        (completion("a") | {"url": ["/v1/completions"]}, "invalid_url", "url"),
        (completion("a") | {"body": "x"}, "invalid_body", "body"),
        (completion("a") | {"extra": 1}, "unknown_field", "extra"),
        (completion("first"), "duplicate_custom_id", "custom_id"),
        (completion("a", suffix="x"), "invalid_value", "suffix"),
        (completion("a", stream=True), "invalid_value", "stream"),
        (completion("a", temperature=-1), "invalid_value", "temperature"),
        (completion("a", ""), "invalid_prompt", "prompt"),
        (completion("a", "FAIL"), "invalid_prompt", None),
        (completion("a", "x" * CONTEXT), "context_length_exceeded", "prompt"),
        (chat("a"), "invalid_value", "messages"),
        (chat("a", {"role": "user", "content": "x" * CONTEXT}), "context_length_exceeded", "messages"),
        (chat("a", {"role": "assistant", "content": "x"}), "invalid_prompt", "messages"),
    ],
)
def test_a_bad_line_gets_an_error_and_the_others_an_answer(paths, line, code, param):
    write(paths[0], completion("first"), b"   ", line, completion("last"))
    summary = run(paths)
    assert answers(paths[1]).keys() == {"first", "last"}
    assert (summary.total, summary.completed, summary.failed) == (3, 2, 1)
    [(number, error)] = errors(paths[1]).items()
    assert (number, error["code"], error["param"]) == (3, code, param)
    assert error["message"]
    assert summary.first_failures == [f"line 3: {error['message']}"]


def test_an_overlong_line_is_never_held_in_memory(paths, monkeypatch):
    monkeypatch.setattr(input_file, "MAX_LINE_BYTES", 200)
    write(paths[0], completion("a"), completion("long", "x" * 1000), completion("b"))
    run(paths)
    assert answers(paths[1]).keys() == {"a", "b"}
    assert errors(paths[1])[2]["code"] == "line_too_long"


def test_a_model_without_chat_template_fails_chat_lines_only(paths):
    write(paths[0], chat("a", {"role": "user", "content": "x"}), completion("b"))
    run(paths, FakeLLM("base"))
    assert answers(paths[1]).keys() == {"b"}
    assert "no chat template" in errors(paths[1])[1]["message"]


def test_byte_order_mark_windows_line_ends_and_a_missing_last_newline_are_read(paths):
    lines = [json.dumps(completion(custom_id)).encode() for custom_id in "ab"]
    paths[0].write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    assert run(paths).completed == 2


def test_any_custom_id_comes_back_as_it_was(paths):
    custom_ids = ['"quoted"\n', "ü", "\ud800", " "]
    write(paths[0], *(completion(custom_id) for custom_id in custom_ids))
    run(paths)
    assert sorted(answers(paths[1])) == sorted(custom_ids)
    assert run(paths, resume=True).skipped == 4


def test_several_prompts_in_a_body_make_one_answer_in_their_order(paths):
    prompts = ["a", "bb", "ccc"]
    write(paths[0], completion("many", prompts, n=2))
    run(paths, max_in_flight=2)
    assert answers(paths[1])["many"] == [expected_answer(prompt, i) for prompt in prompts for i in (0, 1)]


@pytest.mark.parametrize("bad", ["FAIL", "x" * CONTEXT])
def test_one_bad_prompt_of_several_fails_its_body_once(paths, bad):
    write(paths[0], completion("many", ["a", "b", bad, "c", bad, *"defghi"]), completion("other"))
    llm = FakeLLM()
    summary = run(paths, llm, max_in_flight=5)
    assert len(read(paths[1])) == 2
    assert answers(paths[1]).keys() == {"other"}
    assert (summary.completed, summary.failed) == (1, 1)
    assert not llm.engine.has_unfinished_requests()


def test_few_prompts_are_in_the_engine_however_long_the_file_is(paths):
    write(paths[0], *(completion(str(i)) for i in range(50)), completion("many", list("abcdefghijkl")))
    llm = FakeLLM()
    run(paths, llm, max_in_flight=4)
    assert llm.engine.peak == 4
    assert len(answers(paths[1])) == 51


def test_default_max_tokens_is_for_bodies_without_a_limit(paths):
    write(paths[0], completion("own", max_tokens=3), completion("default", max_tokens=None))
    run(paths, default_max_tokens=5)
    assert {custom_id: len(texts[0]) for custom_id, texts in answers(paths[1]).items()} == {"own": 3, "default": 5}


def test_an_empty_file_has_an_empty_answer(paths):
    paths[0].write_bytes(b"\n\n")
    assert run(paths).total == 0
    assert read(paths[1]) == []


def test_progress_ends_complete(paths):
    seen = []
    write(paths[0], *(completion(str(i)) for i in range(5)))
    run(paths, progress=lambda summary: seen.append((summary.done, summary.total)))
    assert seen == sorted(seen)
    assert seen[-1] == (5, 5)


# --- files -----------------------------------------------------------------------------------------------------------


def test_paths_that_cannot_work_are_refused_before_a_model_is_needed(paths, tmp_path):
    source, output = paths
    with pytest.raises(ConfigurationError, match=r"cannot read .*in\.jsonl"):
        BatchRunner(source, output)
    write(source, completion("a"))
    (tmp_path / "link.jsonl").symlink_to(source)
    for same in (source, tmp_path / "link.jsonl"):
        with pytest.raises(ConfigurationError, match="both input and output"):
            BatchRunner(source, same, overwrite=True)
    with pytest.raises(ConfigurationError, match="does not exist"):
        BatchRunner(source, tmp_path / "nowhere" / "out.jsonl")
    with pytest.raises(ConfigurationError, match="is a directory"):
        BatchRunner(source, tmp_path)
    with pytest.raises(ConfigurationError, match="not a regular file"):
        BatchRunner(tmp_path, output)
    with pytest.raises(ConfigurationError, match="one of them"):
        BatchRunner(source, output, resume=True, overwrite=True)
    output.write_text("precious")
    with pytest.raises(ConfigurationError, match=r"--resume .* --overwrite"):
        BatchRunner(source, output)
    assert output.read_text() == "precious"


def test_overwrite_starts_again(paths):
    write(paths[0], completion("a"))
    paths[1].write_text("something else")
    run(paths, overwrite=True)
    assert answers(paths[1]).keys() == {"a"}


def test_resume_answers_what_is_missing_and_tries_failures_again(paths):
    write(paths[0], completion("a"), completion("b", "x" * CONTEXT), b"{", completion("d"))
    run(paths)
    write(paths[0], completion("a"), completion("b", "short now"), b"{", completion("d"), completion("e"))
    llm = FakeLLM()
    summary = run(paths, llm, resume=True)
    assert sorted(llm.engine.prompts) == ["Once", "short now"]
    assert answers(paths[1]).keys() == {"a", "b", "d", "e"}
    assert list(errors(paths[1])) == [3]
    assert len(read(paths[1])) == 5
    assert (summary.completed, summary.failed, summary.skipped) == (2, 1, 2)


def test_resume_without_an_output_just_starts(paths):
    write(paths[0], completion("a"))
    assert run(paths, resume=True).completed == 1


def test_a_run_torn_at_any_byte_is_completed_by_resume(paths):
    write(paths[0], completion("a"), completion("b", "é"), completion("c", best_of=1))
    run(paths)
    whole, expected = paths[1].read_bytes(), answers(paths[1])
    for length in range(0, len(whole), 7):
        paths[1].write_bytes(whole[:length])
        run(paths, resume=True)
        assert answers(paths[1]) == expected
        assert len(read(paths[1])) == 3
    assert sorted(path.name for path in paths[1].parent.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("content", ["my notes\n", "my notes", '{"a": 1}\n', '{"id": "batch_req_1", "cust\n'])
def test_resume_leaves_a_file_alone_that_is_no_batch_output(paths, content):
    write(paths[0], completion("a"))
    paths[1].write_text(content)
    with pytest.raises(ConfigurationError, match="line 1, is no line of a batch output"):
        run(paths, resume=True)
    assert paths[1].read_text() == content


def test_a_full_disk_leaves_complete_lines(paths, monkeypatch):
    write(paths[0], *(completion(str(i), "x" * (i + 1)) for i in range(4)))
    real_write, calls = os.write, []

    def filling(handle: int, data: bytes) -> int:
        calls.append(data)
        if len(calls) < 3:
            return real_write(handle, data)
        if len(calls) == 3:
            return real_write(handle, data[:20])  # the disk takes a part ...
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", filling)
    llm = FakeLLM()
    with pytest.raises(GossamerError, match=r"No space left on device.*--resume"):
        run(paths, llm)
    monkeypatch.undo()
    assert len(answers(paths[1])) == 2
    assert not llm.engine.has_unfinished_requests()
    assert run(paths, resume=True).skipped == 2


# --- interruptions ---------------------------------------------------------------------------------------------------


def test_ctrl_c_keeps_the_answers_and_empties_the_engine(paths):
    write(paths[0], completion("short", max_tokens=1), completion("long"))
    llm = FakeLLM()
    steps = 0
    real_step = llm.engine.step

    def interrupted_step():
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        return real_step()

    llm.engine.step = interrupted_step
    runner = BatchRunner(*paths)
    with pytest.raises(KeyboardInterrupt):
        runner.run(llm)
    assert answers(paths[1]).keys() == {"short"}
    assert runner.summary.completed == 1
    assert len(llm.engine.aborted) == 1


def start_command(paths: tuple[Path, Path], *options: str, delay: float) -> Program:
    """`gossamer batch` with the fake engine, in a process of its own."""
    environment = os.environ | {"FAKE_LLM_DELAY": str(delay)}
    command = ["batch", "fake", paths[0], "-o", paths[1], "--json", *options]
    return Program(BATCH_COMMAND, *command, environment=environment)


def wait_for_lines(process: Program, path: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def many(paths) -> dict[str, list[str]]:
    """A batch whose answers finish one by one; returns the complete answers."""
    write(paths[0], *(completion(str(i), f"prompt {i}", max_tokens=1 + i % 30) for i in range(120)), b"{")
    return {str(i): [expected_answer(f"prompt {i}")[: 1 + i % 30]] for i in range(120)}


def test_a_killed_run_is_completed_by_resume(paths, many):
    with start_command(paths, "--max-num-seqs", "4", delay=0.02) as process:
        wait_for_lines(process, paths[1], 20)
        process.kill()
    assert 20 <= len(paths[1].read_bytes().splitlines()) < 120
    with start_command(paths, "--resume", delay=0) as process:
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 1, stderr  # the line that is not JSON fails again
    assert answers(paths[1]) == many
    assert list(errors(paths[1])) == [121]
    summary = json.loads(stdout)
    assert summary["skipped"] >= 19
    assert summary["completed"] + summary["skipped"] == 120


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_stops_the_command_cleanly_and_resume_completes_it(paths, many):
    with start_command(paths, "--max-num-seqs", "4", delay=0.02) as process:
        wait_for_lines(process, paths[1], 10)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    kept = answers(paths[1])
    assert json.loads(stdout)["interrupted"]
    assert json.loads(stdout)["completed"] == len(kept)
    with start_command(paths, "--resume", delay=0) as process:
        process.communicate(timeout=60)
    assert answers(paths[1]) == many
