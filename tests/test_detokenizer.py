"""Text that comes in pieces is the text of all tokens, behind any prompt, and no piece ends inside a character."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

import metaspace_tokenizer
from gossamer.engine.detokenizer import IncrementalDetokenizer, decode
from gossamer.engine.token_bytes import TokenBytes
from gossamer.outputs import Logprob

TEXTS = [
    "A plain sentence, with punctuation. And another one!",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇫🇷🇩🇪",
    "你好，世界。今天天气很好。",
    "हिन्दी العربية עברית ไทย 한국어",
    "ሰላም ዓለም ᚠᛇᚻ᛫ᛒᛦᚦ",
    "tabs\tand\n\nnewlines  and   spaces ",
    "<|im_start|>user\nspecial<|im_end|>\n",
    "\ufffd a replacement character of its own \ufffd",
]
SENTENCEPIECE = metaspace_tokenizer.make_tokenizer()
# Bytes are half of them: of other tokens, a character is hardly ever cut.
TOKENS = st.one_of(
    st.integers(0, len(metaspace_tokenizer.IDS) - 1),
    st.integers(metaspace_tokenizer.FIRST_BYTE + 0x80, metaspace_tokenizer.FIRST_BYTE + 0xF4),
    st.sampled_from([metaspace_tokenizer.FIRST_BYTE + byte for byte in "é🧵".encode()]),
)


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


def stream(tokenizer: Any, ids: list[int], sizes: list[int], skip: bool = True, prompt: list[int] | None = None) -> Any:
    """The pieces that pushes of ``sizes`` tokens, in turn, return; what was held back is the last."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip, prompt or [])
    pieces, start, turn = [], 0, 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        pieces.append(detokenizer.push(ids[start : start + size]))
        start, turn = start + size, turn + 1
    pieces.append(detokenizer.flush())
    assert detokenizer.text == "".join(pieces)
    assert detokenizer.flush() == ""
    return pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("skip", [True, False])
