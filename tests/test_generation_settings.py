"""What a checkpoint says about generating is followed where nothing else is asked for; what makes no sense is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from fake_llm import FakeLLM
from gossamer import LLM, SamplingParams
from gossamer.cli.chat import chat
from gossamer.models.catalog import CATALOG
from gossamer.protocol import ChatCompletionRequest, CompletionRequest

ADVICE = {"temperature": 0.2, "top_p": 0.9, "top_k": 40}


@pytest.fixture
def tiny(make_tiny_llama, tmp_path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


def write_settings(directory: Path, **settings: object) -> None:
    path = directory / "generation_config.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | settings))


def test_advice_comes_from_the_generation_configuration(tiny):
    assert LLM(tiny).sampling_defaults == {}
    write_settings(tiny, do_sample=True, **ADVICE)
    assert LLM(tiny).sampling_defaults == ADVICE


def test_advice_that_makes_no_sense_is_left_out_and_said(tiny, capsys):
    write_settings(tiny, temperature=-3.0, top_p=0.5)
    assert LLM(tiny).sampling_defaults == {"top_p": 0.5}
    assert "generation_config.json is not followed: temperature must be" in capsys.readouterr().err


@pytest.mark.parametrize("body", [{"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}])
def test_fields_of_a_body_win_over_advice_and_advice_over_the_usual(body):
    kind = CompletionRequest if "prompt" in body else ChatCompletionRequest
    plain = kind.parse(body).to_sampling_params()
    assert (plain.temperature, plain.top_p, plain.top_k) == (1.0, 1.0, 0)
    advised = kind.parse(body).to_sampling_params(advised=ADVICE)
    assert (advised.temperature, advised.top_p, advised.top_k, advised.min_p) == (0.2, 0.9, 40, 0.0)
    asked = kind.parse(body | {"temperature": 1.0, "top_p": None}).to_sampling_params(advised=ADVICE)
    assert (asked.temperature, asked.top_p) == (1.0, 0.9)


@pytest.mark.parametrize(
    ("advice", "options", "expected"),
    [
        ({}, [], (0.7, 1.0)),
        ({"temperature": 0.2, "top_p": 0.9}, [], (0.2, 0.9)),
        ({"temperature": 0.2, "top_p": 0.9}, ["--temperature", "1"], (1.0, 0.9)),
        ({"top_k": 5}, ["--top-p", "0.5"], (0.7, 0.5)),
    ],
)
def test_chat_samples_as_asked_then_as_advised(advice, options, expected, monkeypatch):
    asked: list[SamplingParams] = []

    def load(model, options, threads, adapters):
        llm = FakeLLM(model)
        llm.sampling_defaults = advice
        add = llm.engine.add_request
        llm.engine.add_request = lambda name, prompt, params, **more: (
            asked.append(params),
            add(name, prompt, params, **more),
        )
        return llm

    monkeypatch.setattr("gossamer.cli.chat.load_llm", load)
    monkeypatch.setattr("gossamer.cli.chat._check_generates", lambda model, task: None)  # there is no such model
    app = typer.Typer()
    app.command()(chat)
    result = CliRunner().invoke(app, ["base", *options], input="hello")
    assert result.exit_code == 0, result.output
    assert (asked[0].temperature, asked[0].top_p) == expected


def test_models_of_the_catalogue_say_how_to_sample_and_what_their_weights_are():
    for model in CATALOG:
        if model.name == "all-minilm-l6-v2":  # it generates nothing
            assert not model.sampling and model.weights == "F32"
            continue
        assert SamplingParams(**model.sampling).temperature > 0
        assert model.weights.startswith("Q4")


@pytest.mark.parametrize("ids", [[-1, 1], [10**6, 1], [1, 2**40]])
def test_ends_that_no_token_has_are_left_out_and_said(ids, tiny, capsys):
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((tiny / name).read_text()) if (tiny / name).exists() else {}
        (tiny / name).write_text(json.dumps(settings | {"eos_token_id": ids}))
    llm = LLM(tiny)
    assert all(0 <= each < llm.engine.intake.vocab_size for each in llm.engine.factory.eos_token_ids)
    assert 1 in llm.engine.factory.eos_token_ids
    assert "eos_token_id names" in capsys.readouterr().err
