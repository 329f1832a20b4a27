"""LoRA adapters: in fp32, greedy tokens are those of a model with the adapter merged into its weights."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import make_model, reference
from gossamer.engine.engine import Engine
from gossamer.engine.runner import Runner
from gossamer.errors import InvalidPromptError
from gossamer.kernels.library import instruction_set
from gossamer.models.lora import Adapter, load_adapter
from gossamer.options import SHARING_MODES, EngineOptions, RunnerOptions
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
from gossamer.sampling_params import BeamSearchParams, SamplingParams
from lora_adapters import ATTENTION, MLP, merged, write_adapter
from test_exactness import TREES, NumberTokenizer, prompts_of

NAMES = (None, "all", "some")
MODELS = ["llama", "qwen2", "gemma3"]
Asked = tuple[str | None, list[int]]


def make(runner: str, model: Any, adapters: list[Adapter], **options: Any) -> Runner:
    """A runner; the native one takes over the weights of a copy."""
    if runner == "transformers":
        return TransformersRunner(model, adapters)
    if instruction_set() is None:
        pytest.skip("the native kernels are not installed")
    return NativeRunner(copy.deepcopy(model), RunnerOptions(**options), max_rows=2048, adapters=adapters)


def answers(engine: Engine, asked: list[Asked], count: int = 6) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    for number, (adapter, prompt) in enumerate(asked):
        engine.add_request(str(number), {"prompt_token_ids": prompt, "adapter": adapter}, params)
    done: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            done[output.request_id] = output.outputs[0].token_ids  # type: ignore[union-attr]
    assert engine.slots.num_bytes == 0 and all(node.refs == 0 for node in engine.tree)
    return [done[str(number)] for number in range(len(asked))]


@pytest.fixture(scope="module", params=MODELS)
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, list[Adapter], list[Asked], list[list[int]]]]:
    """A model, two adapters, every prompt with each and with none, and what the merged models answer."""
    untied = {"tie_word_embeddings": False}  # tied ones make a random model repeat its last token, whatever is added
    model = make_model(request.param, **untied)
    root = tmp_path_factory.mktemp("adapters")
    directories = {
        "all": write_adapter(root / "all", model, seed=1),
        "some": write_adapter(root / "some", model, ("v_proj", "gate_proj"), rank=3, seed=2, use_rslora=True),
    }
    generator = random.Random(request.param)
    prompts = [prompt for tree in TREES[1:3] for prompt in prompts_of(tree, generator)]
    expected = []
    for name in NAMES:
        generate = reference(model if name is None else merged(model, directories[name]))
        expected.append([generate(prompt, 6) for prompt in prompts])
    asked = [(name, prompt) for prompt in prompts for name in NAMES]  # neighbours in a step have different adapters
    adapters = [load_adapter(name, directory, model) for name, directory in directories.items()]
    model.set_attn_implementation(IMPLEMENTATION)
    yield model, adapters, asked, [each for column in zip(*expected, strict=True) for each in column]


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_greedy_tokens_equal_those_of_merged_weights(case: Any, runner: str, sharing: Any) -> None:
    """Rows of no adapter and of two in one step; cold and warm, whole and in chunks."""
    model, adapters, asked, expected = case
    distinct = {tuple(map(tuple, expected[place::3])) for place in range(3)}
    assert len(distinct) == 3  # the adapters do change the answers
    for chunk, sequences in ((2048, 256), (37, 5)):
        options = EngineOptions(sharing=sharing, max_num_batched_tokens=chunk, max_num_seqs=sequences)
        engine = Engine(make(runner, model, adapters), NumberTokenizer(), options)
        assert answers(engine, asked) == expected
        assert answers(engine, asked) == expected
