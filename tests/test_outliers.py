"""Outlier features: what was planted is found, counting equals brute force, zeroing equals removing weights."""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import gossamer
import gossamer.report.outliers as outliers_module
from architectures import ARCHITECTURES, VOCAB, make_model
from gossamer import find_outliers
from gossamer.cli.inspect import memory_by_scheme
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.models.load import load_model
from gossamer.report.ablation import ablate
from gossamer.report.outliers import CONTRACTION, RESIDUAL
from gossamer.texts import token_windows
from outlier_models import LAYERS, TOKENS, WIDTH, assert_close, group, hooks, plant, tiny_llama

# --- finding ---------------------------------------------------------------------------------------------------------


@settings(max_examples=12, deadline=None)
@given(
    dimension=st.integers(0, WIDTH - 1),
    sign=st.sampled_from([-1, 1]),
    layers=st.sets(st.integers(0, LAYERS - 1), min_size=1),
    affected=st.integers(1, 40),
)
def test_what_was_planted_is_found(dimension: int, sign: int, layers: set[int], affected: int) -> None:
    ids = torch.arange(40)
    model = plant(dimension, sign, sorted(layers), list(range(affected)))
    report = find_outliers(model, [ids])
    found = group(report, RESIDUAL)
    meets = len(layers) / LAYERS >= 0.25 and affected / 40 >= 0.06
    assert [feature.dimension for feature in found.features] == ([dimension] if meets else [])
    feature = found.features[0] if meets else found.nearest
    assert feature is not None and feature.dimension == dimension
    assert feature.layers == len(layers) / LAYERS and feature.tokens == affected / 40
    # Each of the three inputs of a layer counts as values, two of them never have an outlier.
    assert feature.values == pytest.approx(len(layers) * affected / (3 * LAYERS * 40))
    assert feature.one_sided and feature.positive == (sign > 0)
    assert feature.quartiles == pytest.approx([sign * 2 * math.sqrt(WIDTH)] * 3, rel=0.02)
    for each in report.inputs:
        if each.label == "self_attn.q_proj/k_proj/v_proj":
            assert each.tokens == (affected / 40 if each.layer in layers else 0)
            assert each.dimensions == (each.layer in layers)


def test_a_position_counts_once_and_a_layer_counts_once() -> None:
    """Halves of the tokens are affected in different layers: 50 % of all states, but every position."""
    ids = torch.arange(40)
    model = plant(5, 1, [], list(range(40)))
    report = find_outliers(model, [ids], magnitude=0.5, layers=0.0, tokens=0.0)
    feature = next(each for each in group(report, RESIDUAL).features if each.dimension == 5)
    assert feature.tokens == feature.layers == 1.0


def test_a_feature_with_both_signs_is_not_one_sided() -> None:
    ids = torch.arange(40)
    model = plant(5, 1, list(range(LAYERS)), list(range(40)))
    model.model.embed_tokens.weight[:10, 5] = -50.0
    (feature,) = group(find_outliers(model, [ids]), RESIDUAL).features
    assert not feature.one_sided and feature.positive == 0.75
    assert feature.quartiles[0] < 0 < feature.quartiles[2] or feature.quartiles[0] > 0  # a quarter is negative
    assert min(feature.quartiles) == pytest.approx(-2 * math.sqrt(WIDTH), rel=0.02)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "qwen3", "cohere", "mixtral"])
