"""Drafts change when tokens come and nothing else: whoever drafts, whatever is asked for, however keys are shared."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llguidance.hf import from_tokenizer

from architectures import RECURRENT, VOCAB, make_model
from gossamer import LLM
from gossamer.engine.engine import Engine
from gossamer.engine.grammar import program
from gossamer.engine.sampling import Sampler
from gossamer.engine.scheduler import Work
from gossamer.engine.speculation.choice import LEAST_CHANCE
from gossamer.engine.speculation.config import SpeculativeConfig
from gossamer.engine.speculation.speculator import Speculator, room
from gossamer.engine.speculation.step_time import StepTime
from gossamer.engine.speculation.survival import Source
from gossamer.engine.stats import EngineStats
from gossamer.errors import ConfigurationError, InvalidSamplingParamsError
from gossamer.models.quantize import quantize
from gossamer.native.packing import unsupported
from gossamer.options import SHARING_MODES, EngineOptions
from gossamer.runners.transformers import IMPLEMENTATION
from gossamer.sampling_params import ReasoningParams, SamplingParams, StructuredOutputsParams
from test_exactness import NATIVE, NumberTokenizer, make

Drafter = Callable[[list[int], int], list[int]]  # of the tokens so far, and how many there is room for
FREE = StepTime([(1, 1.0), (1 << 20, 1.0)])  # rows cost nothing: all that is drafted is verified


class Drafting(Speculator):
    """Verifies what a test drafts."""

    def __init__(self, engine: Engine, drafter: Drafter) -> None:
        super().__init__(
            SpeculativeConfig(),
            lambda: FREE,
            engine.tree,
            words=engine.factory.tokens,
            vocab_size=VOCAB,
            row_seconds_per_key=0.0,
            most_rows=2048,
            most_chosen=2048,
        )
        self._drafter = drafter

    def propose(self, works: Sequence[Work]) -> None:
        for work in works:
            sequence = work.sequence
            if sequence.generate and work.start + work.count == len(sequence.tokens) and room(work) > 0:
                stops = sequence.sampling.stop_token_ids if sequence.sampling else ()
                draft = self._drafter(sequence.tokens, room(work))[: room(work)]
                ends = [place for place, token in enumerate(draft) if token in stops or token >= VOCAB]
                work.draft = draft[: ends[0]] if ends else draft


@pytest.fixture(scope="module", params=[*NATIVE, *RECURRENT])
def model(request: pytest.FixtureRequest) -> Any:
    spread = 0.1 if request.param in RECURRENT else 0.3  # more, and rounding grows from layer to layer in Zamba 2
    made = make_model(request.param, initializer_range=spread)
    made.set_attn_implementation(IMPLEMENTATION)
    return request.param, made


@pytest.fixture(scope="module")
def llama() -> Any:
    made = make_model("llama", initializer_range=0.3)
    made.set_attn_implementation(IMPLEMENTATION)
    return made


@pytest.fixture(scope="module", params=["llama", "qwen3_5"])
def either(request: pytest.FixtureRequest) -> Any:
    """One that goes on from keys and values, and one with states."""
    made = make_model(request.param, initializer_range=0.3)
    made.set_attn_implementation(IMPLEMENTATION)
    return made


def engine_of(network: Any, runner: str = "native", drafter: Drafter | None = None, **options: Any) -> Engine:
    settings = EngineOptions(**options, speculation="off")
    made = Engine(make(runner, network), NumberTokenizer(), settings, eos_token_ids=frozenset({0}))
    made.speculator = made.emission.speculator = None if drafter is None else Drafting(made, drafter)
    return made


def run(engine: Engine, requests: Sequence[tuple[list[int], SamplingParams]]) -> list[Any]:
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        done |= {output.request_id: output for output in engine.step()}
    assert engine.slots.num_bytes == 0
    assert all(node.refs == 0 for node in engine.tree)
    return [done[str(number)] for number in range(len(requests))]


class About(float):
    """A log-probability, and the same one when sums end in other last bits."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(float(self) - float(other)) < 1e-3

    __hash__ = float.__hash__


