"""With ``batch_invariant`` the bits of an answer depend on nothing else that is computed, nor on how it is computed."""

from __future__ import annotations

import random
from typing import Any

import pytest

from architectures import VOCAB, make_model
from gossamer.engine.engine import Engine
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.kernels.library import instruction_sets
from gossamer.models.quantize import quantize
from gossamer.options import EngineOptions, RunnerOptions
from gossamer.runners.choose import make_runner
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import IMPLEMENTATION
from gossamer.sampling_params import SamplingParams
from test_exactness import NumberTokenizer

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
POSITIONS = 2048
ANSWER = SamplingParams(temperature=1.0, seed=3, max_tokens=12, logprobs=2, ignore_eos=True)


def network(name: str, *, int8: bool = False, outliers: Any = "token") -> Any:
    model = make_model(name, max_position_embeddings=POSITIONS, initializer_range=0.1)
    if int8:
        quantize(model, outliers=outliers)
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def engine(runner: NativeRunner, generator: random.Random, **options: Any) -> Engine:
    runner.threads = generator.choice([1, 2, 3])
    settings = {"sharing": generator.choice(["attention", "storage", "off"])}
    settings |= {"max_num_batched_tokens": generator.choice([37, 256, 2000])} | options
    return Engine(runner, NumberTokenizer(), EngineOptions(**settings))


def companions(prompt: list[int], generator: random.Random) -> list[list[int]]:
    """Prompts that share some of the prompt, all of it, or nothing."""
    others = []
    for _ in range(generator.choice([1, 2, 4, 9])):
        shared = generator.choice([0, generator.randrange(len(prompt)), len(prompt)])
        others.append(prompt[:shared] + generator.choices(range(VOCAB), k=generator.randrange(1, 200)))
    return others


def answer_among(made: Engine, prompt: list[int], others: list[list[int]], generator: random.Random) -> Any:
    """Tokens of the prompt's answer, and the log-probabilities at each; the others come before and after it."""
    requests = [("it", prompt, ANSWER)]
    for number, other in enumerate(others):
        params = SamplingParams(seed=number, max_tokens=generator.randrange(1, 20), ignore_eos=True)
        requests.insert(generator.randrange(len(requests) + 1), (str(number), other, params))
    waiting, done = requests[::-1], {}
    while waiting or made.has_unfinished_requests():
        for _ in range(generator.choice([0, 1, 3]) if made.has_unfinished_requests() else 1):
            if waiting:
                name, tokens, params = waiting.pop()
                made.add_request(name, {"prompt_token_ids": tokens}, params)
        if made.scheduler.active and generator.random() < 0.05:  # as if memory had run out
            made.scheduler.preempt(generator.choice(made.scheduler.active))
        done |= {output.request_id: output for output in made.step()}
    output = done["it"].outputs[0]
    return output.token_ids, output.logprobs


@pytest.mark.parametrize(
    "name, kv_dtype, int8",
    [
        ("llama", "auto", False),
        ("llama", "auto", True),
        ("qwen3", "int8", True),
        ("mistral", "bfloat16", False),
        ("gemma3", "auto", True),
        ("gemma4", "int8", False),
        ("gemma4_large", "auto", True),
    ],
)
@pytest.mark.parametrize("length", [5, 300, 1100])
def test_an_answer_is_the_same_to_the_bit_in_any_company(name: str, kv_dtype: Any, int8: bool, length: int) -> None:
    options = RunnerOptions(runner="native", kv_dtype=kv_dtype, batch_invariant=True)
    runner = NativeRunner(network(name, int8=int8), options, max_rows=2048)
    generator = random.Random(f"{name} {length}")
    prompt = generator.choices(range(VOCAB), k=length)
    alone = answer_among(engine(runner, generator), prompt, [], generator)
    for _ in range(4):
        others = companions(prompt, generator)
        assert answer_among(engine(runner, generator), prompt, others, generator) == alone


def test_without_the_option_rounding_shows_that_the_test_can_fail() -> None:
    runner = NativeRunner(network("llama"), RunnerOptions(), max_rows=2048)
    generator = random.Random(1)
    prompt = generator.choices(range(VOCAB), k=300)
    alone = answer_among(engine(runner, generator), prompt, [], generator)
    found = [
        answer_among(engine(runner, generator), prompt, companions(prompt, generator), generator) for _ in range(6)
    ]
    assert any(logprobs != alone[1] for _, logprobs in found)


def test_what_looks_at_the_whole_batch_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="native runner"):
        RunnerOptions(runner="transformers", batch_invariant=True)
    with pytest.raises(ConfigurationError, match="prefix_eps"):
        RunnerOptions(prefix_eps=0.1, batch_invariant=True)
    with pytest.raises(ConfigurationError, match="int8_outliers 'batch'"):
        NativeRunner(network("llama", int8=True, outliers="batch"), RunnerOptions(batch_invariant=True), max_rows=8)
    with pytest.raises(UnsupportedModelError, match="batch_invariant"):
        make_runner(network("opt"), RunnerOptions(batch_invariant=True), max_rows=8)
