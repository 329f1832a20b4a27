"""Tokenizers in GGUF files are read back alike by transformers and by llama.cpp's rules, or refused."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from gguf_files import LLAMA3_WORDS, QWEN2_WORDS, as_transformers, export_model, read_tokenizer, sentencepiece
from gossamer.compress.export import export
from gossamer.compress.gguf_tokenizer import Vocabulary, describe
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models import resolve_model
from gossamer.texts import reference_text
from native_checkpoints import (
    VOCAB,
    byte_level,
    save_model,
    write_native,
)

TEXTS = st.text(st.characters(codec="utf-8"), max_size=40) | st.text("ab \n12'", max_size=40)


class ScoreEncoder:
    """What llama.cpp does with a vocabulary of the kind ``llama``, without special tokens."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.ids = {token: number for number, token in enumerate(vocabulary.tokens)}
        self.scores = vocabulary.scores or []

    def __call__(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", "▁"))
        while True:
            joints = [(self.ids.get(a + b), i) for i, (a, b) in enumerate(itertools.pairwise(symbols))]
            possible = [(-self.scores[number], i) for number, i in joints if number is not None]
            if not possible:
                break
            _, i = min(possible)
            symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
        return [number for symbol in symbols for number in self._ids(symbol)]

    def _ids(self, symbol: str) -> list[int]:
        if symbol in self.ids:
            return [self.ids[symbol]]
        return [self.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (((), None), "gpt-2"),
        ((("Digits",), None), "smollm"),
        (((), LLAMA3_WORDS), "llama-bpe"),
        (((), QWEN2_WORDS), "qwen2"),
    ],
)
def test_the_pre_tokenizer_is_found_by_its_structure(arguments, expected):
    first, words = arguments
    vocabulary = describe(byte_level(*first, words=words), VOCAB)
    assert (vocabulary.model, vocabulary.pre) == ("gpt2", expected)
    assert len(vocabulary.tokens) == VOCAB
    assert vocabulary.types.count(5) == 10  # ids without a token


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_transformers_tokenizes_alike_from_a_byte_level_file(name, text, byte_level_files):
    ours, theirs = byte_level_files[name]
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]


@pytest.fixture(scope="module")
def byte_level_files(tmp_path_factory):
    """For a model type: the tokenizer of the native directory, and the one that is read from its GGUF file."""
    files = {}
    for name in ("llama", "qwen2"):
        native, file = export_model(name, tmp_path_factory.mktemp(name))
        files[name] = hf.AutoTokenizer.from_pretrained(native), read_tokenizer(file)
    # Readers do not compose characters, which is said in a warning.
    files["qwen2"][0].backend_tokenizer.normalizer = normalizers.Sequence([])
    return files


@pytest.mark.parametrize(("metaspace", "prefix"), [(False, False), (True, False), (True, True)])
def test_sentencepiece_is_described_by_scores(metaspace, prefix):
    tokenizer = sentencepiece(metaspace=metaspace, prefix=prefix)
    vocabulary = describe(tokenizer, len(tokenizer))
    assert (vocabulary.model, vocabulary.space_prefix) == ("llama", prefix)
    assert [int(kind) for kind in vocabulary.types[:5]] == [2, 3, 3, 6, 6]
    for text in ("the statement is a string", "x", "12 ñ 🙂\n\n", reference_text()[60_000:60_400]):
        expected = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert ScoreEncoder(vocabulary)(" " * prefix + text) == expected


@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_highest_score_is_merged_where_the_first_merge_would_be(text):
    tokenizer = sentencepiece()
    literal = text.replace("<", "(")  # special tokens are found before any merging, by readers as well
    encode = ScoreEncoder(describe(tokenizer, len(tokenizer)))
    assert encode(literal) == tokenizer(literal, add_special_tokens=False)["input_ids"]


