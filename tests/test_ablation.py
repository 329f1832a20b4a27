"""Ablation: zeroing outlier features equals removing their weights, layer by layer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from gossamer import find_outliers
from gossamer.errors import ConfigurationError
from gossamer.report.ablation import ablate, passes
from gossamer.report.outliers import CONTRACTION, RESIDUAL
from gossamer.report.quality import evaluate
from outlier_models import TOKENS, WIDTH, group, hooks, plant, tiny_llama


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
    assert hooks(model) == 0 and model.config._attn_implementation == "sdpa"


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
