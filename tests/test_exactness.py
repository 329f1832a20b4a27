"""The contract: in fp32, greedy tokens are those of transformers, whatever is shared, cached or chunked."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import ARCHITECTURES, VOCAB, make_model, make_model_of_more_than_text, reference
from gguf_files import export_model, read_model
from gossamer.engine.cost import CostModel
from gossamer.engine.engine import Engine
from gossamer.engine.runner import Runner
from gossamer.kernels.library import instruction_set
from gossamer.models.load import load_model
from gossamer.options import SHARING_MODES, EngineOptions, ModelOptions
from gossamer.runners.native import NativeRunner, why_not_native
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
from gossamer.sampling_params import SamplingParams
from stored_blocks import q4_k_m, store

# Levels of a prefix tree, as lengths: each level is spread evenly over the one above (the matrix of the Hydragen
# repository's tests), then three levels.
TREES = [
    [[1], [10]],
    [[3], [6, 7]],
    [[7, 7], [9, 10, 11, 4], [129, 2, 3, 4, 5, 6, 7, 128]],
    [[40], [70, 3], [20, 9, 1, 30]],
]


class NumberTokenizer:
    """Tokens are numbers."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


def prompts_of(tree: list[list[int]], generator: random.Random) -> list[list[int]]:
    """One prompt per leaf."""
    prompts: list[list[int]] = [[]]
    for level in tree:
        parents = [prompts[i * len(prompts) // len(level)] for i in range(len(level))]
        prompts = [p + generator.choices(range(VOCAB), k=n) for p, n in zip(parents, level, strict=True)]
    return prompts


def answers(engine: Engine, prompts: list[list[int]], count: int, **params: Any) -> list[list[int]]:
    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **params)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    done: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            done[output.request_id] = output.outputs[0].token_ids  # type: ignore[union-attr]
    assert engine.slots.num_bytes == 0
    assert all(node.refs == 0 for node in engine.tree)
    return [done[str(number)] for number in range(len(prompts))]


NATIVE = (
    *("llama", "mistral", "qwen2", "qwen2_sliding", "qwen3", "gemma3", "phi3", "phi3_partial", "olmo2", "olmo3"),
    *("granite", "smollm3", "glm4", "exaone4", "seed_oss", "hunyuan"),
    *("gemma", "gemma2", "cohere", "cohere2", "olmo", "ministral", "ministral3", "phi", "starcoder2", "ernie4_5"),
    *("gemma4", "gemma4_large", "gemma4_experts"),
    *("gpt_neox", "gpt_neox_serial", "gpt2"),
    *("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "ernie4_5_moe", "gpt_oss"),
)


def make(runner: str, model: Any) -> Runner:
    """A runner; the native one takes over the weights of a copy."""
    if runner == "transformers":
        return TransformersRunner(model)
    if instruction_set() is None:
        pytest.skip("the native kernels are not installed")
    return NativeRunner(copy.deepcopy(model), max_rows=2048)


def compared(name: str) -> tuple[Any, list[list[int]], list[list[int]]]:
    """A model with its attention replaced, prompts over all trees, and what transformers answers."""
    model = make_model(name)
    generator = random.Random(name)
    prompts = [prompt for tree in TREES for prompt in prompts_of(tree, generator)]
    generate = reference(model)
    expected = [generate(prompt, 8) for prompt in prompts]
    model.set_attn_implementation(IMPLEMENTATION)
    return model, prompts, expected


@pytest.fixture(scope="module", params=ARCHITECTURES)
def case(request: pytest.FixtureRequest) -> Iterator[tuple[Any, list[list[int]], list[list[int]], str]]:
    """A model with its attention replaced, prompts over all trees, what transformers answers, and the model's name."""
    yield *compared(request.param), request.param


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_greedy_tokens_equal_transformers(case: Any, sharing: Any, runner: str) -> None:
    """Cold and warm, whole and in chunks, all at once and a few at a time."""
    model, prompts, expected, name = case
    if runner == "native" and name not in NATIVE:
        assert why_not_native(model)
        return
    for chunk, sequences in ((2048, 256), (37, 5)):
        engine = Engine(
            make(runner, model),
            NumberTokenizer(),
            EngineOptions(sharing=sharing, max_num_batched_tokens=chunk, max_num_seqs=sequences),
        )
        assert answers(engine, prompts, 8) == expected
        cold = engine.stats.computed_tokens
        assert answers(engine, prompts, 8) == expected
        warm = engine.stats.computed_tokens - cold
        if sharing == "off":
            assert warm == cold
        else:  # at most the last prompt token and what is generated
            assert warm <= len(prompts) * 8


@pytest.mark.parametrize("runner", ["transformers", "native"])
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_models_that_could_read_images_too_answer_text(name: str, runner: str) -> None:
    model = make_model_of_more_than_text(name)
    generator = random.Random(name)
    prompts = [prompt for tree in TREES[:2] for prompt in prompts_of(tree, generator)]
    generate = reference(model)
    expected = [generate(prompt, 8) for prompt in prompts]
    model.set_attn_implementation(IMPLEMENTATION)
    assert answers(Engine(make(runner, model), NumberTokenizer()), prompts, 8) == expected


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma3"])
def gguf_case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int]], list[list[int]]]:
    """A file with the types of Q4_K_M, prompts, and what transformers answers to them with the weights it reads."""
    directory = tmp_path_factory.mktemp(request.param)
    source = export_model(request.param, directory, hidden_size=256, intermediate_size=512)[1]
    file = store(source, directory / "mixed.gguf", q4_k_m)
    generator = random.Random(request.param)
    prompts = [prompt for tree in TREES[1:3] for prompt in prompts_of(tree, generator)]
    generate = reference(read_model(file))
    return file, prompts, [generate(prompt, 8) for prompt in prompts]


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize(("runner", "weights"), [("native", "dequantized"), ("transformers", "as-stored")])
def test_greedy_tokens_of_gguf_equal_transformers(gguf_case: Any, sharing: Any, runner: str, weights: Any) -> None:
    """With activations in fp32, of the values of a file's blocks, or of the blocks as they are."""
    file, prompts, expected = gguf_case
    model, _ = load_model(file, attn_implementation=IMPLEMENTATION, options=ModelOptions(weights=weights))
    engine = Engine(make(runner, model), NumberTokenizer(), EngineOptions(sharing=sharing, max_num_batched_tokens=37))
    assert answers(engine, prompts, 8) == expected


