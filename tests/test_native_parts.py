"""What the native runner finds in models of transformers: outputs taken apart, and experts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from architectures import make_model
from gossamer.errors import UnsupportedModelError
from gossamer.kernels.library import core
from gossamer.native.expert_packing import check_experts
from gossamer.native.weights import some_outputs
from gossamer.nn import Int8Linear, StoredLinear
from gossamer.options import RunnerOptions
from gossamer.runners.choose import make_runner
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import IMPLEMENTATION
from test_block_kernels import stored

needs_native = pytest.mark.skipif(core() is None, reason="without the native kernels")


def layers() -> list[Any]:
    plain = nn.Linear(64, 10)
    outliers = Int8Linear.from_linear(plain, outlier_columns=torch.tensor([3, 40]))
    blocks = StoredLinear(stored("Q4_0", 10, 64), nn.Parameter(torch.randn(10)))
    return [plain, nn.Linear(64, 10, bias=False), outliers, blocks]


@pytest.mark.parametrize("index", range(4))
def test_some_outputs_are_those_of_the_layer(index: int) -> None:
    layer, x = layers()[index], torch.randn(5, 64)
    rows = torch.tensor([7, 0, 3])
    assert torch.allclose(some_outputs(layer, rows)(x), layer(x)[:, rows], atol=1e-6)


def test_outputs_of_what_is_no_linear_layer_are_refused() -> None:
    layer = nn.Conv1d(1, 1, 1)
    layer.out_features = 1  # type: ignore[assignment]  a convolution has no such field
    with pytest.raises(UnsupportedModelError, match="Conv1d"):
        some_outputs(layer, torch.tensor([0]))


def replaced(model: Any) -> Any:
    model.set_attn_implementation(IMPLEMENTATION)
    return model


@needs_native
@pytest.mark.parametrize("damage", ["router", "down", "choice", "more"])
def test_experts_that_do_not_fit_are_told_with_the_reason(damage: str) -> None:
    model = make_model("qwen3_moe")
    mlp = model.model.layers[1].mlp
    if damage == "router":
        mlp.gate.weight = nn.Parameter(torch.randn(5, 48))
    elif damage == "down":
        mlp.experts.down_proj = nn.Parameter(torch.randn(4, 48, 23))
    elif damage == "choice":
        mlp.gate.top_k = 9
    else:
        mlp.experts.scale = nn.Parameter(torch.ones(4))
    with pytest.raises(UnsupportedModelError, match=r"fit together|weights that|does not compute a token"):
        NativeRunner(replaced(copy.deepcopy(model)), max_rows=8)
    if damage in ("down", "choice"):  # nothing can run it
        with pytest.raises(UnsupportedModelError, match="does not compute a token"):
            make_runner(replaced(model), RunnerOptions("auto"), max_rows=8)
        return
    made, note = make_runner(replaced(model), RunnerOptions("auto"), max_rows=8)
    assert made.name == "transformers" and ("fit together" in note or "weights that" in note)


@needs_native
def test_experts_do_not_depend_on_what_else_is_in_the_step() -> None:
    """Logits of one text, alone and among others, to the bit."""
    from gossamer.engine.engine import Engine
    from gossamer.options import EngineOptions
    from gossamer.sampling_params import SamplingParams
    from test_exactness import NumberTokenizer

    runner = NativeRunner(
        replaced(make_model("qwen2_moe")), RunnerOptions("native", batch_invariant=True), max_rows=512
    )
    found = []
    for others in (0, 5):
        engine = Engine(runner, NumberTokenizer(), EngineOptions())
        params = SamplingParams(temperature=0, max_tokens=6, logprobs=5, ignore_eos=True)
        for i in range(others + 1):
            prompt = [9, *range(20, 20 + 7 * i)] if i else [*range(3, 40)]
            engine.add_request(str(i), {"prompt_token_ids": prompt}, params)
        done = {}
        while engine.has_unfinished_requests():
            done |= {output.request_id: output for output in engine.step()}
        output = done["0"].outputs[0]  # type: ignore[union-attr]  it generates
        found.append([{token: each.logprob for token, each in step.items()} for step in output.logprobs or []])
    assert found[0] == found[1]


@needs_native
@pytest.mark.parametrize("outliers", ["token", None])
def test_int8_experts_are_near_those_in_floating_point(outliers: Any) -> None:
    """Packed experts of an int8 model are int8 too, each with a scale for every output."""
    from gossamer.models.quantize import quantize

    model = make_model("qwen2_moe", hidden_size=96, initializer_range=0.05)
    plain = NativeRunner(replaced(copy.deepcopy(model)), max_rows=64)
    quantize(model, outliers=outliers, skip=("lm_head",))
    int8 = NativeRunner(replaced(model), max_rows=64)
    experts = int8.decoder.layers[0].experts
    assert experts is not None and {each.type for each in experts.layers.gate_up} == {"int8"}
    found = [logits_of(runner, list(range(5, 40))) for runner in (plain, int8)]
    error = (found[0] - found[1]).norm() / found[0].norm()
    assert 0 < error < 0.05


def logits_of(runner: Any, prompt: list[int]) -> torch.Tensor:
    """Log-probabilities of a prompt's tokens."""
    from gossamer.engine.engine import Engine
    from test_exactness import NumberTokenizer

    engine = Engine(runner, NumberTokenizer())
    engine.add_score("0", {"prompt_token_ids": prompt})
    while engine.has_unfinished_requests():
        for output in engine.step():
            scores = output.token_logprobs  # type: ignore[union-attr]  it scores
    return torch.tensor(scores[1:])