def told(outputs: list[Any]) -> list[Any]:
    """What an answer says, and its log-probabilities as far as rounding allows."""
    return [
        (
            each.token_ids,
            each.text,
            each.finish_reason,
            each.stop_reason,
            [{t: (About(p.logprob), p.decoded_token) for t, p in entry.items()} for entry in each.logprobs or []],
        )
        for output in outputs
        for each in output.outputs
    ]


def prompts(draws: random.Random) -> list[list[int]]:
    shared = draws.choices(range(1, VOCAB), k=draws.choice([3, 40]))
    return [shared + draws.choices(range(1, VOCAB), k=draws.randrange(1, 12)) for _ in range(3)]


def drafters(expected: dict[tuple[int, ...], list[int]], draws: random.Random) -> dict[str, Drafter]:
    """Good and bad ones. ``expected`` is how each prompt goes on."""

    def oracle(tokens: list[int], most: int) -> list[int]:
        for prompt, answer in expected.items():
            if tuple(tokens[: len(prompt)]) == prompt and tokens[len(prompt) :] == answer[: len(tokens) - len(prompt)]:
                return answer[len(tokens) - len(prompt) :][:most]
        return []

    def cut(tokens: list[int], most: int) -> list[int]:
        right = oracle(tokens, most)
        at = draws.randrange(len(right) + 1)
        return right[:at] + [(token + 1) % VOCAB for token in right[at:]]

    return {
        "oracle": oracle,
        "right up to the last": lambda tokens, most: [*oracle(tokens, most)[:-1], 1],
        "right up to somewhere": cut,
        "always wrong": lambda tokens, most: [(token + 1) % VOCAB for token in oracle(tokens, most)],
        "random": lambda tokens, most: draws.choices(range(VOCAB + 5), k=draws.randrange(most + 1)),
        "one": lambda tokens, most: oracle(tokens, most)[:1],
        "none": lambda tokens, most: [],
    }


GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_greedy_tokens_are_the_same(model: Any, sharing: Any, runner: str) -> None:
    name, network = model
    if unsupported(network.config.get_text_config()) if runner == "native" else name in RECURRENT:
        return  # it runs elsewhere, or has no drafts there
    draws = random.Random(name)
    requests = [(prompt, GREEDY) for prompt in prompts(draws)]
    plain = engine_of(network, runner, sharing=sharing)
    expected = told(run(plain, requests))
    answers = {tuple(p): e[0] for (p, _), e in zip(requests, expected, strict=True)}
    kinds = list(drafters(answers, draws).items())
    for label, drafter in kinds if runner == "native" else draws.sample(kinds[:5], 2):
        engine = engine_of(network, runner, drafter, sharing=sharing, max_num_batched_tokens=draws.choice([2048, 61]))
        assert told(run(engine, requests)) == expected, label
        assert engine.stats.generated_tokens == plain.stats.generated_tokens
        assert engine.budget.used == plain.budget.used
        assert told(run(engine, requests)) == expected, label  # behind what the first round left in the tree


def test_an_oracle_takes_no_more_steps_than_its_drafts_need(llama: Any) -> None:
    prompt, count = [5, 6, 7, 8], 25
    params = dataclasses.replace(GREEDY, max_tokens=count)
    answer = told(run(engine_of(llama), [(prompt, params)]))[0][0]
    for most in (1, 3, 7):
        oracle = drafters({tuple(prompt): answer}, random.Random(0))["oracle"]
        engine = engine_of(llama, drafter=functools.partial(_at_most, oracle, most))
        assert told(run(engine, [(prompt, params)]))[0][0] == answer
        # The prompt's step has a draft too; the last token is never drafted, since nothing is computed behind it.
        prefill = engine.stats.steps - engine.stats.decode_steps
        assert engine.stats.steps == prefill - 1 + math.ceil(count / (most + 1))
        assert engine.speculator is not None
        stats = engine.speculator.stats
        assert stats.accepted_tokens == stats.draft_tokens
        assert engine.stats.computed_tokens == len(prompt) + count - 1


