"""Generation through the public API: what transformers answers, what the parameters promise, what streams show."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from gossamer import LLM, SamplingParams
from gossamer.errors import ConfigurationError, InvalidPromptError
from gossamer.options import SHARING_MODES
from gossamer.outputs import Logprob, RequestOutput
from references import assert_idle, greedy, logprobs

PREAMBLE = "A gossamer thread is fine, but it holds a drop. "
PROMPTS = [PREAMBLE + "One", PREAMBLE + "Two spiders", PREAMBLE, "Something else", PREAMBLE + "Two spiders", "x"]
CONTEXT = 128


@pytest.fixture(scope="module")
def letters(llm: LLM) -> dict[int, float]:
    """A bias that leaves only the letters a to d, so that texts are readable and strings recur."""
    allowed = {llm.tokenizer.encode(letter)[0] for letter in "abcd"}
    return {token: -1000.0 for token in range(257) if token not in allowed}


def encode(llm: LLM, text: str) -> list[int]:
    return list(llm.tokenizer.encode(text))


def tokens_of(outputs: list[RequestOutput]) -> list[list[int]]:
    return [completion.token_ids for output in outputs for completion in output.outputs]


# --- tokens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("chunk", [2048, 7])
def test_greedy_is_that_of_transformers(tiny: Path, reference: Any, sharing: Any, chunk: int) -> None:
    llm = LLM(tiny, sharing=sharing, max_num_batched_tokens=chunk)
    outputs = llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=24))
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        expected = greedy(reference, encode(llm, prompt), 24)
        assert output.prompt == prompt
        assert output.prompt_token_ids == encode(llm, prompt)
        assert output.outputs[0].token_ids == expected
        assert output.outputs[0].text == llm.tokenizer.decode(expected, skip_special_tokens=True)
    assert_idle(llm.engine)


def test_the_context_is_the_limit_without_max_tokens(llm: LLM, reference: Any) -> None:
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    prompts = [PREAMBLE, {"prompt_token_ids": [5] * (CONTEXT - 1)}]
    long, short = (output.outputs[0] for output in llm.generate(prompts, params))
    prompt = encode(llm, PREAMBLE)
    assert long.token_ids == greedy(reference, prompt, CONTEXT - len(prompt), eos_token_id=None)
    assert (len(short.token_ids), short.finish_reason, long.finish_reason) == (1, "length", "length")


def test_max_tokens_beyond_the_context_are_cut(llm: LLM) -> None:
    (output,) = llm.generate({"prompt_token_ids": [5] * 120}, SamplingParams(max_tokens=1000, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == CONTEXT - 120
    assert output.outputs[0].finish_reason == "length"


# --- several completions and random streams --------------------------------------------------------------------------


def test_completions_share_one_prefill(tiny: Path) -> None:
    llm = LLM(tiny)
    length, count = len(encode(llm, PREAMBLE)), 8
    (output,) = llm.generate(PREAMBLE, SamplingParams(n=5, max_tokens=count, ignore_eos=True))
    # All but the last token of the prompt once; the last by each completion, for its logits. The last token that is
    # generated is never fed.
    assert llm.stats().computed_tokens == length - 1 + 5 * count
    assert [completion.index for completion in output.outputs] == [0, 1, 2, 3, 4]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 5
    assert_idle(llm.engine)


def test_greedy_completions_are_equal(llm: LLM) -> None:
    (output,) = llm.generate(PREAMBLE, SamplingParams(n=3, temperature=0, max_tokens=8))
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 1


@pytest.mark.parametrize("sharing", SHARING_MODES)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"max_num_seqs": 2}])
def test_a_seed_gives_the_same_completions_in_any_company(tiny: Path, llm: LLM, sharing: Any, options: Any) -> None:
    """Other batches change logits by about 1e-6, so one draw in some 1e5 may fall on the other side of a boundary.

    These are 240 draws, with fixed seeds: on one machine the outcome never changes.
    """
    params = [
        SamplingParams(n=2, seed=seed, max_tokens=20, temperature=t, top_p=p, ignore_eos=True)
        for seed, t, p in ((1, 1.0, 1.0), (2, 0.7, 0.9), (1, 1.3, 1.0))
    ]
    alone = [tokens_of(llm.generate(prompt, p)) for prompt, p in zip(PROMPTS, params, strict=False)]
    other = LLM(tiny, sharing=sharing, seed=99, **options)
    company = [SamplingParams(max_tokens=9)] * 3
    together = other.generate(PROMPTS, params + company)
    assert [tokens_of([output]) for output in together[:3]] == alone
    assert_idle(other.engine)


def test_requests_without_a_seed_differ_and_follow_the_engine_seed(tiny: Path) -> None:
    def draw(seed: int) -> list[list[int]]:
        return tokens_of(LLM(tiny, seed=seed).generate([PREAMBLE] * 3, SamplingParams(max_tokens=10)))

    first = draw(0)
    assert first == draw(0)
    assert len({tuple(tokens) for tokens in first + draw(1)}) == 6


# --- endings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_may_span_tokens(llm: LLM, letters: dict[int, float], include: bool) -> None:
    free = SamplingParams(seed=3, max_tokens=40, logit_bias=letters)
    text = llm.generate(PREAMBLE, free)[0].outputs[0].text
    assert len(text) == 40 and set(text) <= set("abcd")
    stop = text[17:20]
    params = SamplingParams(
        seed=3, max_tokens=40, logit_bias=letters, stop=["zz", stop], include_stop_str_in_output=include
    )
    completion = llm.generate(PREAMBLE, params)[0].outputs[0]
    first = text.index(stop)
    assert completion.text == text[: first + (len(stop) if include else 0)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert len(completion.token_ids) == first + len(stop)


def test_min_tokens_postpone_a_stop_string(llm: LLM, letters: dict[int, float]) -> None:
    text = llm.generate(PREAMBLE, SamplingParams(seed=3, max_tokens=40, logit_bias=letters))[0].outputs[0].text
    stop = text[2]
    params = SamplingParams(seed=3, max_tokens=40, min_tokens=10, logit_bias=letters, stop=stop)
    assert llm.generate(PREAMBLE, params)[0].outputs[0].text == text[: text.index(stop, 10)]


def test_stop_token_ids_end_the_text_before_them(llm: LLM, reference: Any) -> None:
    free = greedy(reference, encode(llm, PREAMBLE), 20, eos_token_id=None)
    place = next(i for i in range(3, 20) if free[i] not in free[:i])
    params = {"temperature": 0, "max_tokens": 20, "ignore_eos": True, "stop_token_ids": [free[place]]}
    hidden = llm.generate(PREAMBLE, SamplingParams(**params))[0].outputs[0]
    assert hidden.token_ids == free[: place + 1]
    assert hidden.text == llm.tokenizer.decode(free[:place])
    assert (hidden.finish_reason, hidden.stop_reason) == ("stop", free[place])
    shown = llm.generate(PREAMBLE, SamplingParams(**params, include_stop_str_in_output=True))[0].outputs[0]
    assert shown.text == llm.tokenizer.decode(free[: place + 1])


def test_the_end_of_sequence_token(llm: LLM, reference: Any) -> None:
    """A bias makes it likely: then it stops, unless it is ignored, or banned before ``min_tokens``."""
    prompt, bias = encode(llm, PREAMBLE), {0: 100.0}
    common: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "logit_bias": bias}
    ended = llm.generate(PREAMBLE, SamplingParams(**common))[0].outputs[0]
    assert (ended.token_ids, ended.text, ended.finish_reason, ended.stop_reason) == ([0], "", "stop", None)
    ignored = llm.generate(PREAMBLE, SamplingParams(**common, ignore_eos=True))[0].outputs[0]
    assert (ignored.token_ids, ignored.finish_reason) == ([0] * 6, "length")
    shown = llm.generate(PREAMBLE, SamplingParams(**common, ignore_eos=True, skip_special_tokens=False))[0].outputs[0]
    assert (ignored.text, shown.text) == ("", "<eos>" * 6)
    banned = llm.generate(PREAMBLE, SamplingParams(**common, min_tokens=4))[0].outputs[0]
    sequence_bias = SequenceBiasLogitsProcessor({(0,): 100.0})
    assert banned.token_ids == greedy(reference, prompt, 6, min_new_tokens=4, logits_processor=[sequence_bias])
    assert (len(banned.token_ids), banned.finish_reason) == (5, "stop")


# --- log-probabilities -----------------------------------------------------------------------------------------------


def assert_entry(entry: dict[int, Logprob], expected: torch.Tensor, chosen: int, count: int) -> None:
    """One position's mapping against log-probabilities (V,): the chosen token first, then the ``count`` best."""
    ranking = expected.argsort(descending=True).tolist()
    assert list(entry) == list(dict.fromkeys([chosen, *ranking[:count]]))
    for token, value in entry.items():
        assert value.logprob == pytest.approx(float(expected[token]), abs=1e-4)
        assert value.rank == ranking.index(token) + 1
        assert value.decoded_token is not None