def _random_tree(draw: Any) -> list[list[int]]:
    """Prompts over few tokens, so that common prefixes of all lengths occur, identical prompts included."""
    prompts = [draw(st.lists(st.integers(0, 2), min_size=1, max_size=12))]
    for _ in range(draw(st.integers(1, 9))):
        base = draw(st.sampled_from(prompts))
        cut = draw(st.integers(0, len(base)))
        tail = draw(st.lists(st.integers(0, 2), max_size=90 if draw(st.booleans()) else 6))
        prompts.append((base[:cut] + tail) or [1])
    return prompts


@pytest.fixture(scope="module")
def mistral() -> tuple[Any, Any]:
    """Sliding windows make positions matter, so the windowed architecture is the stricter one."""
    model = make_model("mistral")
    plain = make_model("mistral")
    model.set_attn_implementation(IMPLEMENTATION)
    return model, reference(plain)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data(), runner=st.sampled_from(["transformers", "native"]))
def test_random_trees(mistral: Any, data: st.DataObject, runner: str) -> None:
    model, generate = mistral
    prompts = _random_tree(data.draw)
    expected = {tuple(p): generate(p, 3) for p in prompts}
    engine = Engine(
        make(runner, model),
        NumberTokenizer(),
        EngineOptions(
            sharing=data.draw(st.sampled_from(SHARING_MODES)),
            max_num_batched_tokens=data.draw(st.integers(1, 64)),
            max_num_seqs=data.draw(st.integers(1, 12)),
        ),
    )
    # every segment counts, however short: the cost model must not decide what is tested
    if data.draw(st.booleans()) and engine.scheduler.cost is not None:
        engine.scheduler.cost = CostModel(call=0, per_reader=0, per_key=0, per_pair=0, per_private_pair=1)
    for _ in range(2):
        assert answers(engine, prompts, 3) == [expected[tuple(p)] for p in prompts]


@pytest.mark.parametrize("kind", ["transformers", "native"])
def test_little_memory_changes_nothing_but_the_time(mistral: Any, kind: str) -> None:
    """Sequences are preempted and computed again, cached prefixes evicted: the tokens stay."""
    model, generate = mistral
    generator = random.Random(5)
    prompts = prompts_of([[60], [20, 30], [9, 1, 70, 12, 33, 40]], generator)
    expected = [generate(p, 90) for p in prompts]
    runner = make(kind, model)
    for sharing in SHARING_MODES:
        options = EngineOptions(sharing=sharing, memory=700 * runner.layout.bytes_per_token)
        engine = Engine(runner, NumberTokenizer(), options)
        for _ in range(2):
            assert answers(engine, prompts, 90) == expected
        assert engine.stats.preemptions or engine.stats.evicted_tokens
        assert engine.budget.peak <= engine.budget.total
