"""Adapters at the ends: over HTTP by the name of the model, in batch files, in the terminal, in Python."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from typer.testing import CliRunner

from architectures import reference as answers_of
from gossamer import LLM, SamplingParams
from gossamer.batch import BatchRunner
from gossamer.cli.app import app
from gossamer.cli.chat import _run_command
from gossamer.cli.conversation import Conversation
from gossamer.cli.engine_options import adapters_of
from gossamer.errors import ConfigurationError, InvalidPromptError
from lora_adapters import change_config, merged, write_adapter
from running_server import MODEL, Running, make_chat_llm, running

if TYPE_CHECKING:
    import openai

PROMPT = "Between the house and the river"
NAMES = (None, "rhyme", "terse")
GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def adapters(reference: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("adapters")
    rhyme = write_adapter(root / "rhyme", reference, seed=1)
    return {
        "rhyme": change_config(rhyme, base_model_name_or_path="org/base"),
        "terse": write_adapter(root / "terse", reference, ("q_proj", "up_proj"), rank=2, seed=2),
    }


@pytest.fixture(scope="module")
def expected(reference: Any, adapters: dict[str, Path], llm: LLM) -> dict[str | None, list[int]]:
    """What follows the prompt with each adapter, of merged models."""
    ids = llm.tokenizer(PROMPT)["input_ids"]
    models = {name: reference if name is None else merged(reference, adapters[name]) for name in NAMES}
    tokens = {name: answers_of(model)(ids, 6) for name, model in models.items()}
    assert len({tuple(each) for each in tokens.values()}) == 3
    return tokens


@pytest.fixture(scope="module")
def adapted(tiny: Path, adapters: dict[str, Path]) -> LLM:
    return make_chat_llm(tiny, lora=adapters)


@pytest.fixture(scope="module")
def server(tiny: Path, adapters: dict[str, Path]) -> Iterator[Running]:
    with running(lambda: make_chat_llm(tiny, lora=adapters)) as server:
        yield server


def body(name: str | None, **fields: Any) -> dict[str, Any]:
    asked = {"prompt": PROMPT, "max_tokens": 6, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return asked | ({} if name is None else {"model": name}) | fields


def test_python_takes_an_adapter_for_all_prompts_or_for_one(
    adapted: LLM, expected: dict[str | None, list[int]]
) -> None:
    assert adapted.adapters == {"rhyme": "org/base", "terse": None}
    for name in NAMES:
        (output,) = adapted.generate(PROMPT, GREEDY, adapter=name)
        assert output.outputs[0].token_ids == expected[name] and output.adapter == name
        *_, last = adapted.stream(PROMPT, GREEDY, adapter=name)
        assert last.outputs[0].token_ids == expected[name]
    mixed = adapted.generate([{"prompt": PROMPT, "adapter": name} for name in NAMES], GREEDY, adapter="terse")
    assert [output.outputs[0].token_ids for output in mixed] == [expected[name] for name in NAMES]
    messages = [{"role": "user", "content": "Hello"}]
    chats = [adapted.chat(messages, GREEDY, adapter=name)[0].outputs[0].token_ids for name in NAMES]
    assert len({tuple(each) for each in chats}) == 3
    scores = [adapted.score(PROMPT, adapter=name)[0].token_logprobs for name in NAMES]
    assert scores[0] != scores[1] != scores[2]
    with pytest.raises(InvalidPromptError, match="there is no adapter 'prose'"):
        adapted.generate(PROMPT, GREEDY, adapter="prose")


def test_the_models_name_chooses_the_adapter(server: Running, expected: dict[str | None, list[int]]) -> None:
    for name in (*NAMES, MODEL):
        status, answer = server.call("/v1/completions", body(name))
        assert status == 200 and answer["model"] == (name or MODEL)
        assert answer["choices"][0]["token_ids"] == expected[None if name == MODEL else name]
        events = server.events("/v1/completions", body(name))
        streamed = [token for event in events for choice in event["choices"] for token in choice["token_ids"]]
        assert streamed == answer["choices"][0]["token_ids"]
        assert {event["model"] for event in events} == {name or MODEL}
    status, refused = server.call("/v1/completions", body("prose"))
    assert status == 404 and "tiny, rhyme, terse" in refused["error"]["message"]


def test_clients_find_adapters_and_their_parent(client: openai.OpenAI) -> None:
    found = {model.id: model.model_dump().get("parent") for model in client.models.list()}
    assert found == {MODEL: None, "rhyme": MODEL, "terse": MODEL}
    assert client.models.retrieve("rhyme").model_dump()["parent"] == MODEL
    answer = client.chat.completions.create(
        model="rhyme", messages=[{"role": "user", "content": "Hello"}], max_tokens=3, temperature=0
    )
    assert answer.model == "rhyme"


def test_a_pin_is_of_an_adapter_and_metrics_tell_them_apart(server: Running) -> None:
    prompt = "a prefix that is pinned for one adapter only. " * 2
    status, prefix = server.call("/v1/prefixes", {"prompt": prompt, "model": "rhyme"})
    assert status == 200

    def cached(name: str | None) -> int:
        answer = server.call("/v1/completions", body(name, prompt=prompt + "!", max_tokens=1))[1]
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert cached("rhyme") == prefix["tokens"] and cached("terse") == 0 and cached(None) == 0
    assert server.call("/v1/prefixes", {"prompt": prompt, "model": "terse"})[1]["id"] != prefix["id"]
    assert server.call("/v1/prefixes", {"prompt": prompt, "model": "prose"})[0] == 404
    text = server.raw("/metrics")[1].decode()
    assert 'gossamer:request_success_total{finished_reason="length",model_name="rhyme"}' in text


def test_a_server_refuses_an_adapter_of_its_own_name(tiny: Path, adapters: dict[str, Path]) -> None:
    with (
        pytest.raises(AssertionError, match="could not start"),
        running(lambda: make_chat_llm(tiny, lora={MODEL: adapters["terse"]})),
    ):
        pass


def test_lines_of_a_batch_choose_adapters(adapted: LLM, expected: dict[str | None, list[int]], tmp_path: Path) -> None:
    names = ["gpt-of-somebody", "rhyme", "terse", "rhyme"]
    lines = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body(name)}
        for i, name in enumerate(names)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    BatchRunner(tmp_path / "in.jsonl", tmp_path / "out.jsonl").run(adapted)
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    answers = {int(record["custom_id"]): record["response"]["body"] for record in records}
    for i, name in enumerate(names):
        adapter = name if name in expected else None
        assert answers[i]["choices"][0]["token_ids"] == expected[adapter]
        assert answers[i]["model"] == (adapter or adapted.model_name)


def test_a_conversation_changes_its_adapter(adapted: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(adapted, GREEDY)

    def answer() -> str:
        conversation.turns.clear()
        return "".join(conversation.answer("Hello", lambda turn, error: None))

    own = answer()
    _run_command("/adapter rhyme", adapted, conversation)
    assert answer() != own
    _run_command("/adapter prose", adapted, conversation)
    assert conversation.adapter == "rhyme"
    _run_command("/adapter", adapted, conversation)
    assert answer() == own
    assert "There is no adapter prose; there is rhyme, terse." in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        (["rhyme"], "--lora takes NAME=DIR"),
        (["rhyme="], "--lora takes NAME=DIR"),
        (["a=x", "a=y"], "has the name 'a' twice: x and y"),
        (["model=x"], "has the model's own name"),
        (["=x"], "printable characters"),
    ],
)
def test_what_lora_takes(lora: list[str], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        adapters_of(lora, "model")


def test_commands_refuse_adapters_before_they_load(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("")
    for command in (
        ["serve", "model", "--served-model-name", "name", "--lora", "name=x"],
        ["batch", "model", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--lora", "model=x"],
        ["chat", "model", "--lora", "model=x"],
    ):
        result = CliRunner().invoke(app, command)
        assert result.exit_code and isinstance(result.exception, ConfigurationError)
        assert "has the model's own name" in str(result.exception)


def test_adapters_are_of_a_server_of_one_model() -> None:
    result = CliRunner().invoke(app, ["serve", "a", "b", "--lora", "name=x"])
    assert isinstance(result.exception, ConfigurationError) and "--lora" in str(result.exception)


def test_a_command_answers_with_adapters(tiny: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text(json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body("terse")}))
    command = ["batch", str(tiny), str(source), "-o", str(output), "--lora", f"terse={adapters['terse']}"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert json.loads(output.read_text())["response"]["body"]["model"] == "terse"
