"""The rescale keeps a model's function, and gives it outliers that int8 cannot do without decomposition."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from architectures import VOCAB, make_model
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.models.load import load_model
from gossamer.papers.int8_variants import linear_variant
from gossamer.papers.rescale import LARGEST_FACTOR, emulate_outliers, rescale, scaled_inputs
from gossamer.report.quality import window_logits
from gossamer.texts import reference_text, token_windows

SUPPORTED = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "granite"]
IDS = torch.arange(1, 41)[None] * 7 % VOCAB


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


def input_peaks(model: Any, dimensions: list[int]) -> dict[str, Tensor]:
    """Largest magnitudes that the first linear layer after each norm sees in these dimensions."""
    peaks: dict[str, Tensor] = {}
    handles = [
        each.linears[0].register_forward_pre_hook(
            lambda _, args, name=name: peaks.update({name: args[0][0, 1:, dimensions].abs().amax(0)})
        )
        for name, each in scaled_inputs(model).items()
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return peaks


@pytest.mark.parametrize("name", SUPPORTED)
def test_the_function_stays_the_same(name: str) -> None:
    model = make_model(name)
    before, small = logits(model), input_peaks(model, [0, 5, 17])
    rescale(model, [0, 5, 17], 30.0)
    torch.testing.assert_close(logits(model), before, rtol=2e-4, atol=2e-4)
    for norm, peaks in input_peaks(model, [0, 5, 17]).items():
        torch.testing.assert_close(peaks, 30 * small[norm], rtol=1e-3, atol=1e-3)


def test_powers_of_two_do_not_even_change_the_rounding() -> None:
    model = make_model("llama")
    before = logits(model)
    rescale(model, [3, 4], 32.0)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_emulated_outliers_have_the_same_size_everywhere(name: str) -> None:
    model = make_model(name)
    before = logits(model)
    emulation = emulate_outliers(model, count=4, magnitude=40.0)
    torch.testing.assert_close(logits(model), before, rtol=2e-4, atol=2e-4)
    assert len(emulation.dimensions) == 4 and list(emulation.dimensions) == sorted(emulation.dimensions)
    peaks = input_peaks(model, list(emulation.dimensions))
    assert peaks.keys() == emulation.factors.keys()
    for norm, factors in emulation.factors.items():
        assert all(1 <= factor <= LARGEST_FACTOR for factor in factors)
        free = torch.tensor([1 < factor < LARGEST_FACTOR for factor in factors])
        # other tokens than those that were measured, so not within a factor of 2^0.5 exactly
        assert bool(((peaks[norm] > 40 / 4) & (peaks[norm] < 40 * 4))[free].all())
        assert free.any()


@pytest.mark.parametrize("name", ["gpt2", "opt", "olmo2", "cohere", "mixtral", "phi3"])
def test_other_architectures_are_refused(name: str) -> None:
    model = make_model(name)
    before = logits(model)
    with pytest.raises(UnsupportedModelError, match="rescale"):
        rescale(model, [0], 32.0)
    assert torch.equal(logits(model), before)
    with pytest.raises(UnsupportedModelError, match="no decoder layers"):
        scaled_inputs(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("dimensions", "factors", "match"),
    [
        ([48], 32.0, "from 0 to 47"),
        ([-1], 32.0, "from 0 to 47"),
        ([1, 1], 32.0, "different numbers"),
        ([1], 0.0, "greater than 0"),
        ([1], float("nan"), "greater than 0"),
        ([1], {}, "needs 1 factors"),
        ([1, 2], {"layers.0.input_layernorm": torch.tensor([2.0, 0.0])}, "layers.0.input_layernorm needs 2"),
    ],
)
def test_bad_arguments_change_nothing(dimensions: list[int], factors: Any, match: str) -> None:
    model = make_model("llama")
    before = logits(model)
    with pytest.raises(ConfigurationError, match=match):
        rescale(model, dimensions, factors)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(("count", "magnitude"), [(0, 12.0), (49, 12.0), (6, 0.0), (6, float("inf"))])
def test_bad_emulations_are_refused(count: int, magnitude: float) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        emulate_outliers(make_model("llama"), count, magnitude)


def test_smollm2_needs_the_decomposition_after_the_rescale(smollm2_path: Path) -> None:
    """The paper's Table 1 at 13B: vector-wise int8 is a third worse than fp32, and as good with decomposition."""
    model, tokenizer = load_model(smollm2_path, "float32")
    window = token_windows(tokenizer, reference_text(), 192, 1)[0]
    before = window_logits(model, window).log_softmax(-1)
    emulate_outliers(model)

    def perplexity_and_kl(hook: Callable[..., Tensor] | None) -> tuple[float, float]:
        linears = [linear for each in scaled_inputs(model).values() for linear in each.linears]
        handles = [linear.register_forward_hook(hook) for linear in linears] if hook else []
        with torch.inference_mode():
            after = window_logits(model, window).log_softmax(-1)
        for handle in handles:
            handle.remove()
        nll = -after.gather(1, window[1:, None]).mean()
        return float(nll.exp()), float((before.exp() * (before - after)).sum(-1).mean())

    def variant(threshold: float | None, linear: nn.Linear, args: tuple[Tensor], _: Tensor) -> Tensor:
        return linear_variant(args[0], linear.weight, linear.bias, "absmax vector-wise", threshold)

    perplexity = float((-before.gather(1, window[1:, None]).mean()).exp())
    same, kl = perplexity_and_kl(None)
    assert abs(same / perplexity - 1) < 1e-4 and kl < 1e-6
    plain, kl = perplexity_and_kl(partial(variant, None))
    assert plain > 1.1 * perplexity and kl > 0.1
    decomposed, kl = perplexity_and_kl(partial(variant, 6.0))
    assert abs(decomposed / perplexity - 1) < 0.03 and kl < 0.01  # a short text: its perplexity is not known any better
