"""Completions that follow a grammar: valid whatever is drawn, and alone whatever else is in the batch."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from gossamer import LLM, SamplingParams, StructuredOutputsParams
from gossamer.errors import InvalidSamplingParamsError

SCHEMA = {
    "type": "object",
    "properties": {
        "id": {"type": "integer", "minimum": 0, "maximum": 999},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 3},
        "ok": {"type": "boolean"},
    },
    "required": ["id", "tags", "ok"],
    "additionalProperties": False,
}
PATTERN = "(0|1){4}-[x-z]{2,3}"


def params(seed: int, **form: Any) -> SamplingParams:
    return SamplingParams(seed=seed, max_tokens=100, structured_outputs=StructuredOutputsParams(**form))


def test_what_is_drawn_at_random_has_the_form(llm: LLM) -> None:
    forms: list[dict[str, Any]] = [{"json": SCHEMA}, {"json": json.dumps(SCHEMA)}, {"regex": PATTERN}]
    forms += [{"choice": ["yes", "no", 'say "maybe"']}, {"json_object": True}]
    asked = [params(seed, **form) for seed in range(12) for form in forms]
    outputs = llm.generate(["Answer:"] * len(asked), asked)
    finished = 0
    for given, output in zip(asked, outputs, strict=True):
        completion = output.outputs[0]
        if completion.finish_reason == "length":
            continue  # cut, as max_tokens asks for
        finished += 1
        form = given.structured_outputs
        assert form is not None
        if form.regex is not None:
            assert re.fullmatch(PATTERN, completion.text)
        elif form.choice is not None:
            assert completion.text in form.choice
        else:
            value = json.loads(completion.text)
            assert isinstance(value, dict)
            if form.json is not None:
                assert 0 <= value["id"] <= 999 and set(value["tags"]) <= {"red", "green"} and len(value["tags"]) <= 3
                assert isinstance(value["ok"], bool)
    assert finished >= 40


def test_greedy_rows_beside_it_are_not_touched(llm: LLM) -> None:
    greedy = SamplingParams(temperature=0, max_tokens=20)
    (alone,) = llm.generate("Answer:", greedy)
    (form_alone,) = llm.generate("Answer:", params(3, regex=PATTERN))
    form, other = llm.generate(["Answer:", "Answer:"], [params(3, regex=PATTERN), greedy])
    assert other.outputs[0].token_ids == alone.outputs[0].token_ids
    assert form.outputs[0].text == form_alone.outputs[0].text


def test_each_of_several_completions_follows_on_its_own(llm: LLM) -> None:
    asked = SamplingParams(n=6, seed=1, max_tokens=30, structured_outputs=StructuredOutputsParams(regex=PATTERN))
    (output,) = llm.generate("Answer:", asked)
    assert all(re.fullmatch(PATTERN, each.text) for each in output.outputs)
    assert len({each.text for each in output.outputs}) > 1


def test_it_survives_preemption(llm: LLM) -> None:
    asked = params(5, regex="[a-z]{60}")
    (expected,) = llm.generate("Answer:", asked)
    llm.engine.add_request("one", "Answer:", asked)
    outputs: list[Any] = []
    for step in range(200):
        outputs += llm.engine.step()
        if step in (5, 30):
            llm.engine.scheduler.preempt(llm.engine.scheduler.active[0])
        if outputs:
            break
    assert outputs[0].outputs[0].text == expected.outputs[0].text
    assert re.fullmatch("[a-z]{60}", outputs[0].outputs[0].text)


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"json": SCHEMA, "regex": "x"},
        {"choice": []},
        {"choice": "yes"},
        {"choice": [""]},
        {"json": 5},
        {"regex": 5},
        {"json_object": 1},
    ],
)
def test_a_form_that_makes_no_sense(form: dict[str, Any]) -> None:
    with pytest.raises(InvalidSamplingParamsError):
        StructuredOutputsParams(**form)


@pytest.mark.parametrize("form", [{"regex": "("}, {"json": {"type": "strin"}}, {"json": "no JSON"}, {"json": "[1]"}])
def test_a_grammar_that_is_none_fails_alone(llm: LLM, form: dict[str, Any]) -> None:
    bad, good = llm.generate(["a", "b"], [params(0, **form), SamplingParams(max_tokens=3)], on_error="return")
    assert isinstance(bad.error, InvalidSamplingParamsError) and bad.error.param == "structured_outputs"
    assert good.error is None and good.outputs


def test_schemas_that_differ_in_order_only_are_two(llm: LLM) -> None:
    first, second = {"a": {"enum": [1]}, "b": {"enum": [2]}}, {"b": {"enum": [2]}, "a": {"enum": [1]}}
    for properties in (first, second):
        schema = {"type": "object", "properties": properties, "required": ["a", "b"], "additionalProperties": False}
        (output,) = llm.generate("Answer:", params(1, json=schema))
        assert list(json.loads(output.outputs[0].text)) == list(properties)


def test_texts_that_end_need_their_end() -> None:
    with pytest.raises(InvalidSamplingParamsError, match="ignore_eos"):
        SamplingParams(ignore_eos=True, structured_outputs=StructuredOutputsParams(json_object=True))