@pytest.mark.parametrize("count", [0, 1, 4])
def test_logprobs_are_those_of_transformers(llm: LLM, reference: Any, count: int) -> None:
    params = SamplingParams(seed=5, max_tokens=10, logprobs=count, ignore_eos=True, top_k=20, temperature=2.0)
    for output in llm.generate(PROMPTS, params):
        (completion,) = output.outputs
        expected = logprobs(reference, output.prompt_token_ids + completion.token_ids)
        expected = expected[len(output.prompt_token_ids) - 1 : -1]
        assert completion.logprobs is not None and completion.cumulative_logprob is not None
        for entry, row, token in zip(completion.logprobs, expected, completion.token_ids, strict=True):
            assert_entry(entry, row, token, count)
        total = sum(float(row[token]) for row, token in zip(expected, completion.token_ids, strict=True))
        assert completion.cumulative_logprob == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("chunk", [2048, 5])
def test_prompt_logprobs_are_those_of_transformers(tiny: Path, reference: Any, n: int, chunk: int) -> None:
    llm = LLM(tiny, max_num_batched_tokens=chunk)
    llm.generate(PROMPTS, SamplingParams(max_tokens=1))  # what is cached must not be missing from the answer
    params = SamplingParams(n=n, temperature=0, max_tokens=4, prompt_logprobs=2, ignore_eos=True)
    for output in llm.generate([*PROMPTS, {"prompt_token_ids": [7]}], params):
        prompt = output.prompt_token_ids
        expected = logprobs(reference, prompt)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        for place, entry in enumerate(output.prompt_logprobs[1:]):
            assert entry is not None
            assert_entry(entry, expected[place], prompt[place + 1], 2)
        assert [c.token_ids for c in output.outputs] == [greedy(reference, prompt, 4, eos_token_id=None)] * n
    assert_idle(llm.engine)


