"""What answers make of the texts they follow: learnt where they come back, applied where the text says the same."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from gossamer.engine.speculation.config import SpeculativeConfig
from gossamer.engine.speculation.rewrites import WINDOW, Rewrites, Table
from gossamer.engine.speculation.speculator import Speculator
from gossamer.engine.speculation.step_time import StepTime
from gossamer.engine.speculation.survival import Source
from gossamer.engine.speculation.texts import Continuation
from gossamer.engine.token_bytes import TokenBytes


class Vocabulary:
    """Tokens are words, with the blank before them or without, and marks; as many as are met."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def encode(self, text: str) -> list[int]:
        return [self.number(word) for word in text.split("|")]

    def number(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def unspaced(self, token: int) -> int:
        word = self.words[token]
        return self.number(word[1:]) if word.startswith(" ") else token

    def is_word(self, token: int) -> bool:
        return any(letter.isalnum() for letter in self.words[token])


class Unchanged:
    """A vocabulary without blanks, all of it words."""

    def unspaced(self, token: int) -> int:
        return token

    def is_word(self, token: int) -> bool:
        return token >= 0


def answers(words: Any, prompts: list[list[int]], said: list[list[int]], most: int = 16) -> list[float]:
    """Tokens per step of answers, one after the other, if every draft is verified."""
    limits: dict[str, Any] = {"vocab_size": 1 << 20, "row_seconds_per_key": 0.0, "most_rows": 1, "most_chosen": 1}
    no_tree: Any = SimpleNamespace()
    speculator = Speculator(SpeculativeConfig(), lambda: StepTime([(1, 1.0)]), no_tree, words=words, **limits)
    rates = []
    for prompt, answer in zip(prompts, said, strict=True):
        request = SimpleNamespace(tree_salt=(None,), prediction=None)
        sequence: Any = SimpleNamespace(
            tokens=prompt + answer[:1], output_ids=answer[:1], request=request, private_start=0, node=None
        )
        sequence.constraint = sequence.position = None
        position, steps = speculator._begin(sequence), 0
        while (done := len(sequence.output_ids)) < len(answer):
            draft = position.next.take(most) if position.next is not None else []
            right = 0
            while right < len(draft) and answer[done + right : done + right + 1] == [draft[right]]:
                right += 1
            emitted = answer[done : done + right + 1]
            speculator.advance(sequence, emitted)
            sequence.tokens.extend(emitted)
            sequence.output_ids.extend(emitted)
            steps += 1
        rates.append((len(answer) - 1) / steps)
    return rates


def records(vocabulary: Vocabulary, rows: list[tuple[int, str, str]]) -> tuple[list[int], list[int]]:
    """Sentences, and their records."""
    told = "|".join(f"Error| |{code}|,| which| C| calls| {name}|,| means|:| {text}|." for code, name, text in rows)
    made = "|}, {|".join(
        f'"|number|":| |{code}|, "|name|":| "|{name}|", "|text|":| "|{text}|"' for code, name, text in rows
    )
    return vocabulary.encode(told + "|?"), vocabulary.encode("[{|" + made + "|}]")


def test_records_are_made_of_sentences_as_the_ones_before_were() -> None:
    vocabulary, draws = Vocabulary(), random.Random(0)
    names = [f"N{number}|{draws.randrange(1000)}" for number in range(40)]
    texts = ["|".join([f"w{draws.randrange(900)}", *(f" v{draws.randrange(900)}" for _ in range(3))]) for _ in names]
    rows = [(number, name, text) for number, (name, text) in enumerate(zip(names, texts, strict=True))]
    first, second = records(vocabulary, rows[:20]), records(vocabulary, rows[20:])
    without = [0.0, 0.0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rewrites, "push", lambda self, token: None)
        without = answers(vocabulary, [first[0], second[0]], [first[1], second[1]])
    rates = answers(vocabulary, [first[0], second[0]], [first[1], second[1]])
    assert rates[0] > 2.5 * without[0]  # two records are learnt from, the others come at once
    assert rates[1] > rates[0]  # and another answer under the same salt knows from the beginning


def test_a_renamed_token_is_renamed_wherever_it_stands() -> None:
    draws = random.Random(1)
    text = [
        draws.choice([1, *range(100, 400)]) if draws.random() < 0.5 else draws.randrange(400, 4000) for _ in range(600)
    ]
    for place in range(5, 600, 12):
        text[place] = 1
    answer = [token for old in text for token in ([2, 3] if old == 1 else [old])]
    (rate,) = answers(Unchanged(), [[5, *text]], [[5, *answer]])
    assert rate > 12


def test_what_becomes_of_single_tokens_is_not_handed_on() -> None:
    shared = Table()
    text = [1, 2, 3, 4, 5, 6, 7, 8]
    rewrites = Rewrites(Unchanged(), shared)
    rewrites.leave(text, 2)
    assert [rewrites.push(token) for token in (9, 4, 5)] == [None, None, 5]  # 3 became 9
    rewrites.leave(text, 5)
    assert [rewrites.push(token) for token in (9, 8)] == [None, None]
    rewrites.leave(text, 3)
    assert [rewrites.push(token) for token in (9, 9, 6, 7)] == [None, None, None, 7]  # 4, 5 became 9, 9
    other = Rewrites(Unchanged(), shared)
    assert rewrites.at(text, 2) is not None
    assert other.at(text, 2) is None
    found = other.at(text, 3)
    assert found is not None and (found.skipped, list(found.written)) == (2, [9, 9])
    found.wrong = 1
    assert other.at(text, 3) is None
    assert rewrites.at(text, 3) is not None


def test_a_rewrite_that_does_not_happen_again_gives_way() -> None:
    words, table = Unchanged(), Table()
    rewrites = Rewrites(words, table)
    text = [1, 2, 3, 4, 5, 1, 2, 3, 4, 5]
    rewrites.leave(text, 2)
    for token in (9, 4, 5):
        rewrites.push(token)
    again = Continuation(Source.PREFIX, text, 6, 2, rewrites)
    assert again.take(4) == [2, 9, 4, 5]
    assert again.pop() == 2
    again.right()
    assert again.pop() == 9  # but 3 comes
    assert again.rewrite is not None
    again.rewrite.wrong += 1
    assert Continuation(Source.PREFIX, text, 6, 2, rewrites).take(4) == [2, 3, 4, 5]


tokens = st.integers(0, 4)
learnt = st.lists(
    st.tuples(st.lists(tokens, min_size=3, max_size=20), st.integers(1, 19), st.lists(tokens, max_size=12))
)


@given(learnt=learnt, text=st.lists(tokens, max_size=30), place=st.integers(0, 30), count=st.integers(0, 80))
@settings(max_examples=300, deadline=None)
def test_what_is_taken_is_what_is_given_one_by_one(
    learnt: list[tuple[list[int], int, list[int]]], text: list[int], place: int, count: int
) -> None:
    rewrites = Rewrites(Unchanged(), Table())
    for source, left, said in learnt:
        rewrites.leave(source, min(left, len(source) - 1))
        for token in said:
            back = rewrites.push(token)
            assert back is None or 2 <= back <= len(source)
    found = Continuation(Source.PREFIX, text, min(place, len(text)), 2, rewrites)
    taken = found.take(count)
    assert len(taken) <= count
    assert found.take(count) == taken  # looking changes nothing
    given = [token for token in (found.pop() for _ in range(len(taken))) if token is not None]
    assert given == taken
    if len(taken) < count:
        assert found.pop() is None
    assert found.place <= len(text)
    assert len(given) <= (WINDOW + 2) * (len(text) + 1)


@pytest.mark.parametrize("blank", ["Ġ", "▁"])
def test_words_are_told_by_the_tokenizer(blank: str) -> None:
    vocabulary = {f"{blank}the": 0, "the": 1, '",': 2, f"{blank}only": 3, blank: 4, "4": 5}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=blank == "▁"))
    parts = [decoders.ByteLevel()] if blank == "Ġ" else [decoders.ByteFallback(), decoders.Metaspace()]
    tokenizer.decoder = decoders.Sequence(parts)
    words = TokenBytes(tokenizer)
    assert [words.unspaced(token) for token in range(6)] == [1, 1, 2, 3, 4, 5]
    assert [words.is_word(token) for token in range(6)] == [True, True, False, True, False, True]
