"""Tokenizers of GGUF files give the token ids that llama.cpp gives, for every name of a pre-tokenizer.

The ids were recorded from llama-cpp-python by ``scripts/llama_cpp_tokens.py``; the version is in the file.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gguf_files import write_vocabulary
from gossamer.errors import UnsupportedModelError
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.gguf_pre_tokenizers import PRE_TOKENIZERS
from gossamer.models.gguf_tokenizer import GGUFVocabulary, read_tokenizer

RECORD = json.loads((Path(__file__).parent / "data" / "llama_cpp_tokens.json").read_text())
FILES = RECORD["files"]


def tokenizer_of(path: Path):
    file = GGUFFile(path)
    return read_tokenizer(file, GGUFVocabulary(file, 10**6))


def write(name: str, path: Path) -> Path:
    options = {key: value for key, value in FILES[name].items() if key not in ("vocabulary", "answers")}
    return write_vocabulary(path, **RECORD["vocabularies"][FILES[name]["vocabulary"]], **options)


@pytest.mark.parametrize("name", FILES)
def test_ids_are_those_of_llama_cpp(name, tmp_path):
    tokenizer = tokenizer_of(write(name, tmp_path / "x.gguf"))
    for text, answers, answer in zip(RECORD["texts"], RECORD["ids"], FILES[name]["answers"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False) == answers[answer], text


def test_every_name_is_recorded_and_the_texts_tell_them_apart():
    names = [name.removeprefix("gpt2/") for name in FILES if name.startswith("gpt2/")]
    assert sorted(names) == sorted(PRE_TOKENIZERS)
    seen = {}
    for name in names:
        kind = PRE_TOKENIZERS[name]
        seen.setdefault((kind.words, kind.byte_level), set()).add(tuple(FILES[f"gpt2/{name}"]["answers"]))
    assert len(set.union(*seen.values())) > 0.8 * len(seen)


@pytest.mark.parametrize("name", ["gpt2/smollm", "gpt2/llama-bpe", "gpt2/gemma4", "llama/True", "llama/False"])
def test_a_saved_tokenizer_is_the_same(name, tmp_path):
    tokenizer = tokenizer_of(write(name, tmp_path / "x.gguf"))
    tokenizer.save_pretrained(tmp_path / "saved")
    again = AutoTokenizer.from_pretrained(tmp_path / "saved")
    for text in RECORD["texts"]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


@pytest.mark.parametrize("name", ["gpt2/smollm", "llama/True", "llama/False"])
def test_decoding_gives_the_text_back(name, tmp_path):
    tokenizer = tokenizer_of(write(name, tmp_path / "x.gguf"))
    # Behind a token that a user defined, such as two spaces, a text begins again, and is given a space in front.
    texts = [text for text in RECORD["texts"] if name != "llama/True" or "  " not in text]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


@pytest.mark.parametrize(
    ("pre", "key", "begins"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_texts_begin_as_the_file_says_or_as_is_usual(pre, key, begins, tmp_path):
    more = {} if key is None else {"add_bos_token": key}
    vocabulary = dict(RECORD["vocabularies"]["byte_level"])
    vocabulary["tokens"] = [*vocabulary["tokens"], "<begin>", "<end>"]
    vocabulary["types"] = [*vocabulary["types"], 3, 3]
    first = len(vocabulary["tokens"]) - 2
    path = write_vocabulary(
        tmp_path / "x.gguf", pre=pre, bos_token_id=first, eos_token_id=first + 1, **vocabulary, **more
    )
    assert (tokenizer_of(path)("ab")["input_ids"][0] == first) is begins


def test_special_and_user_tokens_are_found_in_texts(tmp_path):
    vocabulary = dict(RECORD["vocabularies"]["sentencepiece"])
    tokenizer = tokenizer_of(write_vocabulary(tmp_path / "x.gguf", kind="llama", **vocabulary))
    place = {token: number for number, token in enumerate(vocabulary["tokens"])}
    ids = tokenizer.encode("a</s><user>", add_special_tokens=False)
    assert ids[-2:] == [place["</s>"], place["<user>"]]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<user>"


def test_an_unknown_name_and_an_unknown_kind_are_refused(tmp_path):
    vocabulary = RECORD["vocabularies"]["byte_level"]
    for number, (options, named) in enumerate([({"pre": "odd"}, "'odd'"), ({"kind": "bert"}, "kind 'bert'")]):
        path = write_vocabulary(tmp_path / f"{number}.gguf", **vocabulary, **options)
        with pytest.raises(UnsupportedModelError, match=named):
            tokenizer_of(path)