def test_transformers_tokenizes_alike_from_a_sentencepiece_file(tmp_path):
    tokenizer = sentencepiece()
    model = save_model("gemma3", tmp_path / "model", vocab_size=len(tokenizer))
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    tokenizer.save_pretrained(model)
    native = write_native(model, tmp_path / "int8")
    for path in model.glob("*.jinja"):
        (native / path.name).write_text(path.read_text())
    again = read_tokenizer(export(native, tmp_path / "model.gguf", "gguf").path)
    text = reference_text()[:20_000] + "  two  ñandú 🙂\n\n\tx"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.chat_template == tokenizer.chat_template
    assert (again.bos_token_id, again.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def with_pre_tokenizer(step: Any) -> Any:
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = step
    return as_transformers(tokenizer)


def with_model(**changes: object) -> Any:
    state = json.loads(byte_level().backend_tokenizer.to_str())
    state["model"] |= changes
    return as_transformers(Tokenizer.from_str(json.dumps(state)))


def with_merges(change: Any) -> Any:
    state = json.loads(sentencepiece().backend_tokenizer.to_str())
    change(state["model"]["merges"])
    return as_transformers(Tokenizer.from_str(json.dumps(state)))


def part_pairs_of_one_piece(merges: list[list[str]]) -> None:
    place = next(i for i, (one, other) in enumerate(itertools.pairwise(merges)) if "".join(one) == "".join(other))
    merges.append(merges.pop(place))


def with_normalizer(tokenizer: Any, normalizer: Any) -> Any:
    again = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    again.normalizer = normalizer
    return as_transformers(again)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: byte_level(words=r"\w+"), "has no name in GGUF"),
        (lambda: with_pre_tokenizer(pre_tokenizers.Whitespace()), "its pre-tokenizer is Whitespace"),
        (lambda: with_pre_tokenizer(None), "absent"),
        (lambda: with_pre_tokenizer(pre_tokenizers.ByteLevel(add_prefix_space=True)), "a space before the text"),
        (lambda: with_model(ignore_merges=True), "ignore_merges"),
        (lambda: with_model(merges=[]), "no merges"),
        (lambda: with_normalizer(byte_level(), normalizers.Lowercase()), "its normalizer is Lowercase"),
        (lambda: with_normalizer(sentencepiece(), normalizers.Lowercase()), "its normalizer is"),
        (lambda: with_normalizer(sentencepiece(), None), "its pre-tokenizer is"),
        (lambda: with_merges(lambda merges: merges.pop(5)), "never merges"),
        (lambda: with_merges(part_pairs_of_one_piece), "do not follow an order"),
    ],
)
def test_a_tokenizer_that_gguf_cannot_describe_is_refused(make, reason):
    with pytest.raises(UnsupportedModelError, match=reason):
        describe(make(), 10**4)


def test_a_tokenizer_with_more_ids_than_embeddings_is_refused():
    with pytest.raises(CheckpointError, match="the id 389, but the model has only 300"):
        describe(byte_level(), 300)


def test_special_tokens_without_an_embedding_are_left_out_and_said():
    tokenizer = as_transformers(Tokenizer.from_str(byte_level().backend_tokenizer.to_str()))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    vocabulary = describe(tokenizer, 390)
    assert vocabulary.tokens == describe(byte_level(), 390).tokens
    assert any("<image>" in warning for warning in vocabulary.warnings)


# --- real models -----------------------------------------------------------------------------------------------------


def test_a_real_byte_level_tokenizer_is_described(smollm2_path):
    smollm2 = hf.AutoTokenizer.from_pretrained(smollm2_path)
    vocabulary = describe(smollm2, len(smollm2))
    assert (vocabulary.model, vocabulary.pre, len(vocabulary.merges or ())) == ("gpt2", "smollm", 48_900)
    assert vocabulary.warnings == []


@pytest.mark.slow
def test_a_real_sentencepiece_tokenizer_is_described():
    gemma3 = hf.AutoTokenizer.from_pretrained(resolve_model("gemma3-270m"))
    vocabulary = describe(gemma3, len(gemma3))
    assert (vocabulary.model, vocabulary.space_prefix) == ("llama", False)
    encode = ScoreEncoder(vocabulary)
    # Runs of spaces are tokens that users define; readers look for them before anything is merged.
    for line in [line for line in reference_text().splitlines() if line and "  " not in line][:500]:
        assert encode(line) == gemma3(line, add_special_tokens=False)["input_ids"]