def _at_most(drafter: Drafter, bound: int, tokens: list[int], most: int) -> list[int]:
    return drafter(tokens, min(bound, most))


letters = st.sampled_from([dict[int, float](), dict.fromkeys(range(1, 9), 5.0)])
asked = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.5, 1.0, 2.0]),
        "top_p": st.sampled_from([1.0, 0.8]),
        "top_k": st.sampled_from([0, 5]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.8]),
        "frequency_penalty": st.sampled_from([0.0, 0.7]),
        "presence_penalty": st.sampled_from([0.0, -0.5]),
        "min_tokens": st.sampled_from([0, 9]),
        "logprobs": st.sampled_from([None, 2]),
        "n": st.sampled_from([1, 3]),
        "seed": st.sampled_from([None, 7]),
        "max_tokens": st.sampled_from([1, 2, 24]),
        "ignore_eos": st.booleans(),
        "stop": st.sampled_from([None, ["3 ", "1 2"], ["4"]]),
        "include_stop_str_in_output": st.booleans(),
        "stop_token_ids": st.sampled_from([None, [3, 9]]),
        "logit_bias": letters,
    }
)


@given(params=asked, seed=st.integers(0, 1000), who=st.integers(0, 6), sharing=st.sampled_from(SHARING_MODES))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_for_the_answer_is_the_same(
    either: Any, params: dict[str, Any], seed: int, who: int, sharing: Any
) -> None:
    draws = random.Random(seed)
    params |= {"min_tokens": min(params["min_tokens"], params["max_tokens"])}
    requests = [(prompt, SamplingParams(**params)) for prompt in prompts(draws)]
    expected = told(run(engine_of(either, sharing=sharing), requests))
    answers = {tuple(p): e[0] for (p, _), e in zip(requests, expected[:: params["n"]], strict=True)}
    label, drafter = list(drafters(answers, draws).items())[who]
    engine = engine_of(either, drafter=drafter, sharing=sharing, seed=0)
    assert told(run(engine, requests)) == expected, label


def test_a_draft_changes_no_bit_where_none_may_change() -> None:
    """With ``batch_invariant``, int8 layers and keys in bf16."""
    from gossamer.options import RunnerOptions
    from gossamer.runners.choose import make_runner

    def engine(drafter: Drafter | None) -> Engine:
        network = make_model("llama", max_position_embeddings=2048, initializer_range=0.1)
        quantize(network)
        network.set_attn_implementation(IMPLEMENTATION)
        runner, _ = make_runner(network, RunnerOptions(runner="native", batch_invariant=True), max_rows=2048)
        made = Engine(runner, NumberTokenizer(), EngineOptions())
        made.speculator = made.emission.speculator = None if drafter is None else Drafting(made, drafter)
        return made

    draws = random.Random(3)
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, logprobs=2, ignore_eos=True)
    requests = [(draws.choices(range(VOCAB), k=length), params) for length in (5, 300, 1100)]
    expected = [output.outputs[0] for output in run(engine(None), requests)]
    answers = {tuple(p): e.token_ids for (p, _), e in zip(requests, expected, strict=True)}
    for label, drafter in drafters(answers, draws).items():
        found = [output.outputs[0] for output in run(engine(drafter), requests)]
        assert [(each.token_ids, each.logprobs) for each in found] == [(e.token_ids, e.logprobs) for e in expected], (
            label
        )


