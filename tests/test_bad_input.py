"""Bad input fails by name and alone: the other requests finish, nothing leaks, and the engine goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import LLM, BeamSearchParams, SamplingParams
from gossamer.engine.runner import Logits
from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    GossamerError,
    InvalidPromptError,
    InvalidSamplingParamsError,
    MemoryBudgetError,
    ModelNotFoundError,
    PromptTooLongError,
    RequestError,
)
from references import assert_idle, greedy, load_reference

GREEDY = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
GOOD = ["A prompt that works", "A prompt that works as well"]
VOCAB = 257


@pytest.fixture(scope="module")
def tiny(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny"), initializer_range=0.4)


@pytest.fixture(scope="module")
def expected(tiny: Path, shared: LLM) -> list[list[int]]:
    reference = load_reference(tiny)
    return [greedy(reference, list(shared.tokenizer.encode(text)), 5, eos_token_id=None) for text in GOOD]


@pytest.fixture(scope="module")
def shared(tiny: Path) -> LLM:
    return LLM(tiny)


@pytest.fixture
def llm(shared: LLM, expected: list[list[int]]) -> Iterator[LLM]:
    """After each test, nothing is left and the engine answers as before."""
    yield shared
    assert_works(shared, expected)


def assert_works(llm: LLM, expected: list[list[int]]) -> None:
    assert_idle(llm.engine)
    assert [output.outputs[0].token_ids for output in llm.generate(GOOD, GREEDY)] == expected
    assert_idle(llm.engine)


def assert_fails_alone(llm: LLM, prompt: Any, params: Any, error: type[RequestError], expected: list[list[int]]) -> str:
    """Between two good prompts; returns the message."""
    prompts, all_params = [GOOD[0], prompt, GOOD[1]], [GREEDY, params, GREEDY]
    with pytest.raises(error) as caught:
        llm.generate(prompts, all_params)
    assert "prompt-1:" in str(caught.value)
    returned = llm.generate(prompts, all_params, on_error="return")
    for outputs in (caught.value.outputs, returned):
        first, bad, last = outputs
        assert [first.outputs[0].token_ids, last.outputs[0].token_ids] == expected  # type: ignore[union-attr]
        assert first.error is None and last.error is None
        assert isinstance(bad.error, error)
        assert bad.outputs == []  # type: ignore[union-attr]
        assert bad.request_id == bad.error.request_id
    return str(caught.value)


# --- prompts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": []}, "empty"),
        ({"prompt_token_ids": [1, -1]}, r"prompt_token_ids[1] is -1"),
        ({"prompt_token_ids": [VOCAB]}, "from 0 to 256"),
        ({"prompt_token_ids": [True]}, "True"),
        ({"prompt_token_ids": [1.0]}, "1.0"),
        ({"prompt_token_ids": ["1"]}, "'1'"),
        ({"prompt_token_ids": [1, None]}, "None"),
        ({"prompt_token_ids": [[1]]}, "[1]"),
        ({"prompt_token_ids": "12"}, "list of integers"),
        ({"prompt_token_ids": None}, "list of integers"),
        ({"text": "x"}, "prompt_token_ids"),
        ({}, "prompt_token_ids"),
        (None, "NoneType"),
        (7, "int"),
        ([1, 2], "list"),
        (b"bytes", "bytes"),
        ("\ud800", "Unicode"),
        ("fine until \udfff here", "Unicode"),
    ],
)
def test_bad_prompts(llm: LLM, expected: list[list[int]], prompt: Any, message: str) -> None:
    assert message in assert_fails_alone(llm, prompt, GREEDY, InvalidPromptError, expected)


@pytest.mark.parametrize("length", [128, 129, 5000])
def test_prompts_that_do_not_fit_the_context(llm: LLM, expected: list[list[int]], length: int) -> None:
    message = assert_fails_alone(llm, {"prompt_token_ids": [1] * length}, GREEDY, PromptTooLongError, expected)
    assert str(length) in message and "128" in message


@pytest.mark.parametrize("prompts", [None, 7, b"bytes", {"text": "x"}, ""])
def test_a_single_bad_prompt(llm: LLM, prompts: Any) -> None:
    with pytest.raises(InvalidPromptError, match="prompt-0"):
        llm.generate(prompts, GREEDY)


def test_tensors_are_token_ids(llm: LLM) -> None:
    one, other = llm.generate([{"prompt_token_ids": torch.tensor([5, 6])}, {"prompt_token_ids": (5, 6)}], GREEDY)
    assert one.prompt_token_ids == [5, 6]
    assert one.outputs == other.outputs


def test_no_prompts(llm: LLM) -> None:
    assert llm.generate([]) == []


# --- parameters ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values"),
    {
        "n": [0, -1, 1.0, True, None, "2"],
        "temperature": [-0.1, float("nan"), float("inf"), "1", None, True],
        "top_k": [-2, 1.5, None],
        "top_p": [0, -0.5, 1.01, float("nan"), None],
        "min_p": [-0.1, 1.1, None],
        "repetition_penalty": [0, -1, float("inf"), None],
        "presence_penalty": [-2.1, 2.1, float("nan")],
        "frequency_penalty": [-2.1, 2.1, None],
        "logit_bias": [{-1: 1.0}, {1: float("nan")}, {1: float("inf")}, {"x": 1.0}, {1: None}, [1, 2]],
        "seed": [1.5, "7", True],
        "stop": [[""], [1], [None], ""],
        "stop_token_ids": [[-1], [1.0], ["1"]],
        "max_tokens": [-1, 1.5, True],
        "min_tokens": [-1, 17, 1.5],
        "logprobs": [-1, 1.5, True],
        "prompt_logprobs": [-1, 1.5, True],
    }.items(),
)
def test_bad_sampling_values(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidSamplingParamsError, match=field) as caught:
            SamplingParams(**{field: value})
        assert caught.value.param == field


@pytest.mark.parametrize(
    ("params", "param"),
    [
        (SamplingParams(logit_bias={VOCAB: 1.0}), "logit_bias"),
        (SamplingParams(stop_token_ids=[VOCAB]), "stop_token_ids"),
        (SamplingParams(logprobs=VOCAB + 1), "logprobs"),
        (SamplingParams(prompt_logprobs=VOCAB + 1), "prompt_logprobs"),
        ({"temperature": 0}, "sampling_params"),
        (None, "sampling_params"),
        (BeamSearchParams(beam_width=2, max_tokens=3), "sampling_params"),
    ],
)
def test_parameters_that_do_not_fit_the_model(llm: LLM, expected: list[list[int]], params: Any, param: str) -> None:
    assert param in assert_fails_alone(llm, "x", params, InvalidSamplingParamsError, expected)


@pytest.mark.parametrize("params", [{"temperature": 0}, 7, "greedy"])
def test_one_object_of_the_wrong_type_for_all(llm: LLM, params: Any) -> None:
    with pytest.raises(InvalidSamplingParamsError, match="prompt-0: sampling_params must be SamplingParams") as caught:
        llm.generate(GOOD, params)
    assert all(output.error is not None for output in caught.value.outputs)


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    with pytest.raises(InvalidSamplingParamsError, match="2 prompts but 3"):
        llm.generate(GOOD, [GREEDY] * 3)


def test_request_ids_are_unique_while_unfinished(llm: LLM) -> None:
    llm.engine.add_request("same", GOOD[0], GREEDY)
    with pytest.raises(RequestError, match="same: a request of this id is unfinished"):
        llm.engine.add_request("same", GOOD[1], GREEDY)
    with pytest.raises(RequestError, match="same"):
        llm.engine.add_score("same", GOOD[1])
    while llm.engine.has_unfinished_requests():
        llm.engine.step()
    llm.engine.add_request("same", GOOD[1], GREEDY)
    llm.engine.abort("same")


# --- memory ----------------------------------------------------------------------------------------------------------


def test_a_prompt_beyond_the_budget(tiny: Path, shared: LLM, expected: list[list[int]]) -> None:
    """Refused at once if not even the prompt fits, and later if what is generated does not."""
    token = shared.engine.runner.layout.bytes_per_token
    small = LLM(tiny, memory=100 * token)
    assert "memory" in assert_fails_alone(small, {"prompt_token_ids": [1] * 110}, GREEDY, MemoryBudgetError, expected)
    endless = SamplingParams(max_tokens=None, ignore_eos=True)
    assert "memory" in assert_fails_alone(small, {"prompt_token_ids": [1] * 40}, endless, MemoryBudgetError, expected)
    assert small.engine.budget.peak <= small.engine.budget.total
    assert_works(small, expected)


# --- configuration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "banana"}, "memory must be a size"),
        ({"memory": "0"}, "memory"),
        ({"memory": -5}, "memory"),
        ({"sharing": "x"}, "attention, storage, off"),
        ({"max_model_len": 129}, "from 2 to 128"),
        ({"max_model_len": 0}, "max_model_len"),
        ({"quantization": "int4"}, "quantization"),
        ({"dtype": "float3"}, "float32"),
        ({"runner": "magic"}, "runner"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens"),
    ],
)
def test_bad_configuration(tiny: Path, options: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        LLM(tiny, **options)


def test_models_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="smollm2-135m"):
        LLM("smollm2-135n")
    with pytest.raises(GossamerError, match=r"config\.json") as caught:
        LLM(tmp_path)
    assert isinstance(caught.value, (CheckpointError, ModelNotFoundError))


# --- the model misbehaves --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(max_tokens=5, ignore_eos=True), SamplingParams(n=2)])
def test_logits_that_are_not_numbers_fail_one_request(
    llm: LLM, expected: list[list[int]], params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last prompt comes last in the plan of the step that follows the prompts."""
    engine = llm.engine
    forward, ruined = engine.runner.forward, []

    def ruin(plan: Any) -> Logits:
        logits = forward(plan).values
        if not ruined and len(logits) == 2 + params.n:
            sick = [i for i, t in enumerate(plan.tokens[plan.logit_rows].tolist()) if t == 200]
            if sick:
                logits = logits.clone()
                logits[sick[-1]] = torch.nan
                ruined.append(True)
        return Logits(logits)

    monkeypatch.setattr(engine.runner, "forward", ruin)
    prompts = [GOOD[0], {"prompt_token_ids": [100, 200]}, GOOD[1]]
    with pytest.raises(RequestError, match=r"prompt-1: .*not finite") as caught:
        llm.generate(prompts, [GREEDY, params, GREEDY])
    assert ruined
    first, _, last = caught.value.outputs
    assert [first.outputs[0].token_ids, last.outputs[0].token_ids] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize("moment", [0, 1, 3])
