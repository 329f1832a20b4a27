"""How a server is told to write conversations and to draw answers; and answers without tokens, echoes, fingerprints."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gossamer import LLM, SamplingParams
from gossamer.errors import CheckpointError, ConfigurationError
from running_server import TEMPLATE, Running, make_chat_llm, running

LOUD = "{% for message in messages %}{{ (message.content | upper) if loud else message.content }}!{% endfor %}"
ASK: list[Any] = [{"role": "user", "content": "a"}]


def text_of(llm: LLM, **variables: Any) -> str:
    return str(llm.tokenizer.decode(llm.apply_chat_template(ASK, template_kwargs=variables)))


def test_another_template_and_its_variables(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "loud.jinja"
    file.write_text(LOUD)
    for given in (str(file), LOUD):
        llm = LLM(tiny, chat_template=given, default_chat_template_kwargs='{"loud": true}')
        assert (text_of(llm), text_of(llm, loud=False)) == ("A!", "a!")
    assert text_of(LLM(tiny, chat_template=LOUD, default_chat_template_kwargs={"loud": False})) == "a!"


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"chat_template": "/nowhere.jinja"}, "cannot read the chat template /nowhere.jinja"),
        ({"chat_template": "{% for %}"}, "the chat template is none: line 1"),
        ({"generation_config": "/nowhere"}, "/nowhere has none"),
    ],
)
def test_what_is_none_is_refused_at_the_start(tiny: Path, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        LLM(tiny, **options)


def test_variables_that_decide_how_a_template_is_run_are_refused(tiny: Path) -> None:
    llm = LLM(tiny, chat_template=LOUD, default_chat_template_kwargs={"tokenize": False})
    with pytest.raises(ConfigurationError, match="tokenize is no variable"):
        text_of(llm)


def test_sampling_is_as_the_model_says_or_another_file_or_nobody(tiny: Path, tmp_path: Path) -> None:
    own = json.loads((tiny / "generation_config.json").read_text())
    (tmp_path / "generation_config.json").write_text(json.dumps(own | {"temperature": 0.3, "top_k": 7, "top_p": 3}))
    assert LLM(tiny, generation_config=str(tmp_path)).sampling_defaults == {"temperature": 0.3, "top_k": 7}
    assert LLM(tiny, generation_config="none").sampling_defaults == LLM(tiny).sampling_defaults == {}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError):
        LLM(tiny, generation_config=str(tmp_path))


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Running]:
    with running(lambda: make_chat_llm(tiny)) as server:
        yield server


def test_the_server_tells_its_defaults(server: Running) -> None:
    assert server.call("/v1/models")[1]["data"][0]["sampling_defaults"] == {}


def test_no_tokens_with_an_echo_are_the_log_probabilities_of_the_prompt(server: Running, tiny: Path) -> None:
    body = {"prompt": ["abc", "d"], "max_tokens": 0, "echo": True, "logprobs": 1}
    status, answer = server.call("/v1/completions", body)
    assert status == 200 and answer["usage"]["completion_tokens"] == 0
    first, second = answer["choices"]
    assert [first["text"], second["text"]] == ["abc", "d"] and first["finish_reason"] == "length"
    assert first["logprobs"]["token_logprobs"][0] is None and second["logprobs"]["token_logprobs"] == [None]
    longer = server.call("/v1/completions", body | {"max_tokens": 1, "prompt": "abc"})[1]["choices"][0]
    assert longer["logprobs"]["token_logprobs"][1:3] == pytest.approx(first["logprobs"]["token_logprobs"][1:], abs=1e-4)
    (score,) = LLM(tiny).score("abc", use_tqdm=False)
    assert score.token_logprobs is not None
    assert score.token_logprobs[1:] == pytest.approx(first["logprobs"]["token_logprobs"][1:], abs=1e-4)
    events = server.events("/v1/completions", body | {"prompt": "abc"})
    assert "".join(event["choices"][0]["text"] for event in events) == "abc"
    assert events[-1]["choices"][0]["finish_reason"] == "length"


def test_no_tokens_fill_the_cache(server: Running) -> None:
    prompt = "Z, a prompt that has not been there before"
    for expected in (0, len(prompt) - 2):
        body = {"prompt": prompt, "max_tokens": 0, "n": 2}
        status, answer = server.call("/v1/completions", body)
        assert status == 200 and [choice["text"] for choice in answer["choices"]] == ["", ""]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == expected
    status, answer = server.call("/v1/chat/completions", {"messages": ASK, "max_tokens": 0})
    assert status == 200 and answer["choices"][0]["message"]["content"] == ""
    status, answer = server.call("/v1/messages", {"messages": ASK, "max_tokens": 0})
    assert status == 200 and (answer["content"], answer["stop_reason"]) == ([], "max_tokens")
    server.wait_idle()


def test_a_chat_that_goes_on_can_echo(server: Running) -> None:
    begun = [*ASK, {"role": "assistant", "content": "Well"}]
    body = {"messages": begun, "max_tokens": 4, "temperature": 0, "continue_final_message": True}
    plain = server.call("/v1/chat/completions", body)[1]["choices"][0]["message"]["content"]
    echo = server.call("/v1/chat/completions", body | {"echo": True})[1]["choices"][0]["message"]["content"]
    assert echo == "Well" + plain
    events = server.events("/v1/chat/completions", body | {"echo": True})
    assert "".join(event["choices"][0]["delta"].get("content", "") for event in events) == echo


def test_the_fingerprint_names_what_answers(server: Running, tiny: Path) -> None:
    bodies = {"/v1/completions": {"prompt": "a", "max_tokens": 2}, "/v1/chat/completions": {"messages": ASK}}
    seen = {server.call(path, body)[1]["system_fingerprint"] for path, body in bodies.items()}
    seen |= {event["system_fingerprint"] for path, body in bodies.items() for event in server.events(path, body)}
    assert seen == {server.llm.fingerprint} and server.llm.fingerprint.startswith("fp_")
    assert LLM(tiny, max_num_seqs=3).fingerprint != LLM(tiny).fingerprint == LLM(tiny).fingerprint


def test_metrics_of_what_was_asked(server: Running) -> None:
    server.call("/v1/completions", {"prompt": "a", "max_tokens": 5, "n": 3, "ignore_eos": True})
    text = server.raw("/metrics")[1].decode()
    for name in (
        "request_inference_time_seconds",
        "request_time_per_output_token_seconds",
        "request_max_num_generation_tokens",
        "request_params_n",
        "request_params_max_tokens",
    ):
        assert f'gossamer:{name}_count{{model_name="tiny"}}' in text


def test_a_prompt_alone_in_python(tiny: Path) -> None:
    with LLM(tiny, chat_template=TEMPLATE) as llm:
        (output,) = llm.generate("abc", SamplingParams(max_tokens=0, prompt_logprobs=0), False)
        assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "length"
        assert output.prompt_logprobs is not None and len(output.prompt_logprobs) == 3
        (again,) = llm.stream("abc", SamplingParams(max_tokens=0))
        assert again.finished and again.outputs[0].text == ""
