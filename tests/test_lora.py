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
from gguf_files import export_model, read_model
from gossamer.engine.engine import Engine
from gossamer.engine.runner import Runner
from gossamer.errors import InvalidPromptError, UnsupportedModelError
from gossamer.kernels.library import instruction_set
from gossamer.models.load import load_model
from gossamer.models.lora import Adapter, load_adapter
from gossamer.models.quantize import quantize
from gossamer.nn import Int8Linear
from gossamer.options import SHARING_MODES, EngineOptions, ModelOptions, RunnerOptions
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
from gossamer.sampling_params import BeamSearchParams, SamplingParams
from lora_adapters import merged, write_adapter
from references import generate, logprobs
from stored_blocks import q4_k_m, store
from test_exactness import TREES, NumberTokenizer, prompts_of
from test_native_runner import needs_native

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
            done[output.request_id] = output.outputs[0].token_ids  # type: ignore[union-attr]  # of texts, not of scores
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
        answer = reference(model if name is None else merged(model, directories[name]))
        expected.append([answer(prompt, 6) for prompt in prompts])
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


@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_keys_and_values_are_shared_within_an_adapter_only(case: Any, runner: str) -> None:
    model, adapters, _, _ = case
    engine = Engine(make(runner, model, adapters), NumberTokenizer())
    prompt = list(range(3, 60))

    def cached(adapter: str | None, salt: str | None = None) -> int:
        asked = {"prompt_token_ids": prompt, "adapter": adapter, "cache_salt": salt}
        engine.add_request("one", asked, SamplingParams(max_tokens=1))
        (output,) = finish(engine)
        return int(output.num_cached_tokens)

    for adapter in NAMES:
        for salt in (None, "team"):
            assert cached(adapter, salt) == 0
            assert cached(adapter, salt) == len(prompt) - 1
    assert set(engine.tree.roots) == {None, "team", ("all", None), ("all", "team"), ("some", None), ("some", "team")}


def finish(engine: Engine) -> list[Any]:
    done: list[Any] = []
    while engine.has_unfinished_requests():
        done += engine.step()
    return done


@pytest.mark.parametrize("runner", ["transformers", "native"])
def test_scores_and_beams_are_those_of_merged_weights(runner: str, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    directory = write_adapter(tmp_path / "adapter", model)
    whole = merged(model, directory)
    adapter = load_adapter("adapter", directory, model)
    model.set_attn_implementation(IMPLEMENTATION)
    engine = Engine(make(runner, model, [adapter]), NumberTokenizer())
    prompt = list(range(5, 45))
    asked = {"prompt_token_ids": prompt, "adapter": "adapter"}
    engine.add_score("score", asked)
    engine.add_beam_search("beam", asked, BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True))
    engine.add_beam_search("other", {"prompt_token_ids": prompt}, BeamSearchParams(beam_width=3, max_tokens=5))
    done = {output.request_id: output for output in finish(engine)}
    expected = logprobs(whole, prompt)[torch.arange(39), torch.tensor(prompt[1:])]
    assert torch.allclose(torch.tensor(done["score"].token_logprobs[1:]), expected, atol=1e-3)
    best = generate(whole, prompt, max_new_tokens=5, min_new_tokens=5, num_beams=3, early_stopping=False)[0]
    assert done["beam"].sequences[0].token_ids == best[len(prompt) :].tolist()
    assert done["other"].sequences[0].token_ids != done["beam"].sequences[0].token_ids


def scores(runner: Runner, asked: list[str | None]) -> list[torch.Tensor]:
    """Log-likelihoods of a text with each adapter, computed in one step."""
    engine = Engine(runner, NumberTokenizer(), EngineOptions(sharing="off"))
    for number, adapter in enumerate(asked):
        engine.add_score(str(number), {"prompt_token_ids": list(range(40)), "adapter": adapter})
    done = {output.request_id: output for output in finish(engine)}
    return [torch.tensor(done[str(number)].token_logprobs[1:]) for number in range(len(asked))]


def int8(model: Any) -> Any:
    quantize(model, outliers="token")
    return model


