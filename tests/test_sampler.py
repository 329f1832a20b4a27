"""The sampler against transformers' definitions, the exact probabilities, and its promises about batches."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from forked import run_program
from gossamer.engine.sampling import Sampler, SamplingState, make_random, token_logprobs, top_logprobs
from gossamer.engine.sampling.adjustments import adjust_
from gossamer.engine.sampling.rows import largest
from gossamer.sampling_params import SamplingParams

seeds = st.integers(0, 2**31 - 1)


class Always(random.Random):
    """A stream that repeats one number."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def random(self) -> float:
        return self.value


def make_state(
    params: SamplingParams,
    prompt: list[int] | None = None,
    output: list[int] | None = None,
    stop: frozenset[int] = frozenset(),
    stream: random.Random | None = None,
) -> SamplingState:
    stream = stream or make_random(0, 0, 0, 0)
    return SamplingState(params, prompt or [], output if output is not None else [], stop, stream)


def make_logits(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def frequencies(logits: Tensor, params: SamplingParams, count: int = 512) -> Tensor:
    """Shares of the tokens (V,) over evenly spaced random numbers: the sampler's probabilities to 1 / count."""
    states = [make_state(params, stream=Always((i + 0.5) / count)) for i in range(count)]
    tokens = Sampler().sample(logits.expand(count, -1).contiguous(), states).token_ids
    return torch.bincount(torch.tensor(tokens), minlength=len(logits)) / count


@given(
    seed=seeds,
    vocabulary=st.sampled_from([5, 100, 3001]),
    temperature=st.floats(0.3, 3.0),
    top_k=st.sampled_from([0, 1, 4, 50, 63, 64, 90, 5000]),
    top_p=st.sampled_from([1.0, 0.01, 0.5, 0.9, 0.999]),
    min_p=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_probabilities_equal_those_of_transformers(
    seed: int, vocabulary: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = make_logits(seed, vocabulary)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        probabilities = warpers(None, logits[None]).double().softmax(-1).sort(descending=True).values
        # Where a cumulative probability equals top_p to rounding, either side is right.
        assume(float((probabilities.cumsum(-1) - top_p).abs().min()) > 1e-5)
        warpers.append(TopPLogitsWarper(top_p))
    if min_p > 0:
        probabilities = warpers(None, logits[None]).double().softmax(-1)
        ratios = probabilities / probabilities.max()
        assume(float((ratios[ratios < 1] - min_p).abs().min()) > 1e-5)
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(None, logits[None]).softmax(-1)[0]
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    shares = frequencies(logits, params)
    assert (shares - expected).abs().max() <= 1.1 / 512
    assert not shares[expected == 0].any()


@given(seed=seeds, penalty=st.floats(0.3, 3.0), prompt_length=st.integers(0, 40), output_length=st.integers(0, 40))
@settings(max_examples=40, deadline=None)
def test_repetition_penalty_equals_that_of_transformers(
    seed: int, penalty: float, prompt_length: int, output_length: int
) -> None:
    generator = random.Random(seed)
    prompt = [generator.randrange(50) for _ in range(prompt_length)]
    output = [generator.randrange(50) for _ in range(output_length)]
    assume(prompt or output)
    logits = make_logits(seed, 1, 50)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([prompt + output]), logits.clone())
    adjust_(logits, [make_state(SamplingParams(repetition_penalty=penalty), prompt, output)])
    torch.testing.assert_close(logits, expected)


@given(seed=seeds, presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
@settings(max_examples=30, deadline=None)
def test_presence_and_frequency_penalties_count_the_output_only(seed: int, presence: float, frequency: float) -> None:
    generator = random.Random(seed)
    output: list[int] = []
    params = SamplingParams(presence_penalty=presence, frequency_penalty=frequency)
    state = make_state(params, prompt=[1, 2, 3], output=output)
    for _ in range(3):  # the output grows between the steps
        output.extend(generator.randrange(20) for _ in range(5))
        counts = torch.bincount(torch.tensor(output), minlength=20)
        logits = make_logits(seed, 2, 20)
        expected = logits.clone()
        expected[1] -= frequency * counts + presence * (counts > 0)
        adjust_(logits, [make_state(SamplingParams()), state])
        torch.testing.assert_close(logits, expected)


def test_order_is_bias_then_penalties_then_temperature() -> None:
    params = SamplingParams(repetition_penalty=2.0, presence_penalty=0.5, logit_bias={0: 3.0})
    logits = torch.tensor([[-1.0, 0.0]])
    adjust_(logits, [make_state(params, output=[0])])
    assert logits.tolist() == [[(-1.0 + 3.0) / 2.0 - 0.5, 0.0]]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=8), SamplingParams(top_p=0.9, min_p=0.01)])
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = make_logits(3, 12, scale=1.0)
    count = 4000
    states = [make_state(params, stream=make_random(None, 5, i, 0)) for i in range(count)]
    observed = Counter(Sampler().sample(logits.expand(count, -1).contiguous(), states).token_ids)
    expected = frequencies(logits, params, 4096)
    kept = [token for token in range(12) if expected[token] > 0]
    statistic = sum((observed[t] - count * float(expected[t])) ** 2 / (count * float(expected[t])) for t in kept)
    assert set(observed) <= set(kept)
    # The 0.9999 quantile of chi-square with 11 degrees of freedom; the streams are fixed, so this never flickers.
    assert statistic < 37.4


