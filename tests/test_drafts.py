"""Finding drafts: matches against a naive search, chances learnt, the choice against trying all, tenants apart."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.speculation.choice import Candidate, choose
from gossamer.engine.speculation.config import MOST, SpeculativeConfig
from gossamer.engine.speculation.matches import CANDIDATES, LEAST, LONGEST, Chains
from gossamer.engine.speculation.step_time import StepTime
from gossamer.engine.speculation.survival import Deviation, Source, Survival
from gossamer.engine.speculation.texts import Continuation, Tenants, Text
from gossamer.errors import ConfigurationError


def longest(text: list[int], tail: list[int], first: int, until: int) -> int:
    """Of the matches of the end of ``tail`` before places of ``text``, by comparing everything."""
    best = 0
    for place in range(first, until):
        length = 0
        while length < min(place, len(tail), LONGEST) and text[place - 1 - length] == tail[len(tail) - 1 - length]:
            length += 1
        best = max(best, length)
    return best


@given(
    text=st.lists(st.integers(0, 4), max_size=60),
    tail=st.lists(st.integers(0, 4), max_size=12),
    start=st.integers(0, 20),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@settings(max_examples=300, deadline=None)
def test_matches_are_the_longest(text: list[int], tail: list[int], start: int, cuts: list[int]) -> None:
    chains = Chains(start)
    for end in [*sorted(min(cut, len(text)) for cut in cuts), len(text)]:
        chains.note(text, end)
    found = chains.find(text, tail)
    places = range(max(start, LEAST), len(text))
    expected = longest(text, tail, places.start, places.stop)
    if found is None:
        assert expected < LEAST or len(places) > CANDIDATES
        return
    assert found.place in places
    assert text[found.place - found.length : found.place] == tail[len(tail) - found.length :]
    assert found.length == expected or len(places) > CANDIDATES


def test_many_tokens_are_noted_as_one_by_one() -> None:
    draws = random.Random(0)
    text = draws.choices(range(50_000), k=400) * 3 + draws.choices(range(30), k=5000)
    at_once, singly = Chains(7), Chains(7)
    at_once.note(text, len(text))
    for end in range(7, len(text) + 1):
        singly.note(text, end)
    for end in draws.sample(range(3, len(text)), 300):
        assert at_once.find(text, text[:end]) == singly.find(text, text[:end])
    assert at_once.nbytes <= 12 * (len(text) - 7)


def test_the_nearest_of_long_matches_is_taken_where_a_place_is_expected() -> None:
    text = [9, 1, 2, 3, 4, 5, 6, 7, 8, 20, 21, 1, 2, 3, 4, 5, 6, 7, 8, 30, 31, 0, 1, 2, 3, 4, 5, 6, 7, 8, 40]
    chains = Chains()
    chains.note(text, len(text))
    tail = [0, 1, 2, 3, 4, 5, 6, 7, 8]
    assert chains.find(text, tail) == (30, 9)  # the longest
    assert chains.find(text, tail, near=18) == (19, 8)
    assert chains.find(text, tail, near=4) == (9, 8)


def test_a_text_that_repeats_itself_goes_on_to() -> None:
    text = [1, 2, 3, 4, 1, 2, 3]
    assert Continuation(Source.OWN, text, 3, 3).take(7) == [4, 1, 2, 3, 4, 1, 2]
    assert Continuation(Source.FINISHED, text, 3, 3).take(7) == [4, 1, 2, 3]


def test_chances_follow_what_came() -> None:
    survival, draws = Survival(), random.Random(0)
    for _ in range(2000):
        survival.learn(Source.OWN, 5, draws.random() < 0.9)
        survival.learn(Source.PREFIX, 5, draws.random() < 0.1)
    assert survival.chance(Source.OWN, 5) == pytest.approx(0.9, abs=0.07)
    assert survival.chance(Source.OWN, 7) == survival.chance(Source.OWN, 4)
    assert survival.chance(Source.PREFIX, 5) == pytest.approx(0.1, abs=0.07)
    for _ in range(3000):
        survival.learn(Source.PREFIX, 5, True)
    assert 0.95 < survival.chance(Source.PREFIX, 5) < 1


def test_a_text_that_is_unlike_the_others_is_told_from_them() -> None:
    quoting, other = Deviation(), Deviation()
    for _ in range(60):
        quoting.learn(0.5, True)
        other.learn(0.5, False)
    assert quoting.apply(0.5) > 0.9
    assert other.apply(0.5) < 0.1
    assert 0 <= other.apply(0.01) <= quoting.apply(0.01) <= 1


times = st.lists(st.floats(0.001, 1.0), min_size=3, max_size=3).map(sorted)
chances = st.lists(st.floats(0.01, 1.0), max_size=3).map(lambda each: list(itertools.accumulate(each, min)))


@given(
    seconds=times,
    drafts=st.lists(chances, min_size=1, max_size=3),
    rows=st.integers(1, 40),
    most=st.integers(0, 9),
    attending=st.sampled_from([0.0, 0.01]),
)
@settings(max_examples=200, deadline=None)
def test_no_other_number_of_rows_pays_more(
    seconds: list[float], drafts: list[list[float]], rows: int, most: int, attending: float
) -> None:
    model = StepTime(list(zip((1, 4, 16), seconds, strict=True)))
    sampled = len(drafts)
    counts = choose([Candidate(d, attending) for d in drafts], model, rows=rows, sampled=sampled, most=most)

    def pays(each: tuple[int, ...]) -> float:
        gained = sum(sum(draft[:count]) for draft, count in zip(drafts, each, strict=True))
        return (sampled + gained) / (model.seconds(rows + sum(each)) + attending * sum(each))

    others = [o for o in itertools.product(*(range(len(d) + 1) for d in drafts)) if sum(o) <= most]
    assert tuple(counts) in others
    best, none = max(map(pays, others)), pays((0,) * sampled)
    assert pays(tuple(counts)) >= (best if best > 1.03 * none else none) * 0.999


def test_with_many_sequences_of_a_small_model_no_draft_pays_but_a_sure_one() -> None:
    model = StepTime([(1, 0.008), (64, 0.040)])  # half a millisecond a row
    unsure = [Candidate([0.5, 0.25])] * 64
    assert sum(choose(unsure, model, rows=64, sampled=64, most=1000)) == 0
    assert sum(choose(unsure[:1], model, rows=1, sampled=1, most=1000)) == 2
    # Beside a long prompt a row is next to nothing, whatever there is to gain.
    assert sum(choose([Candidate([0.1])], model, rows=1000, sampled=1, most=100)) == 1


def test_the_time_of_steps_is_corrected_by_them() -> None:
    model = StepTime([(1, 0.010), (8, 0.020)])
    for _ in range(100):
        model.learn(4, 2 * (0.010 + 0.010 * 3 / 7), choosing=0.002, chosen=4, other=0.003)
    assert model.seconds(8) == pytest.approx(0.040, rel=0.01)
    assert model.seconds(15) == pytest.approx(0.060, rel=0.01)
    assert (model.overhead, model.per_row) == (pytest.approx(0.003, rel=0.01), pytest.approx(0.0005, rel=0.01))


def test_finished_answers_are_bounded_and_apart() -> None:
    tenants, draws = Tenants(tokens=4096), random.Random(0)
    for _ in range(200):
        for salt in (None, "a", "b", ("adapter", "a")):
            tenants.keep(salt, draws.choices(range(100), k=50))
        assert tenants.nbytes <= 16 * 4096 + 8 * 64 * 16
    tenants.keep("a", [1000, 1001, 1002, 1003])
    found = [
        [text.chains.find(text.tokens, [1000, 1001, 1002]) for text in tenants.of(salt).finished()] for salt in "ab"
    ]
    assert any(found[0])
    assert not any(found[1])
    assert tenants.of("a").survival is not tenants.of("b").survival
    tenants.keep("b", list(range(10_000)))  # longer than there is room for
    assert tenants.nbytes <= 16 * 4096 + 8 * 64 * 16
    assert any(Text(text.tokens).chains.find(text.tokens, [9000, 9001, 9002]) for text in tenants.of("b").finished())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": ["ngram"]}, r"method must be one of 'auto', 'ngram', 'suffix', got \['ngram'\]"),
        ({"suffix_decoding_max_spec_factor": float("inf")}, "suffix_decoding_max_spec_factor must be"),
        ("[" * 100_000, "no JSON"),
        ({"method": "eagle"}, "method must be one of 'auto', 'ngram', 'suffix', got 'eagle'"),
        ({"num_speculative_tokens": -1}, f"num_speculative_tokens must be an integer from 0 to {MOST}, got -1"),
        ({"num_speculative_tokens": 65}, "num_speculative_tokens must be an integer from 0 to 64, got 65"),
        ({"num_speculative_tokens": True}, "num_speculative_tokens must be"),
        ({"prompt_lookup_min": 0}, "prompt_lookup_min must be an integer of at least 1"),
        ({"suffix_decoding_max_spec_factor": 0}, "suffix_decoding_max_spec_factor must be a number greater than 0"),
        ({"suffix_decoding_min_token_prob": 1.5}, "suffix_decoding_min_token_prob must be a number from 0 to 1"),
        ({"model": "draft"}, "speculative_config.model is not known"),
        ("{", "no JSON"),
        ("[1]", "must be a JSON object"),
    ],
)
def test_settings_without_a_meaning_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        SpeculativeConfig.of(given)


def test_settings_bound_drafts() -> None:
    config = SpeculativeConfig.of(
        {"method": "ngram", "num_speculative_tokens": 6, "suffix_decoding_max_spec_factor": 0.5}
    )
    assert [config.most(length) for length in (0, 4, 100)] == [0, 2, 6]
    assert Source.FINISHED not in config.sources
    assert Source.FINISHED in SpeculativeConfig.of(None).sources