@pytest.mark.parametrize("chunk", [2048, 4])
def test_a_step_that_raises_is_tried_again(
    tiny: Path, expected: list[list[int]], moment: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the pass, or after it wrote keys and values."""
    engine = LLM(tiny, max_num_batched_tokens=chunk).engine
    forward, calls = engine.runner.forward, iter(range(1000))

    def fail(plan: Any) -> Logits:
        call = next(calls)
        if call == moment:
            raise RuntimeError("before")
        logits = forward(plan)
        if call == moment + 1:
            raise RuntimeError("after")
        return logits

    monkeypatch.setattr(engine.runner, "forward", fail)
    for number, prompt in enumerate(GOOD):
        engine.add_request(str(number), prompt, GREEDY)
    done: dict[str, list[int]] = {}
    failures = 0
    while engine.has_unfinished_requests():
        try:
            outputs = engine.step()
        except RuntimeError:
            failures += 1
        else:
            done.update((output.request_id, output.outputs[0].token_ids) for output in outputs)  # type: ignore[union-attr]
    assert failures == 2
    assert [done[str(number)] for number in range(len(GOOD))] == expected
    assert_idle(engine)


def test_a_call_that_is_interrupted_leaves_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(plan: Any) -> Logits:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(llm.engine.runner, "forward", interrupt)
        llm.generate(GOOD, GREEDY)
    assert_idle(llm.engine)