@given(seed=seeds, vocabulary=st.sampled_from([3, 300, 5000]), data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_row_does_not_depend_on_its_neighbours(seed: int, vocabulary: int, data: st.DataObject) -> None:
    some = st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.5, 1.0, 4.0]),
        top_k=st.sampled_from([0, 1, 20, 70, 400]),
        top_p=st.sampled_from([1.0, 0.5, 0.95]),
        min_p=st.sampled_from([0.0, 0.05]),
        repetition_penalty=st.sampled_from([1.0, 1.5]),
        logit_bias=st.sampled_from([None, {1: 2.0}]),
        logprobs=st.sampled_from([None, 2]),
    )
    rows = data.draw(st.lists(some, min_size=1, max_size=6))
    logits = make_logits(seed, len(rows), vocabulary).bfloat16()  # with ties

    def states() -> list[SamplingState]:
        return [make_state(p, [0, 1], [2], stream=make_random(seed, 0, 0, i)) for i, p in enumerate(rows)]

    together = Sampler().sample(logits, states())
    for i, state in enumerate(states()):
        alone = Sampler().sample(logits[i : i + 1], [state])
        assert alone.token_ids[0] == together.token_ids[i]
        assert alone.logprobs[0] == together.logprobs[i]


@given(seed=seeds, dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
@settings(max_examples=30, deadline=None)
def test_greedy_is_argmax_and_the_lowest_index_wins(seed: int, dtype: torch.dtype) -> None:
    logits = make_logits(seed, 4, 1000).to(dtype).contiguous()
    before = logits.clone()
    greedy = SamplingParams(temperature=0)
    tokens = Sampler().sample(logits, [make_state(greedy) for _ in range(4)]).token_ids
    assert tokens == logits.float().argmax(-1).tolist()
    mixed = [make_state(SamplingParams(temperature=0, logprobs=1)), make_state(SamplingParams(logit_bias={3: 1.0}))] * 2
    assert Sampler().sample(logits, mixed).token_ids[::2] == tokens[::2]
    assert torch.equal(logits, before)
    assert Sampler().sample(torch.tensor([[1.0, 5.0, 5.0]]), [make_state(greedy)]).token_ids == [1]


def test_tokens_that_tie_with_the_last_kept_are_kept() -> None:
    shares = frequencies(torch.tensor([1.0, 1.0, 0.0, 1.0]), SamplingParams(top_k=1), 300)
    assert shares.tolist() == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3])
    # More ties than candidates.
    shares = frequencies(torch.zeros(200), SamplingParams(top_p=0.5), 200)
    assert shares.tolist() == pytest.approx([1 / 200] * 200)


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 5e-324])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[3e4, -1e30, 3.001e4, 0.0]])
    for options in ({}, {"top_p": 0.9}, {"top_k": 2}, {"min_p": 0.1}):
        params = SamplingParams(temperature=temperature, **options)
        assert Sampler().sample(logits, [make_state(params, stream=Always(0.999999))]).token_ids == [2]


@pytest.mark.parametrize("value", [0.0, 1 - 2**-53])
def test_extreme_random_numbers_draw_tokens_with_mass(value: float) -> None:
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 300:400] = 0.0
    expected = 300 if value == 0 else 399
    for options in ({}, {"top_p": 0.999}, {"top_k": 600}):
        params = SamplingParams(**options)
        assert Sampler().sample(logits, [make_state(params, stream=Always(value))]).token_ids == [expected]


def test_stop_tokens_are_banned_before_min_tokens() -> None:
    logits = torch.tensor([[9.0, 8.0, 1.0, 0.0]])
    output: list[int] = []
    params = SamplingParams(temperature=0, min_tokens=2)
    state = make_state(params, output=output, stop=frozenset({0, 1, 99}))
    for expected in (2, 2, 0):
        assert Sampler().sample(logits, [state]).token_ids == [expected]
        output.append(expected)