def test_memory_is_that_of_the_undrafted_run_at_every_length(llama: Any) -> None:
    """Nothing grows, gives way or is preempted for a draft, and what is wrong of one leaves nothing."""

    def watch(drafter: Drafter | None) -> tuple[dict[int, tuple[int, int]], Engine]:
        engine, seen = engine_of(llama, drafter=drafter), dict[int, tuple[int, int]]()
        engine.add_request("it", {"prompt_token_ids": list(range(1, 60))}, dataclasses.replace(GREEDY, max_tokens=40))
        while engine.has_unfinished_requests():
            engine.step()
            for sequence in engine.scheduler.active:
                if sequence.slot is not None and sequence.output_ids:
                    assert sequence.num_computed == len(sequence.tokens) - 1
                    seen[len(sequence.output_ids)] = (sequence.slot.length, engine.budget.used)
        return seen, engine

    plain, _ = watch(None)
    draws = random.Random(0)
    drafted, engine = watch(lambda tokens, most: draws.choices(range(VOCAB), k=most))
    assert drafted == {length: plain[length] for length in drafted}
    assert engine.scheduler.num_preemptions == engine.tree.evicted_tokens == 0


def test_preempted_sequences_go_on_as_they_were(either: Any) -> None:
    draws = random.Random(1)
    requests = [(prompt, dataclasses.replace(GREEDY, n=2, temperature=1.0, seed=4)) for prompt in prompts(draws)]
    expected = told(run(engine_of(either), requests))
    answers = {tuple(p): e[0] for (p, _), e in zip(requests, expected[::2], strict=True)}
    engine = engine_of(either, drafter=drafters(answers, draws)["right up to somewhere"])
    for number, (prompt, params) in enumerate(requests):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    done: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        if engine.scheduler.active and draws.random() < 0.2:
            engine.scheduler.preempt(draws.choice(engine.scheduler.active))
        done |= {output.request_id: output for output in engine.step()}
    assert told([done[str(number)] for number in range(len(requests))]) == expected
    assert engine.scheduler.num_preemptions > 3


def test_a_step_that_fails_takes_no_random_numbers(llama: Any) -> None:
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    requests = [([3, 4, 5], params)]
    expected = told(run(engine_of(llama), requests))
    engine = engine_of(llama, drafter=lambda tokens, most: [1, 2][:most])
    real, calls = engine.sampler.sample, iter(range(1000))

    def failing(*arguments: Any) -> Any:
        chosen = real(*arguments)
        if next(calls) % 3 == 1:
            raise RuntimeError("out of luck")
        return chosen

    engine.sampler = cast("Sampler", SimpleNamespace(sample=failing))
    engine.add_request("it", {"prompt_token_ids": [3, 4, 5]}, params)
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        try:
            outputs += engine.step()
        except RuntimeError:
            continue
    assert told(outputs) == expected


def test_tokens_are_drawn_from_the_exact_distribution(llama: Any) -> None:
    """20,000 pairs of tokens, the second behind a draft that is sometimes right, with penalty and truncation."""
    bias = dict.fromkeys(range(1, 9), 9.0)
    prompt, reference = [1, 2, 3], make_model("llama", initializer_range=0.3)
    first = _distribution(reference, prompt, [], bias)
    pairs = {}
    for token, chance in first.items():
        for second, share in _distribution(reference, prompt, [token], bias).items():
            pairs[token, second] = chance * share
    draws, count = random.Random(0), 20_000
    likely = max(first, key=first.__getitem__)
    engine = engine_of(llama, drafter=lambda tokens, most: [draws.choice([likely, 1, 5])], max_num_seqs=1024)
    seen: Counter[Any] = Counter()
    params = SamplingParams(
        n=count,
        seed=0,
        temperature=1.5,
        top_k=6,
        repetition_penalty=1.2,
        frequency_penalty=0.4,
        logit_bias=bias,
        max_tokens=2,
        ignore_eos=True,
    )
    (output,) = run(engine, [(prompt, params)])
    seen.update(tuple(each.token_ids) for each in output.outputs)
    assert set(seen) <= set(pairs)
    statistic = sum((seen[pair] - count * p) ** 2 / (count * p) for pair, p in pairs.items())
    degrees = len(pairs) - 1
    assert statistic < degrees + 4.5 * math.sqrt(2 * degrees)  # p about 1e-5
    # The same draws are no sample of a distribution that is off by a few percent.
    wrong = {pair: p * (1.1 if number % 2 else 0.9) for number, (pair, p) in enumerate(sorted(pairs.items()))}
    total = sum(wrong.values())
    off = sum((seen[pair] - count * p / total) ** 2 / (count * p / total) for pair, p in wrong.items())
    assert off > degrees + 4.5 * math.sqrt(2 * degrees)
    assert engine.speculator is not None
    stats = engine.speculator.stats
    assert 0 < stats.accepted_tokens.total() < stats.draft_tokens.total()