def test_text_comes_whole(tokenizer: Any, text: str, skip: bool) -> None:
    ids = tokenizer.encode(text) * 3
    for size in (1, 2, 7, 1000):
        assert "".join(stream(tokenizer, ids, [size], skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("text", TEXTS)
def test_text_of_byte_tokens_comes_whole(text: str) -> None:
    ids = [metaspace_tokenizer.FIRST_BYTE + byte for byte in text.encode()]
    pieces = stream(SENTENCEPIECE, ids, [1])
    assert "".join(pieces) == SENTENCEPIECE.decode(ids) == text
    assert pieces.count("\ufffd") == text.count("\ufffd")


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_tokens_come_whole_behind_any_prompt(tokenizer: Any, data: st.DataObject) -> None:
    # Tokens below 600 are special tokens and single bytes, most of them no text on their own.
    token = st.one_of(st.integers(0, len(tokenizer) - 1), st.integers(0, 600))
    ids = data.draw(st.lists(token, max_size=80))
    border = data.draw(st.integers(0, len(ids)))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    skip = data.draw(st.booleans())
    before = decode(tokenizer, ids[:border], skip_special_tokens=skip, unfinished=True)
    pieces = stream(tokenizer, ids[border:], sizes, skip, ids[:border])
    assert before + "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(ids=st.lists(TOKENS, max_size=60), data=st.data())
@settings(max_examples=300, deadline=None)
def test_random_sentencepiece_tokens_come_whole_behind_any_prompt(ids: list[int], data: st.DataObject) -> None:
    border = data.draw(st.integers(0, len(ids)))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    skip = data.draw(st.booleans())
    before = decode(SENTENCEPIECE, ids[:border], skip_special_tokens=skip, unfinished=True)
    pieces = stream(SENTENCEPIECE, ids[border:], sizes, skip, ids[:border])
    whole = metaspace_tokenizer.decode(ids, skip_special_tokens=skip)
    assert before + "".join(pieces) == whole
    library = SENTENCEPIECE.decode(ids, skip_special_tokens=skip)
    if "\ufffd" not in library:
        assert whole == library


@given(ids=st.lists(TOKENS, max_size=40), data=st.data())
@settings(max_examples=200, deadline=None)
def test_what_tokens_are_said_to_add_is_the_text_and_its_bytes(ids: list[int], data: st.DataObject) -> None:
    border, skip = data.draw(st.integers(0, len(ids))), data.draw(st.booleans())
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE, skip, ids[:border])
    texts, added = "", b""
    for token in ids[border:]:
        other = data.draw(TOKENS)
        candidates = {token: Logprob(-1.0, 1), other: Logprob(-2.0, 2)}
        detokenizer.describe(candidates, token)
        piece = detokenizer.push([token])
        assert candidates[token].decoded_token == piece or candidates[token].token_bytes == b""
        texts += piece
        added += candidates[token].token_bytes or b""
    rest = detokenizer.flush()
    pending = metaspace_tokenizer.decode(ids[:border], skip_special_tokens=skip)[
        len(decode(SENTENCEPIECE, ids[:border], skip_special_tokens=skip, unfinished=True)) :
    ]
    if not pending:  # the prompt ends with a whole character
        assert metaspace_tokenizer.characters(added) == texts + rest


def test_a_first_word_is_told_from_the_same_word_behind_a_space() -> None:
    detokenizer = IncrementalDetokenizer(SENTENCEPIECE)
    word, spaced = metaspace_tokenizer.IDS["ok"], metaspace_tokenizer.IDS["▁ok"]
    for chosen, texts in ((word, ["ok", " ok"]), (spaced, ["ok", "ok"])):
        candidates = {word: Logprob(-1.0, 1), spaced: Logprob(-2.0, 2)}
        detokenizer.describe(candidates, chosen)
        assert [candidates[token].decoded_token for token in (word, spaced)] == texts


@given(text=st.text(max_size=60), repeats=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_no_replacement_character_is_shown_for_valid_text(tokenizer: Any, text: str, repeats: int) -> None:
    ids = tokenizer.encode(text) * repeats
    assume("\ufffd" not in tokenizer.decode(ids))  # the vocabulary lacks a few bytes
    pieces = stream(tokenizer, ids, [1])
    assert not any("\ufffd" in piece for piece in pieces)


def test_invalid_bytes_are_shown_as_they_come(tokenizer: Any) -> None:
    byte = next(i for i in range(600) if TokenBytes(tokenizer).added(None, i) == b"\x80")
    assert stream(tokenizer, [byte] * 300, [1]) == ["\ufffd"] * 300 + [""]


def test_a_prompt_costs_no_more_when_it_is_long() -> None:
    asked = []

    class Recording(TokenBytes):
        def added(self, previous: int | None, token: int) -> bytes:
            asked.append(token)
            return super().added(previous, token)

    IncrementalDetokenizer(Recording(SENTENCEPIECE), prompt_token_ids=[metaspace_tokenizer.IDS["▁dog"]] * 10_000)
    assert len(asked) < 10


DECODERS = {
    "none": None,
    "word-piece": decoders.WordPiece(prefix="##", cleanup=True),
    "suffix": decoders.BPEDecoder(suffix="</w>"),
    "metaspace": decoders.Metaspace(prepend_scheme="always"),
    "metaspace, no space": decoders.Metaspace(prepend_scheme="never"),
    "as in GGUF files": decoders.Sequence(
        [decoders.ByteFallback(), decoders.Fuse(), decoders.Replace("▁", " "), decoders.Strip(" ", 1, 0)]
    ),
}


@pytest.mark.parametrize("decoder", DECODERS.values(), ids=DECODERS.keys())
@given(ids=st.lists(st.integers(0, 12), max_size=12), border=st.integers(0, 12))
@settings(max_examples=100, deadline=None)
def test_other_decoders_are_followed(decoder: Any, ids: list[int], border: int) -> None:
    words = ["<s>", "web", "##ing", ".", "n't", "do", "spin</w>", "er</w>", "▁web", "▁", "▁▁", "é</w>", ","]
    other = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    other.add_special_tokens(["<s>"])
    if decoder is not None:
        other.decoder = decoder
    whole = other.decode(ids, skip_special_tokens=True)
    before = decode(other, ids[:border])
    assert before + "".join(stream(other, ids[border:], [1], prompt=ids[:border])) == whole


def test_a_tokenizer_that_only_decodes_is_asked_for_each_token_behind_the_one_before() -> None:
    class Words:
        all_special_ids = (0,)

        def decode(self, ids: list[int], *, skip_special_tokens: bool = False) -> str:
            return " ".join(["<end>", "spider", "web"][token] for token in ids)

    assert stream(Words(), [1, 2, 0, 2], [1]) == ["spider", " web", "", " web", ""]
    assert stream(Words(), [2], [1], prompt=[1, 0]) == [" web", ""]