def test_logit_bias_forbids_and_forces() -> None:
    logits = make_logits(0, 1, 30)
    best = int(logits.argmax())
    forbidden = frequencies(logits[0], SamplingParams(logit_bias={best: -100.0}))
    assert forbidden[best] == 0
    forced = frequencies(logits[0], SamplingParams(logit_bias={7: 100.0, 1000: 100.0}))
    assert forced[7] == 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_choice_are_marked_and_hurt_no_other(temperature: float) -> None:
    logits = make_logits(1, 4, 500)
    logits[0, 77] = torch.nan
    logits[1] = -torch.inf
    logits[2, 5] = torch.inf
    states = [make_state(SamplingParams(temperature=temperature, top_p=0.9, logprobs=1)) for _ in range(4)]
    sampled = Sampler().sample(logits, states)
    assert sampled.token_ids[:3] == [-1, -1, 5]
    assert 0 <= sampled.token_ids[3] < 500
    assert sampled.logprobs[:2] == [None, None]


def test_banning_every_token_is_marked() -> None:
    params = SamplingParams(min_tokens=1)
    state = make_state(params, stop=frozenset(range(3)))
    assert Sampler().sample(torch.zeros(1, 3), [state]).token_ids == [-1]


def test_an_empty_batch_gives_nothing() -> None:
    assert Sampler().sample(torch.empty(0, 10), []).token_ids == []


def test_streams_differ_between_completions_and_agree_between_processes() -> None:
    streams = [make_random(seed, 0, 7, index).random() for seed in (None, 3) for index in range(8)]
    assert len(set(streams)) == 16
    assert make_random(3, 1, 9, 2).random() == make_random(3, 0, 7, 2).random()
    code = "from gossamer.engine.sampling import make_random; print(make_random(None, 0, 7, 5).random())"
    assert float(run_program(code).stdout) == streams[5]


def test_a_sequence_draws_one_number_per_token() -> None:
    state = make_state(SamplingParams(top_p=0.9))
    reference = make_random(0, 0, 0, 0)
    for count in (1, 3, 2):
        numbers = [reference.random() for _ in range(count)]
        assert [state.behind([7] * ahead).uniform for ahead in reversed(range(count))] == numbers[::-1]
        state.uniforms.take(count)
    state.uniforms.take(1)  # whether it was looked at or not
    reference.random()
    assert state.uniform == reference.random()


@given(seed=seeds, vocabulary=st.sampled_from([40, 2048, 5003]), count=st.integers(1, 200))
@settings(max_examples=30, deadline=None)
def test_largest_is_topk(seed: int, vocabulary: int, count: int) -> None:
    logits = make_logits(seed, 5, vocabulary)
    rows = torch.tensor([0, 2, 3])
    count = min(count, vocabulary)
    values, indices = largest(logits, rows, count)
    expected = logits[rows].topk(count)
    assert torch.equal(values, expected.values)
    assert torch.equal(indices, expected.indices)


@given(seed=seeds, k=st.integers(0, 30))
@settings(max_examples=20, deadline=None)
def test_logprobs_are_the_log_softmax_of_the_raw_logits(seed: int, k: int) -> None:
    logits = make_logits(seed, 6, 20)
    targets = torch.arange(6)
    expected = logits.log_softmax(-1)
    torch.testing.assert_close(token_logprobs(logits, targets), expected[torch.arange(6), targets])
    for row, (position, target) in zip(top_logprobs(logits, targets, k), enumerate(targets.tolist()), strict=True):
        ranking = expected[position].argsort(descending=True).tolist()
        assert list(row) == [target, *(token for token in ranking[:k] if token != target)]
        for token, entry in row.items():
            assert entry.rank == ranking.index(token) + 1
            assert entry.logprob == pytest.approx(float(expected[position, token]), abs=1e-5)
            assert entry.decoded_token is None


def test_sampled_logprobs_ignore_bias_temperature_and_neighbours() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]])
    biased = SamplingParams(temperature=0, logit_bias={0: 100.0}, logprobs=1)
    sampled = Sampler().sample(logits, [make_state(biased), make_state(SamplingParams(temperature=0))])
    assert sampled.token_ids == [0, 0]
    assert sampled.logprobs[1] is None
    row = sampled.logprobs[0]
    assert row is not None
    assert [(token, entry.rank) for token, entry in row.items()] == [(0, 3), (2, 1)]
    assert row[0].logprob == pytest.approx(-math.log(1 + math.e + math.e**2))


def test_scoring_a_long_prompt_takes_little_memory() -> None:
    logits = torch.zeros(600, 20000, dtype=torch.bfloat16)  # 24 MB, twice that in float32
    scores = token_logprobs(logits, torch.zeros(600, dtype=torch.int64))
    torch.testing.assert_close(scores, torch.full((600,), -math.log(20000)))