def _distribution(network: Any, prompt: list[int], output: list[int], bias: dict[int, float]) -> dict[int, float]:
    """Of the next token, in fp64, by the definitions."""
    tokens = [*prompt, *output]
    with torch.no_grad():
        logits = network(torch.tensor([tokens])).logits[0, -1].double()
    for token, value in bias.items():
        logits[token] += value
    for token in set(tokens):
        logits[token] = logits[token] / 1.2 if logits[token] > 0 else logits[token] * 1.2
    for token, times in Counter(output).items():
        logits[token] -= 0.4 * times
    logits /= 1.5
    logits[logits < logits.topk(6).values[-1]] = -torch.inf
    return {token: p for token, p in enumerate(logits.softmax(0).tolist()) if p > 0}


# --- the engine's own drafts -----------------------------------------------------------------------------------------


def own_drafts(network: Any, **options: Any) -> Engine:
    engine = Engine(make("native", network), NumberTokenizer(), EngineOptions(**options), eos_token_ids=frozenset({0}))
    assert engine.speculator is not None
    engine.speculator.time = FREE
    return engine


def test_texts_of_others_are_drafted_within_their_salt_alone(llama: Any) -> None:
    """How long a request takes tells nothing of what others with another salt have said."""
    prompt, params = [9, 8, 7, 6, 5], dataclasses.replace(GREEDY, max_tokens=40, temperature=1.0, seed=1)

    def ask(engine: Engine, salt: str | None) -> int:
        before = engine.stats.steps
        engine.add_request("it", {"prompt_token_ids": prompt} | ({"cache_salt": salt} if salt else {}), params)
        while engine.has_unfinished_requests():
            engine.step()
        return engine.stats.steps - before

    alone = ask(own_drafts(llama), "b")
    engine = own_drafts(llama)
    first = ask(engine, "a")
    for salt in (None, "c"):
        ask(engine, salt)
    assert ask(engine, "b") == alone == first
    assert ask(engine, "a") < first  # it has said it before
    assert engine.speculator is not None
    assert engine.speculator.stats.accepted_tokens[Source.FINISHED] > 20


def test_siblings_draft_for_each_other(llama: Any) -> None:
    engine = own_drafts(llama)
    prompt = random.Random(0).choices(range(1, VOCAB), k=300)
    late = dataclasses.replace(GREEDY, max_tokens=60)
    engine.add_request("first", {"prompt_token_ids": prompt}, late)
    for _ in range(12):
        engine.step()
    engine.add_request("second", {"prompt_token_ids": prompt}, late)
    while engine.has_unfinished_requests():
        engine.step()
    assert engine.speculator is not None
    assert engine.speculator.stats.accepted_tokens[Source.SIBLING] > 3


def test_a_prompt_is_indexed_once_for_all_its_readers(llama: Any) -> None:
    engine = own_drafts(llama)
    draws = random.Random(2)
    shared = draws.choices(range(1, VOCAB), k=400)
    for number in range(8):
        engine.add_request(str(number), {"prompt_token_ids": [*shared, number + 1]}, GREEDY)
    for _ in range(4):
        engine.step()
    assert engine.speculator is not None
    chains = [node.chains for node in engine.tree if node.chains is not None]
    assert len(chains) == 1
    assert chains[0].nbytes <= 16 * 512
    # Everything has at most 16 bytes a token, rounded up to the smallest tables.
    assert engine.speculator.count_bytes() <= 16 * 512 + 8 * 16 * 128
    while engine.has_unfinished_requests():
        engine.step()
    engine.tree.evict(1 << 40)
    left = engine.speculator.count_bytes()
    assert left <= 16 * 8 * 24 + 16 * 512  # the answers


