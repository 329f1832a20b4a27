"""What a line or the machine does to a batch: errors of a line stay with it; what was finished is there afterwards."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_llm import FakeLLM
from forked import run_program
from gossamer.batch import BatchRunner, input_file, runner
from gossamer.batch.output_file import OutputFile, cut_torn_line
from gossamer.errors import ConfigurationError, OutputError
from gossamer.protocol.errors import MAX_MESSAGE
from test_batch import BATCH_COMMAND, answers, chat, completion, errors, paths, read, run, write

__all__ = ["paths"]  # a fixture

DIGITS = b"1" * 5000
RESTRICTED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
"""


def with_number(line: dict, number: bytes) -> bytes:
    """The line with this number in place of 424242."""
    return json.dumps(line).encode().replace(b"424242", number)


ODD_LINES: dict[str, bytes | dict] = {
    "a number of 5,000 digits": with_number(completion("odd", seed=424242), DIGITS),
    "a key of 5,000 digits": completion("odd", logit_bias={DIGITS.decode(): 1}),
    "a token id beyond any machine": with_number(completion("odd", [424242]), DIGITS[:4000]),
    "a number beyond floats": with_number(completion("odd", temperature=424242), DIGITS[:4000]),
    "more completions than anybody has memory for": with_number(completion("odd", n=424242), DIGITS[:4000]),
    "digits of another script": completion("odd", logit_bias={"²": 1}),
    "a url of many brackets": with_number(completion("odd") | {"url": 424242}, b"[" * 900 + b"]" * 900),
    "a schema of many braces": with_number(
        completion("odd", structured_outputs={"json": {"a": 424242}, "regex": "a"}), b'{"a":' * 400 + b"1" + b"}" * 400
    ),
    "a name of a megabyte": completion("odd", **{"x" * 1_000_000: 1}),
    "a method of a megabyte": completion("odd") | {"method": "\u0001" * 1_000_000},
    "half a pair as a name": completion("odd", **{"\ud800": 1}),
    "a message that is a list": chat("odd", {"role": "user", "content": [[]]}),
}


@pytest.mark.parametrize("line", ODD_LINES.values(), ids=ODD_LINES)
def test_an_odd_line_is_one_error_line_of_bounded_length(paths: tuple[Path, Path], line: Any) -> None:
    write(paths[0], completion("first"), line, completion("last"))
    summary = run(paths)
    assert answers(paths[1]).keys() == {"first", "last"}
    assert list(errors(paths[1])) == [2]
    assert (summary.completed, summary.failed) == (2, 1)
    [long] = [raw for raw in paths[1].read_bytes().splitlines() if b'"line": 2' in raw]
    assert len(long) <= 2 * 6 * MAX_MESSAGE + 500  # a message and a name, each character escaped
    assert len(summary.first_failures[0]) <= MAX_MESSAGE + 20