@needs_native
def test_a_router_without_numbers_fails_its_request_alone() -> None:
    from gossamer.engine.engine import Engine
    from gossamer.options import EngineOptions
    from gossamer.sampling_params import SamplingParams
    from test_exactness import NumberTokenizer

    model = make_model("mixtral")
    with torch.no_grad():
        model.get_input_embeddings().weight[77] = torch.nan
    engine = Engine(NativeRunner(replaced(model), max_rows=64), NumberTokenizer(), EngineOptions())
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    engine.add_request("broken", {"prompt_token_ids": [5, 77, 6]}, params)
    engine.add_request("sound", {"prompt_token_ids": [8, 9, 6]}, params)
    done = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step()}
    assert done["broken"].error is not None and done["sound"].error is None


@needs_native
def test_routers_stay_in_floating_point_where_they_are_linear_layers() -> None:
    """As in Gemma 4: int8 changes the native runner's results no more than those of the runner of transformers."""
    from gossamer.models.quantize import quantize
    from gossamer.runners.transformers import TransformersRunner
    from test_native_runner import scores

    model = make_model("gemma4_experts", top_k_experts=4)  # all, or another choice would hide what is rounded
    report = quantize(model)
    assert report.skipped["model.layers.0.router.proj"] == "it chooses experts"
    model = replaced(model)
    expected = scores(TransformersRunner(model), range(1, 60))
    found = scores(NativeRunner(model, RunnerOptions(kv_dtype="float32"), max_rows=64), range(1, 60))
    assert (found - expected).abs().mean() < 0.2 * expected.std()


def test_experts_that_are_computed_in_another_way_are_refused() -> None:
    def broken(name: str, change: Callable[[Any], None]) -> str:
        mlp = make_model(name).model.layers[0].mlp
        change(mlp)
        with pytest.raises(UnsupportedModelError) as caught:
            check_experts(mlp, "router" if name == "gpt_oss" else "gate")
        return str(caught.value)

    assert "chooses its experts in a way" in broken("qwen2_moe", lambda mlp: delattr(mlp.gate, "top_k"))
    assert "a router of (4, 48) that chooses 5" in broken("qwen2_moe", lambda mlp: setattr(mlp.gate, "top_k", 5))
    more = torch.nn.Parameter(torch.zeros(5, 48))
    assert "a router of (5, 48)" in broken("qwen2_moe", lambda mlp: setattr(mlp.gate, "weight", more))
    assert "has weights that the native" in broken("qwen2_moe", lambda mlp: setattr(mlp.gate, "tilt", more))
    assert "the gate of a GptOssExperts" in broken("gpt_oss", lambda mlp: setattr(mlp.experts, "alpha", 1.5))