def test_a_prediction_is_drafted_and_counted(llama: Any) -> None:
    prompt = [4, 5, 6, 7]
    answer = told(run(engine_of(llama), [(prompt, dataclasses.replace(GREEDY, max_tokens=40))]))[0][0]
    edited = [*answer[:10], 1, 2, *answer[13:25], *answer[28:]]
    engine = own_drafts(llama)
    (output,) = run(engine, [(prompt, dataclasses.replace(GREEDY, max_tokens=40, prediction=edited))])
    assert output.outputs[0].token_ids == answer
    assert engine.stats.steps < 16
    assert engine.speculator is not None
    counted = engine.speculator.stats
    accepted, drafted = counted.accepted_tokens[Source.PREDICTION], counted.draft_tokens[Source.PREDICTION]
    assert accepted > 25
    completion = output.outputs[0]
    assert (completion.num_accepted_prediction_tokens, completion.num_rejected_prediction_tokens) == (
        accepted,
        drafted - accepted,
    )


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ([VOCAB], "prediction"),
        ([-1], "prediction"),
        ([1, "a"], "prediction"),
        (7, "prediction"),
        ([1] * 100_000, "prediction has 100000 tokens"),
    ],
)
def test_predictions_that_cannot_come_are_refused(llama: Any, prediction: Any, message: str) -> None:
    engine = own_drafts(llama)
    with pytest.raises(InvalidSamplingParamsError, match=message) as raised:
        engine.add_request("it", {"prompt_token_ids": [1]}, SamplingParams(prediction=prediction))
    assert raised.value.param == "prediction"
    assert not engine.has_unfinished_requests()


def test_a_request_or_an_engine_can_do_without(llama: Any) -> None:
    prompt = [9, 8, 7, 6, 5] * 6
    for engine, params in (
        (own_drafts(llama), dataclasses.replace(GREEDY, speculation=False)),
        (own_drafts(llama, speculative_config={"num_speculative_tokens": 0}), GREEDY),
    ):
        run(engine, [(prompt, params)] * 2)
        assert engine.speculator is not None
        assert engine.speculator.stats.drafts == 0
    assert Engine(make("native", llama), NumberTokenizer(), EngineOptions(speculation="off")).speculator is None


def test_shared_outliers_refuse_drafts() -> None:
    network = make_model("llama", hidden_size=64)
    quantize(network, outliers="batch")
    network.set_attn_implementation(IMPLEMENTATION)
    runner = make("native", network)
    assert Engine(runner, NumberTokenizer(), EngineOptions()).speculator is None
    with pytest.raises(
        ConfigurationError, match=r"speculative_config cannot be used: .*q_proj takes the outlier columns"
    ):
        Engine(runner, NumberTokenizer(), EngineOptions(speculative_config={"method": "ngram"}))


def test_drafts_are_no_readers_of_a_prefix(llama: Any) -> None:
    """Attention within a tolerance begins with two readers; a lone one's drafts do not count."""
    engine = engine_of(llama, drafter=lambda tokens, most: [1, 2, 3][:most])
    engine.add_request("it", {"prompt_token_ids": list(range(1, 100))}, GREEDY)
    seen: set[int] = set()
    real = engine.runner.forward

    def forward(plan: Any) -> Any:
        seen.update(segment.certain for segment in plan.segments if not segment.per_row)
        return real(plan)

    engine.runner.forward = forward  # type: ignore[method-assign]  # a look at the plans
    while engine.has_unfinished_requests():
        engine.step()
    assert seen == {1}


def test_stats_say_what_drafts_brought(llama: Any) -> None:
    engine = own_drafts(llama)
    for _ in range(2):
        run(engine, [([1, 2, 3] * 9, GREEDY)])
    assert engine.speculator is not None
    told = engine.speculator.stats.to_dict()
    assert told["accepted_tokens"] == sum(each["accepted_tokens"] for each in told["by_source"].values())
    assert sum(told["per_position"]) == told["accepted_tokens"] > 0
    engine.reset_stats()
    assert isinstance(engine.stats, EngineStats)
    assert engine.speculator.stats.drafts == 0
    assert 0 < LEAST_CHANCE < 0.1