@needs_native
@pytest.mark.parametrize("base", ["float32", "bfloat16", "int8"])
def test_rows_without_an_adapter_are_as_without_adapters(base: str, tmp_path: Path) -> None:
    """To the bit, whatever stands beside them; and a step of such rows alone adds nothing."""
    model = make_model("qwen2")
    adapter = load_adapter("adapter", write_adapter(tmp_path / "adapter", model), model)
    model = int8(model) if base == "int8" else model.to(getattr(torch, base))
    model.set_attn_implementation(IMPLEMENTATION)
    plain, adapted = make("native", model, []), make("native", model, [adapter])
    (expected,) = scores(plain, [None])
    assert "adapter" not in plain.profile()  # type: ignore[attr-defined]  # it is the native runner
    with_it, without = scores(adapted, ["adapter", None])
    assert torch.equal(without, expected) and not torch.allclose(with_it, expected, atol=0.5)
    assert torch.equal(scores(adapted, [None])[0], expected)


def int8_pair(directory: Path) -> tuple[Any, Any]:
    """A model with int8 layers, and the fp32 model that these stand for."""
    model = make_model("llama", tie_word_embeddings=False)
    quantized, dequantized = int8(copy.deepcopy(model)), model
    for name, module in quantized.named_modules():
        if isinstance(module, Int8Linear):
            dequantized.set_submodule(name, module.dequantize())
    return quantized, dequantized


def gguf_pair(directory: Path) -> tuple[Any, Any]:
    """A model whose weights are in the blocks of a GGUF file, and the fp32 model that these stand for."""
    source = export_model("llama", directory, hidden_size=256, intermediate_size=512)[1]
    file = store(source, directory / "mixed.gguf", q4_k_m)
    stored, _ = load_model(file, attn_implementation=IMPLEMENTATION, options=ModelOptions(weights="as-stored"))
    return stored, read_model(file)


@needs_native
@pytest.mark.parametrize("pair", [int8_pair, gguf_pair])
def test_adapters_stand_beside_quantized_weights(pair: Any, tmp_path: Path) -> None:
    """The answer is as near to that of merged weights as the base's own is to its: the adapter rounds nothing more."""
    quantized, dequantized = pair(tmp_path)
    directory = write_adapter(tmp_path / "adapter", dequantized, size=0.1)
    adapter = load_adapter("adapter", directory, quantized)
    quantized.set_attn_implementation(IMPLEMENTATION)
    got, own = scores(NativeRunner(quantized, max_rows=2048, adapters=[adapter]), ["adapter", None])
    text = list(range(40))
    places = torch.arange(39), torch.tensor(text[1:])
    expected, expected_own = logprobs(merged(dequantized, directory), text)[places], logprobs(dequantized, text)[places]
    effect = (expected - expected_own).abs().mean()
    assert (own - expected_own).abs().mean() < 0.1 * effect
    assert (got - expected).abs().mean() < 0.1 * effect


@needs_native
def test_answers_with_adapters_may_be_batch_invariant(tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    adapters = [
        load_adapter(name, write_adapter(tmp_path / name, model, rank=rank, seed=rank), model)
        for name, rank in (("a", 5), ("b", 40))
    ]
    model.set_attn_implementation(IMPLEMENTATION)
    runner = make("native", int8(model), adapters, batch_invariant=True)
    (alone,) = scores(runner, ["a"])
    for others in (["b", None], ["a", "a", "b"], [None]):
        assert torch.equal(scores(runner, [*others, "a"])[-1], alone)


def test_an_adapter_that_is_not_there_is_named(case: Any) -> None:
    model, adapters, _, _ = case
    engine = Engine(TransformersRunner(model, adapters), NumberTokenizer())
    with pytest.raises(InvalidPromptError, match="there is no adapter 'more'; there is all, some") as caught:
        engine.add_request("one", {"prompt_token_ids": [1], "adapter": "more"}, SamplingParams())
    assert caught.value.param == "adapter" and not engine.requests
    assert answers(engine, [("all", [1, 2, 3])])


@needs_native
def test_an_adapter_of_a_layer_that_is_put_in_another_order_is_not_left_out(tmp_path: Path) -> None:
    model = make_model("glm4")
    directory = write_adapter(tmp_path / "adapter", model, ("q_proj",))
    adapter = load_adapter("one", directory, model)
    model.set_attn_implementation(IMPLEMENTATION)
    with pytest.raises(UnsupportedModelError, match=r"q_proj, which is not packed as it is"):
        NativeRunner(model, max_rows=64, adapters=[adapter])
