"""Options: named once, checked where they are made, and the same in Python and in every command."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from gossamer.cli.app import app
from gossamer.cli.engine_options import combinations
from gossamer.errors import ConfigurationError
from gossamer.llm import LLM
from gossamer.options import (
    GROUPS,
    ConversationOptions,
    EngineOptions,
    ModelOptions,
    OptionArguments,
    Options,
    RunnerOptions,
    option_fields,
)


def test_an_unknown_name_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigurationError, match="no option 'max_num_seq'; did you mean 'max_num_seqs'"):
        LLM("any", max_num_seq=3)  # type: ignore[call-arg]  # wrong on purpose
    with pytest.raises(ConfigurationError, match="the options are dtype, quantization"):
        LLM("any", zzz=3)  # type: ignore[call-arg]  # wrong on purpose


@pytest.mark.parametrize(
    ("group", "values"),
    [
        (ModelOptions, {"dtype": "float3"}),
        (ModelOptions, {"quantization": "int4"}),
        (ModelOptions, {"quantization": "int8", "int8_threshold": 0}),
        (ModelOptions, {"quantization": "int8", "int8_criterion": "some"}),
        (ModelOptions, {"quantization": "int8", "int8_outliers": "none of them"}),
        (RunnerOptions, {"runner": "magic"}),
        (RunnerOptions, {"kv_dtype": "int4"}),
        (RunnerOptions, {"kv_dtype": "int8", "runner": "transformers"}),
        (RunnerOptions, {"sparse_weights": "yes"}),
        (RunnerOptions, {"prefix_eps": 1.0}),
        (RunnerOptions, {"prefix_eps": 0.1, "runner": "transformers"}),
        (RunnerOptions, {"prefix_eps": 0.1, "kv_dtype": "int8"}),
        (EngineOptions, {"sharing": "some"}),
        (EngineOptions, {"memory": "much"}),
        (EngineOptions, {"max_num_seqs": 0}),
        (EngineOptions, {"max_num_batched_tokens": True}),
        (EngineOptions, {"seed": 0.5}),
        (EngineOptions, {"prefix_dir": "d", "prefix_dir_salts": "a salt itself"}),
        (EngineOptions, {"prefix_dir": "d", "prefix_dir_salts": ""}),
        (EngineOptions, {"prefix_dir": "d", "prefix_dir_salts": ["a" * 64, "b" * 63]}),
        (EngineOptions, {"prefix_dir": "d", "prefix_dir_salts": 3}),
        (EngineOptions, {"prefix_dir_salts": "a" * 64}),
        (ConversationOptions, {"default_chat_template_kwargs": "{"}),
        (ConversationOptions, {"default_chat_template_kwargs": "[1]"}),
        (ConversationOptions, {"generation_config": ""}),
    ],
)
def test_values_are_checked_when_they_are_said(group: Any, values: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        group(**values)


def test_arguments_and_options_are_each_others_inverse() -> None:
    said = {"prefix_eps": 0.1, "int8_head": True, "max_num_seqs": 3}
    assert Options.of(said).changed() == said
    assert Options.of(Options.of(said).arguments()) == Options.of(said)


def test_editors_and_signatures_show_what_the_dataclasses_say() -> None:
    hints = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
    assert get_type_hints(OptionArguments) == hints
    shown = dict(inspect.signature(LLM).parameters)
    assert shown.pop("model").default is inspect.Parameter.empty
    assert shown.pop("lora").default is None  # an argument of its own
    assert {name: each.default for name, each in shown.items()} == {n: f.default for n, f in option_fields().items()}


COMMANDS: dict[tuple[str, ...], tuple[type[Any], ...]] = {
    ("serve",): GROUPS,
    ("batch",): GROUPS,
    ("chat",): GROUPS,
    ("eval",): GROUPS,
    ("bench", "decode"): (ModelOptions, RunnerOptions),
}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_offers_the_options(command: tuple[str, ...]) -> None:
    found: Any = typer.main.get_command(app)
    for name in command:
        found = found.commands[name]
    offered = {each.name: each for each in found.params}
    for name, each in option_fields(*COMMANDS[command]).items():
        assert offered[name].opts == ["--" + name.replace("_", "-")]
        own = {"seed", "max_num_seqs", "max_num_batched_tokens"}  # of some commands: their defaults are their own
        if name not in own and "compare" not in each.metadata:
            assert offered[name].default == each.default


def test_several_values_make_all_combinations() -> None:
    found = list(combinations({"sparse_weights": "off, on", "prefix_eps": "0,0.05", "dtype": "float32"}))
    assert [(each["sparse_weights"], each["prefix_eps"]) for each in found] == [
        ("off", 0.0),
        ("off", 0.05),
        ("on", 0.0),
        ("on", 0.05),
    ]
    with pytest.raises(ConfigurationError, match="--prefix-eps takes numbers"):
        list(combinations({"prefix_eps": "0,much"}))


def test_eval_refuses_what_it_would_not_use() -> None:
    result = CliRunner().invoke(app, ["eval", "any", "--kv-dtype", "float32"])
    assert isinstance(result.exception, ConfigurationError) and "--kv-dtype" in str(result.exception)


def test_importing_the_options_is_light() -> None:
    script = "import sys, gossamer.options; print({'torch', 'transformers', 'numpy'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "set()\n"
