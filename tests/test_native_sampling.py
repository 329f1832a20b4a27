"""The native sampling kernel against its definition in fp64, and the sampler with it against the sampler without."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.engine.sampling import Sampler, SamplingState, make_random
from gossamer.engine.sampling import draw as draw_module
from gossamer.kernels.library import instruction_sets
from gossamer.kernels.sampling import can_sample, sample
from gossamer.sampling_params import SamplingParams

pytestmark = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")

ISAS = instruction_sets()
OFF = 2.0  # top_p
CLOSE = 1e-5  # of the whole mass: how far a boundary between two tokens may move
CLOSE_THRESHOLD = 1e-6  # and what top_p is compared with


@dataclass
class Row:
    """What one row asks for, as the kernel takes it."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = OFF
    min_p: float = 0.0
    uniform: float = 0.5


def draw(scores: Tensor, asked: list[Row], isa: str, threads: int = 1, rows: list[int] | None = None) -> list[int]:
    which = torch.arange(len(asked)) if rows is None else torch.tensor(rows)

    def column(name: str, dtype: torch.dtype) -> Tensor:
        return torch.tensor([[getattr(row, name)] for row in asked], dtype=dtype)

    f32, f64 = torch.float32, torch.float64
    tokens = sample(
        scores,
        which,
        scores[which].amax(-1, keepdim=True),
        column("temperature", f32),
        column("top_k", torch.int64),
        column("top_p", f64),
        column("min_p", f32),
        column("uniform", f64),
        isa=isa,
        threads=threads,
    )
    found: list[int] = tokens.tolist()
    return found


def kept_mass(logits: np.ndarray, row: Row, top_p: float, min_p: float) -> np.ndarray:
    """The mass of each token, 0 for those that are excluded: by sorting, in fp64."""
    mass = np.exp((logits - logits.max()) / np.float64(np.float32(row.temperature)))
    order = np.argsort(-logits, kind="stable")
    values, ranked = logits[order], mass[order]
    allowed = np.ones(len(values), bool)
    if 0 < row.top_k < len(values):
        allowed = values >= values[row.top_k - 1]
    ranked = ranked * allowed
    before = np.concatenate([[0.0], ranked.cumsum()[:-1]])
    kept = allowed & (ranked >= min_p)
    if row.top_p <= 1:
        kept &= before < top_p * ranked.sum()
    last = max(int(kept.sum()) - 1, 0)  # the first is always kept
    return mass * (logits >= values[last])


def is_right(logits: Tensor, row: Row, token: int) -> bool:
    """Whether inversion in fp64 gives ``token``, up to the rounding of the uniform number and thresholds."""
    values = logits.double().numpy()
    if not 0 <= token < len(values):
        return False
    min_p = float(np.float32(row.min_p))
    for shift in (0.0, -CLOSE_THRESHOLD, CLOSE_THRESHOLD):
        for other in {0.0, shift, -shift}:
            mass = kept_mass(values, row, row.top_p + shift, min_p * (1 + other))
            end = mass.cumsum() / mass.sum()
            start = end[token] - mass[token] / mass.sum()
            if mass[token] > 0 and start - CLOSE <= row.uniform <= end[token] + CLOSE:
                return True
    return False


def make_logits(shape: str, seed: int, vocabulary: int) -> Tensor:
    torch.manual_seed(seed)
    x = torch.randn(vocabulary)
    match shape:
        case "flat":
            x = x * 0.01
        case "language":
            x = x * 2.5 - 3
            x[torch.randint(vocabulary, (5,))] += 12
        case "peaked":
            x = x * 20
        case "ties":
            x = (x * 2).round()
        case "equal":
            x = torch.full((vocabulary,), 1.5)
        case "ascending":
            x = torch.arange(vocabulary) / vocabulary * 9
        case "excluded":
            x[torch.rand(vocabulary) < 0.9] = -torch.inf
            x[int(torch.randint(vocabulary, ()))] = 0.0
        case "lowest":
            x[torch.rand(vocabulary) < 0.5] = torch.finfo(torch.float32).min
        case "one":
            x = torch.full((vocabulary,), -torch.inf)
            x[int(torch.randint(vocabulary, ()))] = -7.0
    return x


