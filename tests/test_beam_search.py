"""Beam search finds the hypotheses and scores of transformers' ``generate(num_beams=..., early_stopping=False)``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer import LLM, BeamSearchParams
from gossamer.errors import RequestError
from gossamer.options import SHARING_MODES
from gossamer.outputs import BeamSearchOutput
from references import assert_idle, generate, logprobs

VOCAB = 24
END = (0, 18, 20)  # tokens that this model likes
PROMPTS = [[3, 7, 1, 9, 9, 2], [3, 7, 1, 9, 9, 2, 5], [11], [3, 7, 4] * 6]


@pytest.fixture(scope="module")
def tiny(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few tokens, so that the end-of-sequence token comes early and often; sharp logits, so that nothing ties."""
    return make_tiny_llama(
        tmp_path_factory.mktemp("beam"), initializer_range=0.5, vocab_size=VOCAB, eos_token_id=list(END)
    )


def ids(prompts: list[list[int]]) -> list[Any]:
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def assert_equal_to_transformers(reference: Any, output: BeamSearchOutput, params: BeamSearchParams) -> None:
    assert output.error is None
    prompt = output.prompt_token_ids
    expected = generate(
        reference,
        prompt,
        num_beams=params.beam_width,
        num_return_sequences=params.beam_width,
        max_new_tokens=params.max_tokens,
        length_penalty=params.length_penalty,
        early_stopping=False,
        eos_token_id=None if params.ignore_eos else list(END),
        return_dict_in_generate=True,
        output_scores=True,
    )
    assert len(output.sequences) == params.beam_width
    for place, sequence in enumerate(output.sequences):
        tokens = expected.sequences[place, len(prompt) :].tolist()
        if not params.ignore_eos:
            end = next((i for i, token in enumerate(tokens) if token in END), len(tokens))
            tokens = tokens[: end + 1]  # the rest is padding
        assert sequence.token_ids == tokens
        assert sequence.finish_reason == ("stop" if tokens[-1] in END and not params.ignore_eos else "length")
        rows = logprobs(reference, prompt + tokens)[len(prompt) - 1 : -1]
        total = sum(float(row[token]) for row, token in zip(rows, tokens, strict=True))
        assert sequence.cumulative_logprob == pytest.approx(total, abs=1e-3)
        share = len(tokens) ** params.length_penalty
        assert sequence.score == pytest.approx(total / share, abs=1e-3 / share)
        if params.beam_width > 1:  # with one beam, transformers searches greedily and gives no scores
            assert sequence.score == pytest.approx(float(expected.sequences_scores[place]), abs=1e-4)


@pytest.mark.parametrize("width", [1, 2, 4])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("ignore_eos", [False, True])
def test_hypotheses_are_those_of_transformers(
    llm: LLM, reference: Any, width: int, length_penalty: float, ignore_eos: bool
) -> None:
    """Several prompts at once, which share prefixes."""
    params = BeamSearchParams(beam_width=width, max_tokens=12, length_penalty=length_penalty, ignore_eos=ignore_eos)
    outputs = llm.beam_search(ids(PROMPTS), params)
    for output in outputs:
        assert_equal_to_transformers(reference, output, params)
    if width > 1 and not ignore_eos:
        assert any(s.finish_reason == "stop" and len(s.token_ids) < 6 for o in outputs for s in o.sequences)
    assert_idle(llm.engine)


@pytest.mark.parametrize("width", [1, 3, VOCAB])
def test_one_token(llm: LLM, reference: Any, width: int) -> None:
    params = BeamSearchParams(beam_width=width, max_tokens=1)
    for output in llm.beam_search(ids(PROMPTS), params):
        assert_equal_to_transformers(reference, output, params)


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 3}, {"max_num_seqs": 6}])
def test_in_every_mode(tiny: Path, reference: Any, sharing: Any, options: Any) -> None:
    llm = LLM(tiny, sharing=sharing, **options)
    params = BeamSearchParams(beam_width=4, max_tokens=10)
    for output in llm.beam_search(ids(PROMPTS), params):
        assert_equal_to_transformers(reference, output, params)
    assert_idle(llm.engine)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_fewer_sequences_at_a_time_than_beams(tiny: Path, reference: Any, limit: int) -> None:
    llm = LLM(tiny, max_num_seqs=limit)
    params = BeamSearchParams(beam_width=4, max_tokens=6)
    for output in llm.beam_search(ids(PROMPTS[:2]), params):
        assert_equal_to_transformers(reference, output, params)
    assert_idle(llm.engine)


@pytest.mark.parametrize("tokens", [400, 600])
@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_little_memory_changes_nothing_but_the_time(
    tiny: Path, llm: LLM, reference: Any, tokens: int, sharing: Any
) -> None:
    """Hypotheses are preempted and computed again."""
    small = LLM(tiny, sharing=sharing, memory=tokens * llm.engine.runner.layout.bytes_per_token)
    params = BeamSearchParams(beam_width=4, max_tokens=80, ignore_eos=True)
    for output in small.beam_search(ids(PROMPTS), params):
        assert_equal_to_transformers(reference, output, params)
    assert small.stats().preemptions
    assert small.engine.budget.peak <= small.engine.budget.total
    assert_idle(small.engine)


def test_the_context_is_the_limit(llm: LLM, reference: Any) -> None:
    prompt = [2] * 120
    (output,) = llm.beam_search(ids([prompt]), BeamSearchParams(beam_width=2, max_tokens=50, ignore_eos=True))
    assert_equal_to_transformers(reference, output, BeamSearchParams(beam_width=2, max_tokens=8, ignore_eos=True))


def test_the_prompt_is_computed_once(tiny: Path) -> None:
    llm = LLM(tiny)
    llm.beam_search(ids([PROMPTS[3]]), BeamSearchParams(beam_width=4, max_tokens=5, ignore_eos=True))
    assert llm.stats().computed_tokens == len(PROMPTS[3]) + 4 * 4


def test_a_bad_prompt_fails_alone(llm: LLM) -> None:
    params = BeamSearchParams(beam_width=2, max_tokens=3)
    outputs = llm.beam_search(ids([PROMPTS[0], [VOCAB], [], [1] * 128]), params, on_error="return")
    assert [output.error is None for output in outputs] == [True, False, False, False]
    assert len(outputs[0].sequences) == 2
    for bad in (None, {"beam_width": 2}):
        with pytest.raises(RequestError, match="BeamSearchParams"):
            llm.beam_search(ids([PROMPTS[0]]), bad)  # type: ignore[arg-type]
    assert_idle(llm.engine)
