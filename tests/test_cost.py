"""The cost model: what is measured, what noise makes of it, and what follows."""

from __future__ import annotations

import math
import random
from dataclasses import astuple
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gossamer.engine.cost import MAX_FOLDED, CostModel, calibrate
from test_exactness import make
from test_native_runner import network

TRUTH = CostModel(call=3e-6, per_reader=4e-7, per_key=5e-9, per_pair=8e-9, per_private_pair=5e-8)


class Clock:
    """A runner whose attention takes as long as a cost model says, times noise."""

    def __init__(self, truth: CostModel, noise: float = 0.0, seed: int = 0) -> None:
        self.truth, self.noise, self.random = truth, noise, random.Random(seed)

    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        t = self.truth
        seconds = 1e-6 + 1e-7 * readers + t.per_private_pair * readers * own
        if common:
            seconds += t.call + t.per_reader * readers + t.per_key * common + t.per_pair * readers * common
        return seconds * (1 + self.noise * self.random.uniform(-1, 1))


def check(model: CostModel) -> None:
    """Finite, not negative, and what is worth a segment stays so for more readers and more keys."""
    assert all(math.isfinite(x) and x >= 0 for x in astuple(model))
    counts = [1, 2, 3, 8, 50, 400]
    for readers in counts:
        for keys in [1, 2, 10, 60, MAX_FOLDED, MAX_FOLDED + 1, 5000]:
            if model.worth_segment(readers, keys):
                assert model.worth_segment(readers, keys + 1) and model.worth_segment(readers + 1, keys)


def test_without_noise_the_coefficients_come_back() -> None:
    found = calibrate(Clock(TRUTH))  # type: ignore[arg-type]  # it is all of a runner that is used
    assert astuple(found) == pytest.approx(astuple(TRUTH), rel=1e-6)
    assert found.worth_segment(64, MAX_FOLDED) and not found.worth_segment(2, 1)


@given(
    st.tuples(*[st.floats(0, 1e-3)] * 5).map(lambda coefficients: CostModel(*coefficients)),
    st.floats(0, 1),
    st.integers(0, 2**32),
)
def test_whatever_is_measured_is_a_cost_model(truth: CostModel, noise: float, seed: int) -> None:
    check(calibrate(Clock(truth, noise, seed)))  # type: ignore[arg-type]  # as above


@pytest.mark.parametrize("kind", ["transformers", "native"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_what_runs_is_measured(kind: str, name: str) -> None:
    runner: Any = make(kind, network(name))
    models = [calibrate(runner) for _ in range(5)]  # other programs may disturb most of them
    for model in models:
        check(model)
        assert model.worth_segment(64, 4096)
    assert any(model.per_private_pair > 0 and not model.worth_segment(2, 1) for model in models)
    if kind == "native":  # PyTorch's calls cost more than so small a model could gain
        assert any(model.worth_segment(64, MAX_FOLDED) for model in models)


@pytest.mark.parametrize("kind", ["transformers", "native"])
def test_measuring_leaves_the_runner_as_it_was(kind: str) -> None:
    runner: Any = make(kind, network())
    before = {name: id(value) for name, value in vars(runner).items()}
    for readers, own, common in ((1, 1, 0), (1, 1, 1), (3, 5, 700), (40, 2, 33)):
        assert 0 < runner.attention_seconds(readers=readers, own=own, common=common) < 10
    assert {name: id(value) for name, value in vars(runner).items()} == before