SHAPES = ["flat", "language", "peaked", "ties", "equal", "ascending", "excluded", "lowest", "one"]
asked_rows = st.builds(
    Row,
    temperature=st.one_of(st.sampled_from([1.0, 0.7, 1e-3, 1.2e-38, 50.0, 1e30]), st.floats(0.2, 3.0)),
    top_k=st.sampled_from([0, 0, 1, 2, 5, 40, 64, 300, 1000, 4000, 10**6]),
    top_p=st.one_of(st.sampled_from([OFF, OFF, 1e-9, 0.5, 0.9, 0.95, 0.999, 1.0, 1 - 1e-12]), st.floats(0.01, 1.0)),
    min_p=st.one_of(st.sampled_from([0.0, 0.0, 1e-30, 0.02, 0.1, 0.5, 1.0]), st.floats(0.0, 1.0)),
    uniform=st.one_of(st.sampled_from([0.0, 1 - 2**-53]), st.floats(0.0, 1.0, exclude_max=True)),
)


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=250, deadline=None)
@given(
    asked=st.lists(asked_rows, min_size=1, max_size=5),
    shape=st.sampled_from(SHAPES),
    vocabulary=st.sampled_from([1, 2, 3, 15, 16, 17, 33, 255, 256, 257, 700, 1024, 5003]),
    threads=st.sampled_from([1, 2, 3]),
    seed=st.integers(0, 2**31),
)
def test_tokens_are_those_of_the_definition(
    isa: str, asked: list[Row], shape: str, vocabulary: int, threads: int, seed: int
) -> None:
    scores = torch.stack([make_logits(shape, seed + i, vocabulary) for i in range(len(asked))])
    for logits, row, token in zip(scores, asked, draw(scores, asked, isa, threads), strict=True):
        assert is_right(logits, row, token), (row, token)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", ["flat", "language", "peaked", "ties"])
def test_large_vocabularies(isa: str, shape: str) -> None:
    logits = make_logits(shape, 1, 49_153)
    choices: list[dict[str, Any]] = [{}, {"top_k": 50}, {"top_k": 20_000}, {"top_p": 0.9}, {"top_p": 0.99999}]
    choices += [{"min_p": 0.05}, {"top_k": 50, "top_p": 0.9}, {"top_k": 9000, "top_p": 0.8, "min_p": 0.01}]
    asked = [Row(temperature=t, uniform=u, **c) for c in choices for t in (0.8, 1.0) for u in (0.01, 0.6, 0.999)]
    scores = logits.expand(len(asked), -1).contiguous()
    for row, token in zip(asked, draw(scores, asked, isa, 2), strict=True):
        assert is_right(logits, row, token), (row, token)


@pytest.mark.parametrize("isa", ISAS)
def test_ties_with_the_last_kept_are_kept(isa: str) -> None:
    logits = torch.tensor([1.0, 1.0, 0.0, 1.0])
    uniforms = [0.1, 0.5, 0.9]
    for options in ({"top_k": 1}, {"top_p": 0.1}, {"min_p": 1.0}, {"top_k": 2, "top_p": 0.2}):
        asked = [Row(uniform=u, **options) for u in uniforms]
        assert draw(logits.expand(3, -1).contiguous(), asked, isa) == [0, 1, 3]


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_uniform_numbers_draw_tokens_with_mass(isa: str) -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 300:400] = 0.0
    for options in ({}, {"top_p": 0.999}, {"top_k": 600}, {"min_p": 0.5}):
        assert draw(logits, [Row(uniform=0.0, **options)], isa) == [300]
        assert draw(logits, [Row(uniform=1 - 2**-53, **options)], isa) == [399]


@pytest.mark.parametrize("isa", ISAS)
def test_rows_may_be_any_of_a_batch(isa: str) -> None:
    scores = torch.full((6, 300), -torch.inf)
    scores[torch.arange(6), torch.arange(6) * 7] = 0.0
    assert draw(scores, [Row()] * 3, isa, rows=[1, 4, 5]) == [7, 28, 35]
    assert draw(scores, [], isa) == []


def test_what_the_kernel_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_ISA", raising=False)
    assert can_sample(torch.zeros(2, 3))
    assert not can_sample(torch.zeros(2, 3, dtype=torch.bfloat16))
    assert not can_sample(torch.zeros(3, 2).T)
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    assert not can_sample(torch.zeros(2, 3))


@pytest.mark.parametrize("shape", ["language", "flat", "ties"])
def test_the_sampler_draws_what_it_draws_without_kernels(shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_ISA", raising=False)
    generator = random.Random(7)
    count = 1500
    params = [
        SamplingParams(
            temperature=generator.choice([0.3, 0.7, 1.0, 1.5]),
            top_k=generator.choice([0, 1, 20, 100, 1500]),
            top_p=generator.choice([1.0, 0.5, 0.9, 0.99]),
            min_p=generator.choice([0.0, 0.0, 0.02, 0.3]),
        )
        for _ in range(count)
    ]
    scores = torch.stack([make_logits(shape, i, 2003) for i in range(count)])

    def tokens() -> list[int]:
        states = [SamplingState(p, [], [], frozenset(), make_random(3, 0, i, 0)) for i, p in enumerate(params)]
        return Sampler().sample(scores, states).token_ids

    calls = []

    def counted(*arguments: Any) -> Tensor:
        calls.append(len(arguments[1]))
        return sample(*arguments)

    monkeypatch.setattr(draw_module, "sample", counted)
    native = tokens()
    assert calls == [count]
    monkeypatch.setenv("GOSSAMER_ISA", "reference")
    reference = tokens()
    assert calls == [count]
    different = [i for i in range(count) if native[i] != reference[i]]
    assert len(different) <= count // 300
    for i in different:
        p = params[i]
        row = Row(p.temperature, p.top_k, p.top_p if p.top_p < 1 else OFF, p.min_p, make_random(3, 0, i, 0).random())
        assert is_right(scores[i], row, native[i]) and is_right(scores[i], row, reference[i])
