"""Outlier features: what was planted is found, counting equals brute force, zeroing equals removing weights."""

from __future__ import annotations

import copy
import json
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import gossamer
import gossamer.report.outliers as outliers_module
from architectures import ARCHITECTURES, VOCAB, make_model
from gossamer import find_outliers
from gossamer.cli.app import app
from gossamer.cli.inspect import memory_by_scheme
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.models.load import load_model
from gossamer.report import html
from gossamer.report.ablation import ablate, passes
from gossamer.report.outliers import CONTRACTION, RESIDUAL, FeatureGroup, OutlierReport
from gossamer.report.quality import evaluate
from gossamer.texts import token_windows
from html_page import Page

LAYERS, WIDTH, TOKENS = 8, 32, 64


def group(report: OutlierReport, name: str) -> FeatureGroup:
    return next(each for each in report.groups if each.name == name)


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes)))
    return model.eval().requires_grad_(False)


def plant(dimension: int, sign: int, layers: list[int], tokens: list[int]) -> Any:
    """A model whose attention inputs have an outlier in this dimension, in these layers and at these tokens, only.

    The dimension passes through the residual stream unchanged, as nothing writes to it, and is large in the embeddings
    of the tokens. RMSNorm brings it to at most sqrt(WIDTH) = 5.7; the gain of the layers lifts that over 6.
    """
    model = tiny_llama()
    model.model.embed_tokens.weight[:, dimension] = 0.0
    model.model.embed_tokens.weight[tokens, dimension] = 50.0
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight[dimension] = 0.0
        layer.mlp.down_proj.weight[dimension] = 0.0
        layer.input_layernorm.weight[dimension] = sign * (2.0 if number in layers else 0.5)
        layer.post_attention_layernorm.weight[dimension] = 0.1
    return model


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
    _assert_close(together, apart)


def _assert_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_close(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            _assert_close(*pair)
    else:
        assert one == pytest.approx(other, rel=1e-4) if isinstance(one, float) else one == other


# --- which layers share an input -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_linear_layer_has_one_input(name: str) -> None:
    model = make_model(name)
    report = find_outliers(model, [torch.randint(VOCAB, (9,))])
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    reached = [path for each in report.inputs for path in each.modules]
    packed = [path for path in reached if path.endswith("experts")]
    assert sorted(reached) == sorted(linear + packed)
    assert sorted(report.unseen) == sorted(f"{path} (inside)" for path in packed)
    for number in range(2):
        of_layer = [each for each in report.inputs if each.layer == number]
        contractions = [each for each in of_layer if each.group == CONTRACTION]
        if packed:
            assert not contractions
        else:
            (contraction,) = contractions
            (path,) = contraction.modules
            assert path.rpartition(".")[2] in ("down_proj", "c_proj", "fc2", "dense_4h_to_h") and "attn" not in path
        # query, key and value get the same tensor, as do gate and up
        (attention,) = [each for each in of_layer if any(p in each.label for p in ("q_proj", "qkv", "query", "c_attn"))]
        assert attention.group == RESIDUAL
        assert "k_proj" not in str(linear) or "k_proj" in attention.label
    (head,) = [each for each in report.inputs if each.layer is None]
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
    assert _hooks(model) == 0


def _hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())


# --- ablation --------------------------------------------------------------------------------------------------------


def _without_columns(model: Any, names: list[str], dimensions: tuple[int, ...]) -> Any:
    """Zero in an input and no weight for it are the same."""
    edited = copy.deepcopy(model)
    for name in names:
        edited.get_submodule(name).weight[:, list(dimensions)] = 0.0
    return edited


@pytest.mark.parametrize("where", [RESIDUAL, CONTRACTION])
def test_zeroing_an_input_equals_zeroing_the_weights(where: str) -> None:
    model = tiny_llama(num_hidden_layers=1, initializer_range=0.3)
    windows = list(torch.randint(TOKENS, (3, 20)))
    shares = [feature.tokens for feature in group(find_outliers(model, windows, 2.0, 0.0, 0.0), where).features]
    report = find_outliers(model, windows, 2.0, 0.0, tokens=shares[1])
    seen: list[int] = []
    ablations = ablate(model, windows, report, draws=2, progress=seen.append)
    assert seen == list(range(1, passes(report, 3, draws=2) + 1))
    (ablation,) = [each for each in ablations if each.group == where]
    names = [path for each in report.inputs if each.group == where for path in each.modules]
    features = {feature.dimension for feature in group(report, where).features}
    assert set(ablation.features.dimensions) == features
    for effect in (ablation.intact, ablation.features, *ablation.random):
        edited = _without_columns(model, names, effect.dimensions)
        assert effect.perplexity == pytest.approx(evaluate(edited, windows).perplexity, rel=1e-5)
        edited.set_attn_implementation("eager")
        outputs = [edited(input_ids=window[None], output_attentions=True) for window in windows]
        top1 = torch.cat([o.logits[0, :-1].softmax(-1).amax(-1) for o in outputs]).mean()
        assert effect.top1 == pytest.approx(float(top1), rel=1e-5)
        attention = torch.cat([o.attentions[0].amax(-1) for o in outputs]).mean()
        expected = pytest.approx(float(attention), rel=1e-5) if where == RESIDUAL else None
        assert effect.attention_top1 == expected
    for effect in ablation.random:
        assert len(effect.dimensions) == len(features) and not features & set(effect.dimensions)


