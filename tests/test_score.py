"""Scores are the sums of transformers' log-probabilities, whatever is shared, cached or chunked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import metaspace_tokenizer
from gossamer import LLM
from gossamer.errors import ConfigurationError, InvalidPromptError, PromptTooLongError
from gossamer.options import SHARING_MODES
from gossamer.outputs import ScoreOutput
from metaspace_tokenizer import IDS
from references import assert_idle, logprobs

QUESTION = "Which animal spins gossamer? It is the"
ENDINGS = [" spider", " ant", " bee", "x"]


def expected_scores(reference: Any, llm: LLM, prompt: str, ending: str = "") -> list[float]:
    """Log-probabilities of the ending's tokens, or of all but the first of the prompt's."""
    first, tail = list(llm.tokenizer.encode(prompt)), list(llm.tokenizer.encode(ending))
    tokens = first + tail
    start = len(first) if tail else 1
    rows = logprobs(reference, tokens)
    return [float(rows[place - 1, tokens[place]]) for place in range(start, len(tokens))]


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("chunk", [2048, 5])
def test_scores_are_those_of_transformers(tiny: Path, reference: Any, sharing: Any, chunk: int) -> None:
    llm = LLM(tiny, sharing=sharing, max_num_batched_tokens=chunk)
    prompts = [QUESTION, QUESTION + " large", "Other", "x"]
    for _ in range(2):  # cold, then with prefixes in the cache
        for prompt, output in zip(prompts, llm.score(prompts), strict=True):
            assert output.token_logprobs is not None
            assert output.token_logprobs[0] is None
            assert output.token_logprobs[1:] == pytest.approx(expected_scores(reference, llm, prompt), abs=1e-4)
            assert output.continuations == []
        for prompt, output in zip(prompts, llm.score(prompts, ENDINGS), strict=True):
            assert output.token_logprobs is None
            assert [each.text for each in output.continuations] == ENDINGS
            for ending, each in zip(ENDINGS, output.continuations, strict=True):
                scores = expected_scores(reference, llm, prompt, ending)
                assert each.token_ids == list(llm.tokenizer.encode(ending))
                assert each.token_logprobs == pytest.approx(scores, abs=1e-4)
                assert each.logprob == pytest.approx(sum(scores), abs=1e-3)
        assert_idle(llm.engine)


def test_one_list_of_endings_per_prompt(llm: LLM, reference: Any) -> None:
    prompts, endings = [QUESTION, "Other"], [[" spider"], [" a", " bee", " cat"]]
    for prompt, texts, output in zip(prompts, endings, llm.score(prompts, endings), strict=True):
        assert output.prompt_token_ids == list(llm.tokenizer.encode(prompt))
        for text, each in zip(texts, output.continuations, strict=True):
            assert each.token_logprobs == pytest.approx(expected_scores(reference, llm, prompt, text), abs=1e-4)


def test_best_is_the_likeliest(llm: LLM, reference: Any) -> None:
    (output,) = llm.score(QUESTION, ENDINGS)
    totals = [sum(expected_scores(reference, llm, QUESTION, ending)) for ending in ENDINGS]
    assert output.best == totals.index(max(totals))


def test_the_common_prompt_is_computed_once(tiny: Path) -> None:
    llm = LLM(tiny)
    llm.score(QUESTION, ENDINGS)
    length = len(llm.tokenizer.encode(QUESTION))
    # Each ending needs the prompt's last token for its own first logits, and not its own last token.
    each = sum(len(llm.tokenizer.encode(ending)) for ending in ENDINGS)
    assert llm.stats().computed_tokens == length - 1 + each
    llm.score(QUESTION, ENDINGS)
    assert llm.stats().computed_tokens == length - 1 + 2 * each


def test_a_single_token_has_no_score(llm: LLM) -> None:
    """Nothing precedes it, so there is nothing to compute; with others in the batch or without."""
    assert [output.token_logprobs for output in llm.score(["x"])] == [[None]]
    alone, other = llm.score(["x", "xy"])
    assert alone.token_logprobs == [None]
    assert other.token_logprobs is not None and len(other.token_logprobs) == 2
    assert_idle(llm.engine)


def test_a_text_may_fill_the_context(llm: LLM) -> None:
    (output,) = llm.score({"prompt_token_ids": [3] * 128})
    assert output.token_logprobs is not None and len(output.token_logprobs) == 128
    assert len(llm.score({"prompt_token_ids": [3] * 127}, ["x"])[0].continuations) == 1
    with pytest.raises(PromptTooLongError, match="prompt-0"):
        llm.score({"prompt_token_ids": [3] * 127}, ["xy"])


def test_little_memory_changes_nothing(tiny: Path, llm: LLM) -> None:
    prompts = [QUESTION * 2 + str(number) for number in range(6)]
    small = LLM(tiny, memory=200 * llm.engine.runner.layout.bytes_per_token)
    for few, many in zip(small.score(prompts, ENDINGS), llm.score(prompts, ENDINGS), strict=True):
        for one, other in zip(few.continuations, many.continuations, strict=True):
            assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-4)
    assert small.stats().kv_bytes_peak <= small.engine.budget.total
    assert_idle(small.engine)


@pytest.mark.parametrize("bad", [[], ["x", ""], ["\ud800"], [3], 7, "yes", [["x"]], None])
def test_bad_endings_fail_their_prompt_alone(llm: LLM, bad: Any) -> None:
    """A string in place of a list would otherwise be scored letter by letter."""
    outputs = llm.score(["one", "two"], [["x"], bad], on_error="return")
    assert outputs[0].error is None and len(outputs[0].continuations) == 1
    assert isinstance(outputs[1].error, InvalidPromptError)
    assert "prompt-1" in str(outputs[1].error)
    assert "continuations" in str(outputs[1].error)
    with pytest.raises(InvalidPromptError) as caught:
        llm.score(["one", "two"], [["x"], bad])
    assert len(caught.value.outputs) == 2
    assert_idle(llm.engine)


@pytest.mark.parametrize("bad", ["yes", 5, [["x"]], [["x"]] * 3])
def test_endings_that_do_not_match_the_prompts(llm: LLM, bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="continuations"):
        llm.score(["one", "two"], bad)
    assert_idle(llm.engine)


def test_no_endings_at_all(llm: LLM) -> None:
    with pytest.raises(InvalidPromptError, match="prompt-0: continuations is empty"):
        llm.score("one", [])
    assert llm.score([]) == []


@pytest.fixture(scope="module")
def spaced(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    """A model whose tokenizer puts a space in front of a text."""
    return LLM(metaspace_tokenizer.save_llama(tmp_path_factory.mktemp("spaced")))


def ids_of(output: ScoreOutput) -> list[list[int]]:
    return [each.token_ids for each in output.continuations]


@pytest.mark.parametrize("prompt", ["dog", "ok dog", {"prompt": "dog"}, {"prompt_token_ids": [1, IDS["▁dog"]]}])
def test_an_ending_has_the_tokens_that_it_adds_to_the_prompt(spaced: LLM, prompt: Any) -> None:
    endings = ["!", "s", "\n", " dog", "é", " ok!"]
    (output,) = spaced.score(prompt, endings, use_tqdm=False)
    encode = spaced.tokenizer.encode
    assert ids_of(output) == [encode("dog" + ending)[len(encode("dog")) :] for ending in endings]


def test_an_ending_that_melts_into_the_prompt_gets_no_space_of_its_own(spaced: LLM) -> None:
    (output,) = spaced.score("do", ["g", "gs"], use_tqdm=False)
    assert ids_of(output) == [[IDS["g"]], [IDS["g"], IDS["s"]]]


def test_a_delimiter_stands_before_texts_and_is_scored_with_them(spaced: LLM) -> None:
    endings = ["dog", "ok"]
    (given,) = spaced.score("dog", [" dog", " ok"], use_tqdm=False)
    (output,) = spaced.score("dog", endings, use_tqdm=False, delimiter=" ")
    assert ids_of(output) == ids_of(given)
    assert [each.text for each in output.continuations] == endings
    assert output.continuations[0].logprob == pytest.approx(given.continuations[0].logprob, abs=1e-4)


def test_endings_may_be_token_ids(spaced: LLM) -> None:
    (texts,) = spaced.score("dog", [" dog", "s"], use_tqdm=False)
    ids = ids_of(texts)
    tensors = [torch.tensor(each) for each in ids]
    for endings in (ids, tensors, [ids], [ids[0], "s"]):
        (output,) = spaced.score("dog", endings, use_tqdm=False, delimiter="")
        assert ids_of(output) == ids
        scores = [each.logprob for each in texts.continuations]
        assert [each.logprob for each in output.continuations] == pytest.approx(scores, abs=1e-4)
    assert [each.text for each in output.continuations] == [None, "s"]
    one, other = spaced.score(["dog", "ok"], [[[IDS["s"]]], [[IDS["!"], IDS["s"]]]], use_tqdm=False)
    assert (ids_of(one), ids_of(other)) == ([[IDS["s"]]], [[IDS["!"], IDS["s"]]])


@pytest.mark.parametrize("ending", [[True], [10**9], [-1], "", 5])
def test_what_is_no_ending_is_refused_by_its_place(spaced: LLM, ending: Any) -> None:
    with pytest.raises(InvalidPromptError, match=r"continuations\[1\]"):
        spaced.score("dog", [["s", ending]], use_tqdm=False)
