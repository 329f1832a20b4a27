"""Incremental decoding equals decoding everything at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer

from gossamer.engine.detokenizer import WINDOW, IncrementalDetokenizer

TEXTS = [
    "A plain sentence, with punctuation. And another one!",
    "emoji 😀👩‍👩‍👧‍👦🏳️‍🌈 and flags 🇫🇷🇩🇪",
    "你好，世界。今天天气很好。",
    "हिन्दी العربية עברית ไทย 한국어",
    "tabs\tand\n\nnewlines  and   spaces ",
    "<|im_start|>user\nspecial<|im_end|>\n",
    "\ufffd a replacement character of its own \ufffd",
]


@pytest.fixture(scope="session")
def tokenizer(smollm2_path: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm2_path)


def stream(tokenizer: Any, ids: list[int], sizes: list[int], skip: bool = True) -> list[str]:
    """The pieces that pushes of ``sizes`` tokens, in turn, return; what was held back is the last."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip)
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


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_random_tokens_come_whole(tokenizer: Any, data: st.DataObject) -> None:
    # Tokens below 600 are special tokens and single bytes, most of them no text on their own.
    token = st.one_of(st.integers(0, len(tokenizer) - 1), st.integers(0, 600))
    ids = data.draw(st.lists(token, max_size=80))
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    skip = data.draw(st.booleans())
    assert "".join(stream(tokenizer, ids, sizes, skip)) == tokenizer.decode(ids, skip_special_tokens=skip)


@given(text=st.text(max_size=60), repeats=st.integers(1, 3))
@settings(max_examples=100, deadline=None)
def test_no_replacement_character_is_shown_for_valid_text(tokenizer: Any, text: str, repeats: int) -> None:
    ids = tokenizer.encode(text) * repeats
    assume("\ufffd" not in tokenizer.decode(ids))  # the vocabulary lacks a few bytes
    pieces = stream(tokenizer, ids, [1])
    assert not any("\ufffd" in piece for piece in pieces)


def test_endless_invalid_bytes_are_shown_as_they_come_and_cost_no_more(tokenizer: Any) -> None:
    lengths = []

    class Recording:
        def decode(self, ids: list[int], **options: Any) -> str:
            lengths.append(len(ids))
            return tokenizer.decode(ids, **options)

    byte = next(i for i in range(600) if tokenizer.decode([i]) == "\ufffd")
    pieces = stream(Recording(), [byte] * 300, [1])
    assert "".join(pieces) == tokenizer.decode([byte] * 300)
    assert all(pieces[20:-1])
    assert max(lengths) <= WINDOW + 1


def test_sentencepiece_spaces_and_bytes_come_whole() -> None:
    words = ["<unk>", "▁Hello", "▁world", "ing", "▁", ".", *(f"<0x{byte:02X}>" for byte in range(256))]
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    raw.decoder = decoder
    ids = [1, 2, 3, 5, 4, *(6 + byte for byte in "你好😀é".encode()), 2, 2, *([1, 3] * 20), 6 + 0xE4, 6 + 0xBD]
    assert "".join(stream(raw, ids, [1])) == raw.decode(ids)
    assert "".join(stream(raw, ids, [3])) == raw.decode(ids)