# --- grammars --------------------------------------------------------------------------------------------------------

SCHEMA = {
    "type": "object",
    "properties": {
        "weekday": {"enum": ["monday", "tuesday"]},
        "temperature": {"type": "integer"},
        "notes": {"type": "array", "items": {"type": "object", "properties": {"text": {"type": "string"}}}},
    },
    "required": ["weekday", "temperature"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def following(tiny: Path) -> Iterator[LLM]:
    """A model whose steps take the same time whatever is drafted."""
    with LLM(tiny) as llm:
        assert llm.engine.speculator is not None
        llm.engine.speculator.time = FREE
        yield llm


def test_grammars_are_followed_the_same(following: LLM) -> None:
    form = StructuredOutputsParams(json=SCHEMA)
    params = [
        SamplingParams(structured_outputs=form, max_tokens=90, seed=seed, temperature=seed % 3, logprobs=1, n=2)
        for seed in range(6)
    ]
    prompts = ["Tell me about the weather."] * len(params)
    plain = told(following.generate(prompts, [dataclasses.replace(each, speculation=False) for each in params]))
    following.engine.reset_stats()
    assert told(following.generate(prompts, params)) == plain
    assert following.engine.speculator is not None
    counted = following.engine.speculator.stats
    assert counted.accepted_tokens[Source.GRAMMAR] > 20
    assert counted.accepted_tokens.total() > 60
    assert following.engine.stats.steps < 90
    following.engine.reset_stats()
    assert told(following.generate(prompts, params)) == plain  # others have said it by now
    assert following.engine.speculator.stats.accepted_tokens[Source.FINISHED] > 20


@pytest.mark.parametrize(
    "vocab_size", [257, 288]
)  # the second fills its words, where the library's masks have one more
def test_masks_behind_drafted_tokens_are_those_that_come_when_they_do(following: LLM, vocab_size: int) -> None:
    tokenizer = following.tokenizer
    eos = sorted(following.engine.factory.eos_token_ids)
    trie = from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=eos)
    matcher, reason = program.compile_form({"json": SCHEMA}, trie)
    assert matcher is not None and not reason
    text = tokenizer.encode('{"weekday": "monday", "temperature": 3, "notes": [{"text": "warm"}]}')
    size, wrong, forced = program.mask_bytes(vocab_size), tokenizer.encode("%")[0], 0
    for taken in range(len(text) - 1):
        drafted = [*text[taken : taken + 9], wrong]
        answer, alone = program.next_masks(matcher, [], drafted, trie), matcher.deep_copy()
        forced += answer.forced
        assert answer.forced or answer.drafted == drafted[: len(answer.drafted)]
        for place in range(len(answer.drafted) + 1):
            one = program.next_masks(alone, answer.drafted[place - 1 : place], [], trie)
            assert len(answer.masks) == size * (len(answer.drafted) + 1)
            assert answer.masks[size * place : size * (place + 1)] == one.masks[:size]
        assert program.next_masks(matcher, text[taken : taken + 1], [], trie).status == program.MASKS
    assert forced > 0
    # A draft never ends the form: nothing can come behind its end.
    assert program.next_masks(matcher, [], [text[-1], 5], trie).drafted == []
    assert program.next_masks(matcher, [text[-1]], [], trie).status == program.COMPLETE


def test_bounded_thoughts_end_where_they_would(following: LLM) -> None:
    params = SamplingParams(
        temperature=1.0, seed=1, max_tokens=60, ignore_eos=True, reasoning=ReasoningParams(begun=True, max_tokens=20)
    )
    plain = told(following.generate("a b a b a b", dataclasses.replace(params, speculation=False)))
    for _ in range(2):
        assert told(following.generate("a b a b a b", params)) == plain