@pytest.mark.parametrize(
    "error", [ZeroDivisionError("odd"), RecursionError(), MemoryError(), OSError(5, "odd")], ids=repr
)
@pytest.mark.parametrize("where", ["parse", "body", "template", "add_request", "answer", "json"])
def test_whatever_a_line_raises_stays_with_the_line(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, where: str, error: Exception
) -> None:
    llm = FakeLLM()

    def raising(function: Callable[..., Any], odd: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if odd(*arguments, **options):
                raise error
            return function(*arguments, **options)

        return call

    places: dict[str, tuple[Any, str, Callable[..., bool]]] = {
        "parse": (input_file, "_request", lambda fields: fields["custom_id"] == "odd"),
        "body": (runner, "read_body", lambda line: line.custom_id == "odd"),
        "template": (llm, "apply_chat_template", lambda messages, **options: messages[0]["content"] == "odd"),
        "add_request": (llm.engine, "add_request", lambda request_id, prompt, params: "line-2-" in request_id),
        "answer": (runner, "decode", lambda tokenizer, ids, **_: "odd" in "".join(map(chr, ids))),
        "json": (runner, "answer_record", lambda line, answer: line.custom_id == "odd"),
    }
    monkeypatch.setattr(
        place := places[where][0], places[where][1], raising(getattr(place, places[where][1]), places[where][2])
    )
    lines = [chat(name, {"role": "user", "content": name}) for name in ("first", "odd", "last")]
    if where == "answer":  # the text of a prompt of ids is needed for the answer only
        lines = [completion(name, list(map(ord, name)), echo=True) for name in ("first", "odd", "last")]
    write(paths[0], *lines)
    summary = run(paths, llm)
    assert answers(paths[1]).keys() == {"first", "last"}
    assert list(errors(paths[1])) == [2]
    assert (summary.completed, summary.failed) == (2, 1)
    assert not llm.engine.has_unfinished_requests()


def test_an_answer_that_json_cannot_hold_is_an_error(paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    record = runner.answer_record
    nan = float("nan")
    monkeypatch.setattr(
        runner, "answer_record", lambda line, body: record(line, body | ({"x": nan} if line.custom_id == "b" else {}))
    )
    write(paths[0], *map(completion, "abc"))
    run(paths)
    assert answers(paths[1]).keys() == {"a", "c"} and list(errors(paths[1])) == [2]


def test_a_step_that_raises_costs_the_lines_to_blame(paths: tuple[Path, Path]) -> None:
    llm = FakeLLM()
    step = llm.engine.step

    def failing() -> Any:
        if any("poison" in "".join(map(chr, each.output.prompt_token_ids)) for each in llm.engine._requests.values()):
            raise ZeroDivisionError("a bad day")
        return step()

    llm.engine.step = failing  # type: ignore[method-assign]  # as an engine would
    write(paths[0], completion("a"), completion("b", "poison"), completion("c", ["x", "y"]))
    summary = run(paths, llm)
    assert answers(paths[1]).keys() == {"a", "c"}
    assert "a bad day" in errors(paths[1])[2]["message"]
    assert [each["response"]["status_code"] for each in read(paths[1]) if each["custom_id"] == "b"] == [500]
    assert (summary.completed, summary.failed) == (2, 1)


# --- two processes ----------------------------------------------------------------------------------------------------


def test_an_output_has_one_writer(paths: tuple[Path, Path]) -> None:
    write(paths[0], *(completion(str(i)) for i in range(4)))
    run(paths)
    content = paths[1].read_bytes()
    with OutputFile(paths[1], resume=True):
        for options in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(ConfigurationError, match="being written by another process"):
                BatchRunner(*paths, **options)
    assert paths[1].read_bytes() == content
    assert run(paths, resume=True).skipped == 4


def test_the_writer_stays_the_only_one_when_it_rewrites_the_file(paths: tuple[Path, Path]) -> None:
    write(paths[0], completion("a", "FAIL"), completion("b"))
    run(paths)
    with OutputFile(paths[1], resume=True) as output, pytest.raises(ConfigurationError, match="another process"):
        assert output.answered == {"b"}
        OutputFile(paths[1], resume=True)
    assert len(read(paths[1])) == 1


def test_an_output_that_appears_meanwhile_is_left_alone(paths: tuple[Path, Path]) -> None:
    write(paths[0], completion("a"))
    batch = BatchRunner(*paths)
    paths[1].write_text("mine")
    with pytest.raises(OutputError, match="exists"):
        batch.run(FakeLLM())
    assert paths[1].read_text() == "mine"


# --- full disks -------------------------------------------------------------------------------------------------------


def test_resuming_on_a_disk_that_is_still_full_loses_nothing(
    paths: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(paths[0], completion("a", "FAIL"), completion("b"), completion("c"))
    run(paths)
    content = paths[1].read_bytes()

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        run(paths, resume=True)
    assert paths[1].read_bytes() == content
    assert sorted(each.name for each in paths[1].parent.iterdir()) == ["in.jsonl", "out.jsonl"]
    # Nothing has to be copied where only the end is torn or failed.
    order = sorted(content.splitlines(keepends=True), key=lambda line: b'"custom_id": "a"' in line)
    paths[1].write_bytes(b"".join(order)[:-7])
    assert run(paths, resume=True).skipped == 2
    assert answers(paths[1]).keys() == {"b", "c"}


def test_a_crash_while_failed_lines_are_dropped_leaves_no_draft(paths: tuple[Path, Path]) -> None:
    write(paths[0], completion("a", "FAIL"), completion("b"))
    run(paths)
    draft = paths[1].with_name(".out.jsonl.resumed")
    draft.write_text("half a copy")
    run(paths, resume=True)
    assert not draft.exists() and answers(paths[1]).keys() == {"b"}


@pytest.mark.parametrize("limit", [300, 700, 1500, 4000])
def test_the_command_on_a_full_disk(paths: tuple[Path, Path], limit: int) -> None:
    """A file that may not grow any more stands for a disk that takes no more; the error is another one."""
    write(paths[0], *(completion(str(i)) for i in range(20)))
    restricted = RESTRICTED.format(limit=limit) + BATCH_COMMAND
    done = run_program(restricted, "batch", "fake", paths[0], "-o", paths[1])
    assert done.returncode == 2 and "File too large" in done.stderr and "--resume" in done.stderr
    assert "Traceback" not in done.stderr
    kept = read(paths[1])
    assert len(kept) < 20 and paths[1].stat().st_size <= limit
    assert run(paths, resume=True).skipped == len(kept)
    assert {each["id"] for each in read(paths[1])} >= {each["id"] for each in kept}


def test_a_torn_line_is_cut_and_the_others_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    for content, count in ((b"", 0), (b"a\n", 1), (b"a\nb", 1), (b"ab", 0), (b"a\n\nb\n", 3)):
        path.write_bytes(content)
        assert cut_torn_line(path) == count
        assert path.read_bytes() == content[: content.rfind(b"\n") + 1]
