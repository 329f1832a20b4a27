"""Whatever tokens come, and wherever a stop string lies: an answer's text, its pieces and its tokens agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

import metaspace_tokenizer
from gossamer import LLM, SamplingParams
from gossamer.engine.completion_text import describe_prompt, extend_text
from gossamer.engine.detokenizer import IncrementalDetokenizer, decode
from gossamer.engine.results import ResultBuilder
from gossamer.engine.sequence import Request, Sequence
from gossamer.engine.stopping import StopChecker
from gossamer.engine.token_bytes import EACH_BYTE, TokenBytes
from gossamer.outputs import Logprob, RequestOutput
from gossamer.protocol import ChatCompletionRequest, CompletionRequest
from gossamer.sampling_params import BeamSearchParams

IDS, FIRST_BYTE = metaspace_tokenizer.IDS, metaspace_tokenizer.FIRST_BYTE
END = IDS["</s>"]
VOCABULARY = TokenBytes(metaspace_tokenizer.make_tokenizer())
HELLO = [{"role": "user", "content": "Hello"}]
LETTERS = "éሰ👩🏽‍🚀 a"
PROMPT = [IDS["<s>"], IDS["▁dog"], IDS["▁ok"]]


@dataclass(frozen=True)
class Language:
    """A tokenizer with a prompt, two tokens that are more probable than any chosen one, and what decodes all tokens."""

    vocabulary: TokenBytes
    prompt: list[int]
    likely: tuple[int, int]
    end: int
    tokens: st.SearchStrategy[Any]
    whole: Callable[[list[int]], str]
    errors: str

    def draw(self, data: st.DataObject) -> list[int]:
        """Random tokens, many of them parts of characters."""
        drawn = data.draw(st.lists(self.tokens, min_size=1, max_size=30))
        return [token for each in drawn for token in (each if isinstance(each, list) else [each])]

    def decode(self, ids: list[int], **options: Any) -> str:
        return decode(self.vocabulary, ids, unfinished=True, **options)

    def special(self) -> set[str]:
        return {self.vocabulary.spelling(token) for token in range(300) if self.vocabulary.is_special(token)}


SPACED = Language(
    VOCABULARY,
    PROMPT,
    (IDS["ok"], IDS["▁ok"]),
    END,
    st.one_of(
        st.sampled_from(sorted(IDS.values())),
        st.sampled_from(list(LETTERS)).map(lambda letter: [FIRST_BYTE + byte for byte in letter.encode()]),
        st.sampled_from([FIRST_BYTE + byte for byte in LETTERS.encode()]),
    ),
    metaspace_tokenizer.decode,
    EACH_BYTE,
)


@pytest.fixture(scope="module", params=["sentencepiece", "byte-level"])
def language(request: pytest.FixtureRequest, smollm2_path: Path) -> Language:
    if request.param == "sentencepiece":
        return SPACED
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    return Language(
        TokenBytes(tokenizer),
        tokenizer.encode("<|im_start|>user\nA dog"),
        (tokenizer.encode("ok")[0], tokenizer.encode(" ok")[0]),
        tokenizer.eos_token_id,
        st.one_of(
            st.integers(0, 600),  # special tokens and bytes
            st.integers(0, len(tokenizer) - 1),
            st.sampled_from([*LETTERS, "🏳️‍🌈", " 你好", "हिन्दी"]).map(tokenizer.encode),
        ),
        partial(tokenizer.decode, skip_special_tokens=True),
        "replace",
    )


def answer(
    prompt: list[int], ids: list[int], params: SamplingParams, language: Language = SPACED
) -> list[RequestOutput]:
    """The outputs of a request that generates ``ids``, one after each token, as the engine makes them."""
    vocabulary = language.vocabulary
    request = Request("r", 0, None, prompt, params, stream=True)
    sequence = Sequence(request, 0, list(prompt), shareable=0, generate=True, max_new_tokens=len(ids))
    sequence.stop = StopChecker(params, frozenset({language.end}), len(ids))
    sequence.detokenizer = IncrementalDetokenizer(vocabulary, params.skip_special_tokens, prompt)
    request.sequences.append(sequence)
    if params.prompt_logprobs is not None:
        sequence.top_scores = [{token: Logprob(-0.5, 1)} for token in prompt[1:]]
        describe_prompt(sequence, 1, vocabulary, sequence.top_scores)
    outputs = []
    for token in ids:
        sequence.tokens.append(token)
        sequence.output_ids.append(token)
        first, second = language.likely
        candidates = {token: Logprob(-2.0, 3), first: Logprob(-0.5, 1), second: Logprob(-1.0, 2)}
        candidates[token] = Logprob(-2.0, 3)
        stop = extend_text(sequence, vocabulary, candidates, sequence.stop.check_token(token, len(sequence.output_ids)))
        if stop is not None:
            sequence.finish_reason, sequence.stop_reason = stop.finish_reason, stop.stop_reason
        outputs.append(ResultBuilder(vocabulary).build(request))
        if stop is not None:
            break
    return outputs


def streamed(body: Any, outputs: list[RequestOutput], every: int, language: Language) -> list[dict[str, Any]]:
    """The choices of the events that a client gets which reads at every so many tokens."""
    events = body.events(model="m", decode=language.decode)
    read = [*outputs[:-1][::-every][::-1], outputs[-1]]
    return [json.loads(event[6:])["choices"][0] for output in read for event in events.events(0, output)]


def whole(body: Any, outputs: list[RequestOutput], language: Language = SPACED) -> dict[str, Any]:
    return body.answer(outputs[-1:], model="m", decode=language.decode)["choices"][0]


def assert_offsets(text: str, logprobs: dict[str, Any], special: set[str]) -> None:
    """Each token stands in the text where it is said to, but for those that are no part of it."""
    for token, offset in zip(logprobs["tokens"], logprobs["text_offset"], strict=True):
        assert text.startswith(token, offset) or token in special


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_completion_its_tokens_and_its_stream_agree(language: Language, data: st.DataObject) -> None:
    prompt, ids = language.prompt, language.draw(data)
    every, echo = data.draw(st.integers(1, 4)), data.draw(st.booleans())
    body = CompletionRequest.parse({"prompt": prompt, "logprobs": 1, "max_tokens": len(ids), "echo": echo})
    outputs = answer(prompt, ids, body.to_sampling_params(), language)
    choice = whole(body, outputs, language)
    used = outputs[-1].outputs[0].token_ids
    visible = used[:-1] if used[-1] == language.end else used
    begin = 0 if echo else len(language.whole(prompt))
    assert choice["text"] == language.whole(prompt + visible)[begin:]
    logprobs, special = choice["logprobs"], language.special()
    assert_offsets(choice["text"], logprobs, special)
    shown = [
        token
        for token, number in zip(logprobs["tokens"], (prompt if echo else []) + used, strict=True)
        if not language.vocabulary.is_special(number)
    ]
    assert "".join(shown) == choice["text"]
    for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert top is None or (token in top and len(top) <= 2)
    events = streamed(body, outputs, every, language)
    assert "".join(event["text"] for event in events) == choice["text"]
    for name, values in logprobs.items():
        assert [each for event in events for each in event["logprobs"][name]] == values
    length = 0
    for event in events:  # no token comes before its text
        length += len(event["text"])
        assert_offsets(choice["text"][:length], event["logprobs"], special)


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_bytes_of_a_chats_tokens_are_those_of_its_text(language: Language, data: st.DataObject) -> None:
    ids, every = language.draw(data), data.draw(st.integers(1, 4))
    body = ChatCompletionRequest.parse({"messages": HELLO, "logprobs": True, "top_logprobs": 2, "max_tokens": len(ids)})
    outputs = answer(language.prompt, ids, body.to_sampling_params(), language)
    choice = whole(body, outputs, language)
    content, text = choice["logprobs"]["content"], choice["message"]["content"]
    assert "".join(entry["token"] for entry in content) == text
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode(errors=language.errors) == text
    for entry in content:
        ranked = entry["top_logprobs"]
        assert {key: entry[key] for key in ("token", "logprob", "bytes")} in ranked
        assert 2 <= len(ranked) <= 3
    events = streamed(body, outputs, every, language)
    assert "".join(event["delta"].get("content", "") for event in events) == text
    assert [each for event in events for each in (event.get("logprobs") or {"content": []})["content"]] == content


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_stop_string_cuts_no_character(language: Language, data: st.DataObject) -> None:
    prompt, ids = language.prompt, language.draw(data)
    full = answer(prompt, ids, SamplingParams(max_tokens=len(ids), logprobs=0), language)[-1].outputs[0].text
    start = data.draw(st.integers(0, max(0, len(full) - 1)))
    stop = full[start : start + data.draw(st.integers(1, 3))] or "x"
    outputs = answer(prompt, ids, SamplingParams(max_tokens=len(ids), logprobs=0, stop=stop), language)
    text = outputs[-1].outputs[0].text
    assert text == (full[: full.index(stop)] if stop in full else full)
    for output in outputs:  # what is shown is never taken back
        assert text.startswith(output.outputs[0].text)
    body = ChatCompletionRequest.parse({"messages": HELLO, "logprobs": True})
    tokens = [entry["token"] for entry in whole(body, outputs, language)["logprobs"]["content"]]
    assert "".join(tokens).startswith(text)
    assert not text or len("".join(tokens[:-1])) < len(text)  # none stands behind the end


def test_part_of_a_character_has_its_own_bytes() -> None:
    ids = [FIRST_BYTE + byte for byte in "é".encode()]
    body = ChatCompletionRequest.parse({"messages": HELLO, "logprobs": True})
    content = whole(body, answer(PROMPT, ids, body.to_sampling_params(2)))["logprobs"]["content"]
    assert [(entry["token"], entry["bytes"]) for entry in content] == [("", [0xC3]), ("é", [0xA9])]


def test_a_text_that_ends_inside_a_character_ends_with_a_replacement_for_it() -> None:
    ids = [IDS["▁ok"], *(FIRST_BYTE + byte for byte in "é".encode()[:1])]
    body = CompletionRequest.parse({"prompt": PROMPT, "logprobs": 0, "max_tokens": 2})
    choice = whole(body, answer(PROMPT, ids, body.to_sampling_params()))
    assert choice["text"] == " ok\ufffd"
    assert choice["logprobs"]["tokens"] == [" ok", "\ufffd"]


def test_no_more_logprobs_are_the_chosen_tokens() -> None:
    body = CompletionRequest.parse({"prompt": PROMPT, "logprobs": 0, "max_tokens": 1})
    logprobs = whole(body, answer(PROMPT, [IDS["s"]], body.to_sampling_params()))["logprobs"]
    assert logprobs["top_logprobs"] == [{"s": -2.0}]


def test_tokens_of_one_text_are_told_apart_by_their_ids() -> None:
    body = CompletionRequest.parse({"prompt": [1], "logprobs": 2, "max_tokens": 1})
    ids = [IDS["▁▁"]]  # at the beginning, a space
    logprobs = whole(body, answer([IDS["<s>"]], ids, body.to_sampling_params()))["logprobs"]
    assert logprobs["top_logprobs"] == [{"ok": -0.5, " ok": -1.0, " ": -2.0}]
    # "ok" chosen as the first word drops its space, and so has the text of the other
    ids = [IDS["▁ok"]]
    logprobs = whole(body, answer([IDS["<s>"]], ids, body.to_sampling_params()))["logprobs"]
    assert logprobs["tokens"] == ["ok"]
    assert logprobs["top_logprobs"][0] == {f"token_id:{IDS['ok']}": -0.5, "ok": -2.0}


def test_tokens_are_named_by_their_ids_on_request() -> None:
    body = CompletionRequest.parse({"prompt": PROMPT, "logprobs": 1, "return_tokens_as_token_ids": True})
    logprobs = whole(body, answer(PROMPT, [IDS["s"]], body.to_sampling_params()))["logprobs"]
    assert logprobs["tokens"] == [f"token_id:{IDS['s']}"]
    assert logprobs["top_logprobs"] == [{f"token_id:{IDS['ok']}": -0.5, f"token_id:{IDS['s']}": -2.0}]
    body = ChatCompletionRequest.parse({"messages": HELLO, "logprobs": True, "return_tokens_as_token_ids": True})
    (entry,) = whole(body, answer(PROMPT, [IDS["s"]], body.to_sampling_params(1)))["logprobs"]["content"]
    assert (entry["token"], entry["bytes"]) == (f"token_id:{IDS['s']}", [ord("s")])


# --- with a model ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    return LLM(metaspace_tokenizer.save_llama(tmp_path_factory.mktemp("llama")))


def test_texts_of_a_model_go_on_behind_the_prompt(llama: LLM) -> None:
    forced = SamplingParams(temperature=0, max_tokens=2, logit_bias={IDS["▁dog"]: 1000}, stop="none")
    plain = SamplingParams(temperature=0, max_tokens=2, logit_bias={IDS["▁dog"]: 1000})
    for prompt in ("dog", {"prompt_token_ids": llama.tokenizer.encode("dog")}):
        for params in (plain, forced):
            (output,) = llama.generate(prompt, params, use_tqdm=False)
            *_, last = llama.stream(prompt, params)
            assert output.outputs[0].text == last.outputs[0].text == " dog dog"


def test_hypotheses_of_a_beam_search_go_on_behind_the_prompt(llama: LLM) -> None:
    (output,) = llama.beam_search("dog", BeamSearchParams(beam_width=3, max_tokens=6), use_tqdm=False)
    for hypothesis in output.sequences:
        shown = [token for token in hypothesis.token_ids if token != END]
        assert "dog" + hypothesis.text == metaspace_tokenizer.decode(output.prompt_token_ids + shown)


@pytest.mark.parametrize("prompt", ["dog", " dog é", "<s>ok", "d o g", [IDS["<s>"], IDS["▁dog"], IDS["▁"]]])
def test_an_echoed_prompt_is_indexed_up_to_the_last_token(llama: LLM, prompt: Any) -> None:
    body = CompletionRequest.parse({"prompt": prompt, "echo": True, "logprobs": 2, "max_tokens": 8, "temperature": 0})
    outputs = llama.generate(body.engine_prompts(), body.to_sampling_params(), use_tqdm=False)
    choice = body.answer(outputs, model="m", decode=llama.tokenizer.decode)["choices"][0]
    text, logprobs = choice["text"], choice["logprobs"]
    assert_offsets(text, logprobs, set(metaspace_tokenizer.SPECIAL))
    ids = outputs[0].prompt_token_ids
    assert len(logprobs["tokens"]) == len(ids) + len(outputs[0].outputs[0].token_ids)
    end = logprobs["text_offset"][len(ids)]
    assert text[:end] == (prompt if isinstance(prompt, str) else "dog ")
    assert logprobs["token_logprobs"][0] is None
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert token in top