def test_attention_is_measured_layer_by_layer() -> None:
    """Layers do not see what was zeroed in the layers before them."""
    model = tiny_llama(num_hidden_layers=2, initializer_range=0.3)
    window = torch.randint(TOKENS, (20,))
    report = find_outliers(model, [window], magnitude=2.5, layers=0.0, tokens=0.4)
    (ablation,) = [each for each in ablate(model, [window], report) if each.group == RESIDUAL]
    names = [path for each in report.inputs if each.group == RESIDUAL for path in each.modules]
    expected = []
    for layer in range(2):
        own = [name for name in names if name.startswith(f"model.layers.{layer}.self_attn")]
        edited = _without_columns(model, own, ablation.features.dimensions)
        edited.set_attn_implementation("eager")
        expected.append(edited(input_ids=window[None], output_attentions=True).attentions[layer].amax(-1).mean())
    assert ablation.features.attention_top1 == pytest.approx(float(sum(expected)) / 2, rel=1e-5)


def test_ablation_leaves_the_model_as_it_was() -> None:
    model = plant(5, 1, [1, 2], list(range(TOKENS)))
    model.set_attn_implementation("sdpa")
    ids = torch.arange(40)
    before = model(input_ids=ids[None]).logits
    report = find_outliers(model, [ids])
    first, again = ablate(model, [ids], report), ablate(model, [ids], report)
    assert first == again != ablate(model, [ids], report, seed=1)
    assert torch.equal(model(input_ids=ids[None]).logits, before)
    assert _hooks(model) == 0 and model.config._attn_implementation == "sdpa"


def test_nothing_is_ablated_without_features_or_with_too_many() -> None:
    model, ids = tiny_llama(), torch.arange(40)
    none, all_of_them = (find_outliers(model, [ids], m, layers=0.0, tokens=0.0) for m in (1e6, 1e-6))
    assert group(none, RESIDUAL).nearest is None and not group(none, RESIDUAL).features
    assert len(group(all_of_them, RESIDUAL).features) == WIDTH
    for report in (none, all_of_them):
        assert passes(report, 3) == 0 and ablate(model, [ids], report) == ()
    with pytest.raises(ConfigurationError):
        ablate(model, [], none)
    with pytest.raises(ConfigurationError):
        ablate(model, [ids], none, draws=0)


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


# --- the report ------------------------------------------------------------------------------------------------------


def test_page_is_whole_by_itself_and_shows_every_input() -> None:
    model = plant(5, -1, [1, 2, 3], list(range(TOKENS)))
    ids = torch.arange(40)
    report = find_outliers(model, [ids])
    ablations = ablate(model, [ids], report)
    source = html.render(report, ablations, memory_by_scheme(model), model="<b>&model", text="a & b")
    page = Page(source)
    assert page.links == ["https://arxiv.org/abs/2208.07339"]  # for the reader, not for the page
    assert "<b>&model" in page.text and "<b>&model" not in source
    assert source.count("<svg") == len({each.label for each in report.inputs if each.layer is not None}) == 4
    assert source.count("<title>layer") == 4 * LAYERS
    assert f"{ablations[0].features.perplexity:,.2f}" in page.text
    assert "prefers-color-scheme: dark" in source


def test_page_of_a_model_where_everything_is_large() -> None:
    model = tiny_llama(hidden_size=64)
    report = find_outliers(model, [torch.arange(40)], magnitude=1e-6)
    source = html.render(report, (), memory_by_scheme(model), model="m", text="t")
    assert "and 44 more" in Page(source).text
    assert "64 of the 64 dimensions (residual width) are features" in Page(source).text


def test_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    html.write(path, "old")
    html.write(path, "new")
    assert path.read_text() == "new"

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(html.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        html.write(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def arguments(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return [str(tiny), "--text", str(text), "--window", "50", "--magnitude", "2.9"]


def test_command_as_json(arguments: list[str], tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = json.loads(invoke(*arguments, "--tokens", "0.5", "--json", "--html", page).stdout)
    model, tokenizer = load_model(tiny)
    expected = find_outliers(model, token_windows(tokenizer, Path(arguments[2]).read_text(), 50, 4), 2.9, 0.25, 0.5)
    _assert_close({key: result[key] for key in expected.to_dict()}, json.loads(json.dumps(expected.to_dict())))
    assert any(found["features"] for found in result["groups"]) and result["ablation"]
    assert result["windows"] == 4 and result["memory"]["linear layers"]["fp32"] > 0
    Page(page.read_text())


def test_command_as_tables(arguments: list[str]) -> None:
    shown = invoke(*arguments, "--no-ablation").stdout
    assert "feed-forward contraction" in shown and "mlp.down_proj" in shown and "linear layers" in shown
    assert "Without the features" not in shown
    assert "no outlier" in invoke(*arguments[:-1], "1000").stdout


@pytest.mark.parametrize("path", ["/no/such/directory/report.html", "/"])
def test_a_report_that_cannot_be_written_is_said_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.models.load.load_model", lambda *arguments, **others: pytest.fail("loaded"))
    result = invoke("smollm2-135m", "--html", path)
    assert isinstance(result.exception, ConfigurationError)


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
