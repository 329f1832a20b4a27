"""A batch and a chat with a real model: the same answers however they are shared, batched or interrupted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gossamer import LLM, SamplingParams
from gossamer.batch import BatchRunner, BatchSummary
from gossamer.cli.app import app
from gossamer.cli.conversation import Conversation

SYSTEM = "You are a patient librarian. You answer in one short sentence, name no sources and never ask back."
QUESTIONS = ["What is a comma?", "What is a book?", "Who reads?", "What is a library?"]


@pytest.fixture(scope="module")
def load(smollm2_path: Path) -> Callable[..., LLM]:
    return lambda **options: LLM(str(smollm2_path), dtype="float32", memory="512MB", **options)


@pytest.fixture(scope="module")
def llm(load: Callable[..., LLM]) -> Iterator[LLM]:
    """One for all that ask for nothing else; what it has cached changes no answer."""
    with load() as llm:
        yield llm


def chat(custom_id: str, question: str, **fields: object) -> dict:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": question}]
    body = {"messages": messages, "max_tokens": 12, "temperature": 0} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def completion(custom_id: str, prompt: object, **fields: object) -> dict:
    body = {"prompt": prompt, "max_tokens": 6, "temperature": 0} | fields
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": body}


def answer(llm: LLM, directory: Path, *lines: dict) -> tuple[dict[str, dict], BatchSummary]:
    """Response bodies by custom id."""
    source, output = directory / "in.jsonl", directory / "out.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    summary = BatchRunner(source, output, overwrite=True).run(llm)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    return {record["custom_id"]: record["response"]["body"] for record in records}, summary


def contents(bodies: dict[str, dict]) -> dict[str, list[str]]:
    return {
        custom_id: [choice["message"]["content"] for choice in body["choices"]] for custom_id, body in bodies.items()
    }


def test_sharing_changes_what_is_computed_and_not_what_is_answered(load, tmp_path):
    lines = [chat(question, question) for question in QUESTIONS]
    found = {}
    for sharing in ("attention", "storage", "off"):
        with load(sharing=sharing) as llm:
            bodies, summary = answer(llm, tmp_path, *lines)
        found[sharing] = contents(bodies)
        assert (summary.completed, summary.failed) == (len(QUESTIONS), 0)
        assert (summary.tokens_saved > 0) == (sharing != "off")
        assert summary.prompt_tokens == sum(body["usage"]["prompt_tokens"] for body in bodies.values())
    assert found["attention"] == found["storage"] == found["off"]
    assert all(texts[0] for texts in found["off"].values())


def test_a_resumed_batch_equals_an_uninterrupted_one(load, llm, tmp_path):
    whole, _ = answer(llm, tmp_path, *(chat(question, question) for question in QUESTIONS))
    output = tmp_path / "out.jsonl"
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(lines[0] + lines[1][:-30])
    with load() as another:
        summary = BatchRunner(tmp_path / "in.jsonl", output, resume=True).run(another)
    assert (summary.skipped, summary.completed) == (1, len(QUESTIONS) - 1)
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert contents({r["custom_id"]: r["response"]["body"] for r in records}) == contents(whole)


def test_a_bad_request_among_good_ones_is_refused_alone(load, tmp_path):
    with load(max_model_len=256) as llm:
        bodies, summary = answer(
            llm,
            tmp_path,
            chat("good", QUESTIONS[0]),
            completion("long", "word " * 300),
            completion("empty", ""),
            completion("vocabulary", [10**9]),
            completion("range", "x", top_p=0),
        )
        assert not llm.engine.has_unfinished_requests()
    assert (summary.completed, summary.failed) == (1, 4)
    assert bodies["long"]["error"]["code"] == "context_length_exceeded"
    assert bodies["empty"]["error"]["code"] == bodies["vocabulary"]["error"]["code"] == "invalid_prompt"
    assert bodies["range"]["error"]["param"] == "top_p"


def test_a_body_answers_like_the_python_api(llm, tmp_path):
    bodies, _ = answer(llm, tmp_path, completion("a", ["The sun is", "A comma separates"], n=2))
    outputs = llm.generate(["The sun is", "A comma separates"], SamplingParams(n=2, max_tokens=6, temperature=0))
    texts = [choice["text"] for choice in bodies["a"]["choices"]]
    assert texts == [completion.text for output in outputs for completion in output.outputs]
    assert bodies["a"]["usage"]["prompt_tokens"] == sum(len(output.prompt_token_ids) for output in outputs)


def test_logprobs_of_an_echoed_prompt_cover_the_whole_text(llm, tmp_path):
    line = completion("a", "The sun is", echo=True, logprobs=2, max_tokens=3)
    bodies, _ = answer(llm, tmp_path, line, chat("b", QUESTIONS[0], logprobs=True, top_logprobs=3))
    choice = bodies["a"]["choices"][0]
    logprobs = choice["logprobs"]
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"][0] is None
    assert all(value <= 0 for value in logprobs["token_logprobs"][1:])
    # Greedy: the chosen token is the most probable one.
    for entry in bodies["b"]["choices"][0]["logprobs"]["content"]:
        assert len(entry["top_logprobs"]) == 3
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]


def test_the_command_prints_a_summary(smollm2_path, tmp_path):
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(chat(question, question)) + "\n" for question in QUESTIONS))
    result = CliRunner().invoke(app, ["batch", str(smollm2_path), str(source), "-o", str(tmp_path / "o"), "--json"])
    assert result.exit_code == 0, result.stderr
    summary = json.loads(result.stdout)
    assert summary["completed"] == len(QUESTIONS)
    assert summary["tokens_saved"] > 0


def test_a_conversation_streams_the_text_it_remembers(load):
    with load(max_model_len=128) as llm:
        conversation = Conversation(llm, SamplingParams(temperature=0, max_tokens=24), SYSTEM)
        dropped = []
        for question in QUESTIONS:
            pieces = list(conversation.answer(question, lambda turn, error: dropped.append(turn)))
            assert "".join(pieces) == conversation.turns[-1].assistant
        stopped = conversation.answer("Tell me more.", lambda turn, error: dropped.append(turn))
        next(stopped)
        stopped.close()
        assert not llm.engine.has_unfinished_requests()
    assert dropped
    assert dropped[0].user == QUESTIONS[0]