def test_without_logprobs_there_are_none(llm: LLM) -> None:
    (output,) = llm.generate(PREAMBLE, SamplingParams(max_tokens=2))
    assert output.prompt_logprobs is None
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


# --- penalties, bias, text -------------------------------------------------------------------------------------------


class OutputPenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which count the output only."""

    def __init__(self, prompt_length: int, presence: float, frequency: float) -> None:
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        counts = torch.bincount(input_ids[0, self.prompt_length :], minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"presence_penalty": 1.5, "frequency_penalty": 0.5},
        {"logit_bias": {17: 4.0, 30: 3.0, 200: -5.0}},
        {"repetition_penalty": 1.2, "presence_penalty": -0.5, "frequency_penalty": 1.0, "logit_bias": {17: 4.0}},
    ],
)
def test_penalties_and_bias_are_those_of_a_transformers_loop(llm: LLM, reference: Any, options: dict[str, Any]) -> None:
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True, **options)
    plain = tokens_of(llm.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)))
    changed = tokens_of(llm.generate(PROMPTS, params))
    assert sum(a != b for a, b in zip(plain, changed, strict=True)) >= len(PROMPTS) - 1
    for prompt, tokens in zip(PROMPTS, changed, strict=True):
        ids = encode(llm, prompt)
        processors = LogitsProcessorList()
        if params.logit_bias:
            processors.append(SequenceBiasLogitsProcessor({(t,): b for t, b in params.logit_bias.items()}))
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
        processors.append(OutputPenalty(len(ids), params.presence_penalty, params.frequency_penalty))
        assert tokens == greedy(reference, ids, 30, eos_token_id=None, logits_processor=processors)


def test_text_is_left_out_without_detokenize(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, detokenize=False, speculation=False)
    completion = llm.generate(PREAMBLE, params)[0].outputs[0]
    assert (completion.text, len(completion.token_ids)) == ("", 5)
    assert [len(output.outputs[0].token_ids) for output in llm.stream(PREAMBLE, params)] == [1, 2, 3, 4, 5]


# --- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"n": 3}, {"stop": ["bac", "dd"]}, {"stop": "cab", "include_stop_str_in_output": True}]
)
@pytest.mark.parametrize("readable", [False, True])
def test_each_streamed_text_extends_the_former(
    llm: LLM, letters: dict[int, float], options: dict[str, Any], readable: bool
) -> None:
    params = SamplingParams(seed=4, max_tokens=60, logit_bias=letters if readable else None, **options)
    outputs = list(llm.stream(PREAMBLE, params))
    (whole,) = llm.generate(PREAMBLE, params)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert outputs[-1].outputs == whole.outputs
    for former, latter in itertools.pairwise(outputs):
        for old, new in zip(former.outputs, latter.outputs, strict=True):
            assert new.text.startswith(old.text)
            assert new.token_ids[: len(old.token_ids)] == old.token_ids
    assert len(outputs) <= max(len(completion.token_ids) for completion in whole.outputs)  # a draft brings several
    assert_idle(llm.engine)


def test_leaving_a_stream_frees_everything(llm: LLM) -> None:
    for output in llm.stream(PREAMBLE, SamplingParams(n=2, max_tokens=50, ignore_eos=True)):
        if len(output.outputs[0].token_ids) == 3:
            break
    assert_idle(llm.engine)


def test_streams_may_be_interleaved(llm: LLM, reference: Any) -> None:
    """Whoever asks first moves the engine for all; another call may come in between."""
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    streams = [llm.stream(prompt, params) for prompt in PROMPTS[:3]]
    last: list[Any] = [None] * 3
    for outputs in itertools.zip_longest(*streams):
        last = [new or old for new, old in zip(outputs, last, strict=True)]
        if len(last[0].outputs[0].token_ids) == 5:
            llm.generate(PROMPTS[3], SamplingParams(max_tokens=3))
    for prompt, output in zip(PROMPTS[:3], last, strict=True):
        assert output.finished
        assert output.outputs[0].token_ids == greedy(reference, encode(llm, prompt), 12, eos_token_id=None)
    assert_idle(llm.engine)


# --- conversations and several engines -------------------------------------------------------------------------------


def test_chat_renders_the_template(tiny: Path, llm: LLM) -> None:
    other = LLM(tiny)
    with pytest.raises(ConfigurationError, match="no chat template"):
        other.chat([{"role": "user", "content": "Hi"}])
    other.tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'critic' %}{{ raise_exception('no critics') }}{% endif %}"
        "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    params = SamplingParams(temperature=0, max_tokens=8)
    conversation = [{"role": "user", "content": "Hi"}]
    (single,) = other.chat(conversation, params)
    assert single.prompt_token_ids == encode(other, "[user]Hi[assistant]")
    many = other.chat([conversation, [*conversation, {"role": "user", "content": "Ho"}]], params)
    assert [tokens_of([output]) for output in many] == [
        tokens_of(llm.generate(text, params)) for text in ("[user]Hi[assistant]", "[user]Hi[user]Ho[assistant]")
    ]
    with pytest.raises(InvalidPromptError, match="no critics"):
        other.chat([{"role": "critic", "content": "?"}])
    assert_idle(other.engine)


def test_engines_may_take_turns(tiny: Path, reference: Any) -> None:
    """Nothing of a step is left behind in the process: other engines step in between, in other modes."""
    engines = [LLM(tiny, sharing=mode).engine for mode in SHARING_MODES]
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    for number, engine in enumerate(engines):
        for place, prompt in enumerate(PROMPTS[number:]):
            engine.add_request(str(place), prompt, params)
    done: list[dict[str, RequestOutput]] = [{} for _ in engines]
    while any(engine.has_unfinished_requests() for engine in engines):
        for outputs, engine in zip(done, engines, strict=True):
            outputs.update((o.request_id, o) for o in engine.step() if isinstance(o, RequestOutput))
    for number, (outputs, engine) in enumerate(zip(done, engines, strict=True)):
        assert len(outputs) == len(PROMPTS) - number
        for output in outputs.values():
            expected = greedy(reference, output.prompt_token_ids, 10, eos_token_id=None)
            assert output.outputs[0].token_ids == expected
        assert_idle(engine)