@pytest.mark.parametrize("chunk", [64, 1 << 22])
def test_counting_equals_brute_force(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against every input of every layer stored whole, and the definitions applied to them."""
    monkeypatch.setattr(outliers_module, "CHUNK", chunk)
    model = make_model(name)
    batches = [torch.randint(VOCAB, (2, 17)), torch.randint(VOCAB, (23,))]
    magnitude, layers, tokens = 2.0, 1.0, 0.3
    report = find_outliers(model, iter(batches), magnitude, layers, tokens)
    states = {each.modules: _stored(model, each.modules, batches) for each in report.inputs}
    assert report.positions == 57
    for each in report.inputs:
        x = states[each.modules]
        large = x.abs() >= magnitude
        assert x.shape == (57, each.width)
        assert each.dimensions == int(large.any(0).sum())
        assert each.tokens == pytest.approx(float(large.any(1).float().mean()))
        assert each.values == pytest.approx(float(large.float().mean()), rel=1e-5)
        assert each.largest == float(x.abs().max())
        assert each.mean == pytest.approx(float(x.abs().mean()), rel=1e-5)
        assert each.top_tokens == pytest.approx(float(large.float().mean(0).max()))
    for found in report.groups:
        by_layer = defaultdict(list)
        for each in report.inputs:
            if (each.group, each.width) == (found.name, found.width):
                by_layer[each.layer].append(states[each.modules])
        stacked = torch.stack([torch.stack(xs) for xs in by_layer.values()])  # (layers, inputs, tokens, dimensions)
        large = stacked.abs() >= magnitude
        of_layers, of_tokens = large.any(2).any(1).double().mean(0), large.any(0).any(0).double().mean(0)
        expected = {int(i) for i in ((of_layers >= layers) & (of_tokens >= tokens)).nonzero()}
        assert {feature.dimension for feature in found.features} == expected
        for feature in found.features:
            values = stacked[..., feature.dimension][large[..., feature.dimension]]
            assert feature.tokens == pytest.approx(float(of_tokens[feature.dimension]))
            assert feature.values == pytest.approx(float(large[..., feature.dimension].float().mean()), rel=1e-5)
            quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]), interpolation="lower")
            higher = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75]), interpolation="higher")
            for bounds, quartile in zip(zip(quartiles, higher, strict=True), feature.quartiles, strict=True):
                assert bounds[0] - 0.011 * abs(bounds[0]) <= quartile <= bounds[1] + 0.011 * abs(bounds[1])
            assert feature.positive == pytest.approx(float((values > 0).float().mean()))


def _stored(model: Any, modules: tuple[str, ...], batches: list[Tensor]) -> Tensor:
    """The whole input of a module, (tokens, width); all modules of an input must have the same."""
    found: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, kept=kept: kept.append(args[0].flatten(0, -2))
        )
        for name, kept in found.items()
    ]
    for ids in batches:
        model(input_ids=ids.reshape(-1, ids.shape[-1]), use_cache=False)
    for hook in hooks:
        hook.remove()
    first, *others = (torch.cat(kept) for kept in found.values())
    assert all(torch.equal(first, other) for other in others)
    return first


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(1, 4), length=st.integers(1, 12), seed=st.integers(0, 99))
def test_batching_changes_nothing(rows: int, length: int, seed: int) -> None:
    model = make_model("llama")
    ids = torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
    together, apart = find_outliers(model, [ids], 1.5).to_dict(), find_outliers(model, list(ids), 1.5).to_dict()
    assert_close(together, apart)


# --- which layers share an input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_has_one_input(name: str) -> None:
    model = make_model(name)
    report = find_outliers(model, [torch.randint(VOCAB, (9,))])
    linear = [path for path, module in model.named_modules() if type(module) in (nn.Linear, Conv1D)]
    reached = [path for each in report.inputs for path in each.modules]
    packed = [path for path in reached if path.endswith("experts")]
    assert sorted(reached) == sorted(linear + packed)
    assert sorted(report.unseen) == sorted(f"{path} (inside)" for path in packed)
    for number in range(2):
        of_layer = [each for each in report.inputs if each.layer == number]
        contractions = [each for each in of_layer if each.group == CONTRACTION and "per_layer" not in each.label]
        beside = [".mlp.down_proj" in path for each in contractions for path in each.modules] == [True]
        if any(f".{number}." in path for path in packed) and not beside:
            assert all("shared_expert" in each.label for each in contractions)
        else:
            (contraction,) = contractions
            (path,) = contraction.modules
            assert path.rpartition(".")[2] in ("down_proj", "c_proj", "fc2", "dense_4h_to_h") and "attn" not in path
        # query, key and value get the same tensor, as do gate and up
        (attention,) = [each for each in of_layer if any(p in each.label for p in ("q_proj", "qkv", "query", "c_attn"))]
        assert attention.group == RESIDUAL
        assert "k_proj" not in str(linear) or "k_proj" in attention.label
    (head,) = [each for each in report.inputs if each.layer is None and "per_layer" not in each.label]
    assert head.modules == ("lm_head",) and head.group is None


def test_width_decides_with_what_the_output_projection_is_examined() -> None:
    same, wider = (find_outliers(make_model(name), [torch.randint(VOCAB, (9,))]) for name in ("llama", "qwen3"))
    assert "self_attn.o_proj" in group(same, RESIDUAL).labels
    assert "self_attn.o_proj" not in group(wider, RESIDUAL).labels
    assert group(wider, "self_attn.o_proj").width == 64


class Int8(nn.Module):
    """What Gossamer's int8 layer has, as far as the report goes: int8 codes, in_features, out_features."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("weight", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.scale).T


def test_int8_layers_are_seen() -> None:
    model = plant(5, 1, [1, 2], list(range(TOKENS)))
    floats = find_outliers(model, [torch.arange(40)])
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            model.set_submodule(name, Int8(module))
    codes = find_outliers(model, [torch.arange(40)])
    assert [each.modules for each in codes.inputs] == [each.modules for each in floats.inputs]
    assert [each.dimension for each in group(codes, RESIDUAL).features] == [5]
    assert memory_by_scheme(model) == memory_by_scheme(plant(5, 1, [1, 2], [0]))


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"magnitude": 0}, "magnitude"),
        ({"magnitude": math.nan}, "magnitude"),
        ({"layers": 1.1}, "shares"),
        ({"tokens": -0.1}, "shares"),
        ({"batches": []}, "no text"),
        ({"batches": [torch.arange(5), torch.arange(257)]}, "batch 1 has 257 tokens"),
        ({"batches": [torch.rand(3)]}, "integer"),
        ({"batches": [torch.tensor([], dtype=torch.int64)]}, "0 tokens"),
        ({"batches": [torch.tensor([TOKENS])]}, f"token id {TOKENS}"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        find_outliers(tiny_llama(), **({"batches": [torch.arange(5)]} | arguments))


def test_values_that_are_not_finite_are_an_error_and_leave_no_hooks() -> None:
    model = tiny_llama()
    model.model.layers[3].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(GossamerError, match=r"model.layers.3.mlp.down_proj is not finite"):
        find_outliers(model, [torch.arange(5)])
    assert hooks(model) == 0


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_memory_by_scheme(tied: bool) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    outputs = LAYERS * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    linear = LAYERS * (32 * (32 + 16 + 16 + 32) + 32 * 48 * 3)
    embeddings = TOKENS * WIDTH * (1 if tied else 2)
    rest = WIDTH * (2 * LAYERS + 1)
    assert memory_by_scheme(model) == {
        "linear layers": {"fp32": 4 * linear, "bf16": 2 * linear, "int8": linear + 4 * outputs},
        "embeddings and output head": {"fp32": 4 * embeddings, "bf16": 2 * embeddings, "int8": 2 * embeddings},
        "everything else": {"fp32": 4 * rest, "bf16": 2 * rest, "int8": 2 * rest},
    }


@pytest.mark.parametrize("name", ["gpt2", "mixtral", "gemma3"])
def test_memory_counts_every_parameter_once(name: str) -> None:
    model = make_model(name)
    sizes = memory_by_scheme(model)
    assert sum(part["fp32"] for part in sizes.values()) == 4 * sum(p.numel() for p in model.parameters())
    assert ("packed experts" in sizes) == (name == "mixtral")


def test_public_name() -> None:
    assert gossamer.find_outliers is outliers_module.find_outliers


# --- a real model ----------------------------------------------------------------------------------------------------


def test_smollm2_has_one_outlier_feature(smollm2_path: Path) -> None:
    """As the paper found in models of its size: one dimension, one-sided, that attention depends on."""
    from gossamer.texts import reference_text

    model, tokenizer = load_model(smollm2_path, dtype="float32")
    windows = token_windows(tokenizer, reference_text(), 128, 1)
    report = find_outliers(model, windows)
    (feature,) = group(report, RESIDUAL).features
    assert feature.dimension == 247 and feature.one_sided and feature.positive == 0
    assert 0.35 <= feature.layers <= 0.5 and feature.tokens > 0.9
    assert not group(report, CONTRACTION).features
    (ablation,) = ablate(model, windows, report, draws=1)
    assert ablation.features.perplexity > 4 * ablation.intact.perplexity
    assert ablation.random[0].perplexity < 1.1 * ablation.intact.perplexity
    assert ablation.features.attention_top1 < 0.7 * ablation.intact.attention_top1  # type: ignore[operator]
