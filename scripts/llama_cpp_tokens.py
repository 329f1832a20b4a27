"""Record which token ids llama.cpp gives for odd texts, for each name of a pre-tokenizer and both kinds of tokenizers.

    LLAMA_CPP_PYTHON=.venv-bench/llama.cpp/bin/python .venv/bin/python scripts/llama_cpp_tokens.py

writes ``tests/data/llama_cpp_tokens.json``, which the tests compare the reader of GGUF files with. The vocabularies are
small, and their merges are learned across all borders of words, so that a tokenizer that cuts elsewhere gives other
tokens. They are written into the file as well.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from gossamer.models.gguf_pre_tokenizers import PRE_TOKENIZERS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from gguf_files import write_vocabulary  # noqa: E402  a helper of the tests, found through the line above

TARGET = ROOT / "tests" / "data" / "llama_cpp_tokens.json"
PEER = os.environ.get("LLAMA_CPP_PYTHON", str(ROOT / ".venv-bench/llama.cpp/bin/python"))

TEXTS = [
    "Hello world, it's 12 o'clock; THEY'RE here, I'LL go, he'D said 'twas",
    "1 12 123 1234 12345 123456 1234567.89 3.14159 0x1F 1e-10",
    "x  5   10\t7 \t8",
    "a\n\n7\n\n\nb\r\n\r\nc \n d\n  e",
    "  leading and trailing   ",
    "\n",
    "   \n\n  \t",
    "def f(x_1, y=2):\n    return x_1**2 + y  # squares\n\n\nif __name__ == '__main__':\n\tprint(f(3), f\"{y!r}\")\n",
    "for (int i=0;i<10;++i){ a[i]+=b->c; } // done\r\n/* path/to//file\\x */",
    "camelCase HTTPServer XMLHttpRequest iPhone15 snake_case_2 SHOUT",
    "\u00c9cole \u00e9t\u00e9 \u00dcBER stra\u00dfe \u00f1and\u00fa \u0130stanbul \u01c5 ca\u017ft '\u017f \u212a",
    "e\u0301a\u0300 o\u0308o \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22\u0e14\u0e35 "
    "\u0ead\u0eb2 \u1780\u1781",
    "\u4e2d\u6587\u6d4b\u8bd5123\u5f00\u59cb\uff0c\u4f60\u597d\uff01\u3002 \u3042\u3044\u30ab\u30bf\u30ca\uff76 "
    "\ud55c\uad6d\uc5b4 \u3131\u3105",
    "\u0639\u0631\u0628\u064a\u060c \u0661\u0662\u0663 \u05e2\u05d1\u05e8\u05d9\u05ea \u1200\u1208 \u16a0\u16a2",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f \U0001d400\U0001d4d0 "
    "\u00bd \u00b2 \u2168 \u2460 \u20ac5",
    "a\u00a0b\u3000c\u2028d\u0085e\u200bf \u2003 g\ufeffh",
    "(a) [b] {c} <d> ... --- *** +++ === $5 ^^^ ~~ `q` a|b c\u2014d \u201cq\u201d \u2018s\u2019 \u2026",
    "word.Word!word?word:word;word,word/word\\word@word#word%word&word",
    "IMGIMGABCZ <sentinel:12> a    b\tc",
    "price:1,234,567.00USD 2024-11-29T10:52:28Z v1.2.3-rc4 192.168.0.1",
    "aaaaaaaaaaaaaaaaaaaaaaaa bbbbbbbb                                      cccc",
    "\tif (x)\r\n\t\treturn;\r\n",
    "1\u066b2 \uff11\uff12\uff13\uff14 \u0967\u0968\u0969\u096a 7\u4e07 5\u5e74",
    "don't DON'T Don\u2019t we'Ve y'all'd 's 't",
    "!abc #tag @user _x -y .z /w :v",
]

ASK = """
import json, sys
import llama_cpp
answers = {}
for path in sys.argv[2:]:
    model = llama_cpp.Llama(path, vocab_only=True, verbose=False)
    answers[path] = [model.tokenize(text.encode(), add_bos=False, special=False) for text in json.loads(sys.argv[1])]
print(json.dumps([llama_cpp.__version__, answers]))
"""
SPACE = "\u2581"


def byte_level() -> dict[str, Any]:
    """A vocabulary in the alphabet of GPT-2's bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokens, merges = _train(tokenizer, TEXTS, 800, pre_tokenizers.ByteLevel.alphabet())
    return {"tokens": tokens, "types": [1] * len(tokens), "merges": merges}


def plain() -> dict[str, Any]:
    """A vocabulary in UTF-8, with spaces as U+2581; what is not ASCII is left to the tokens of bytes."""
    texts = ["".join(letter for letter in text if letter.isascii()).replace(" ", SPACE) for text in TEXTS]
    tokens, merges = _train(Tokenizer(models.BPE()), texts, 450, [])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(tokens)
    return {"tokens": first + tokens, "types": types, "merges": merges}


def sentencepiece() -> dict[str, Any]:
    """The same as scores, with tokens that are looked for in the text first."""
    vocabulary = plain()
    place = {merge.replace(" ", ""): -float(number) for number, merge in enumerate(vocabulary.pop("merges"))}
    vocabulary["scores"] = [place.get(token, -1000.0) for token in vocabulary["tokens"]]
    for number, token in enumerate(["<user>", "  ", "\t\t\t"]):
        vocabulary["tokens"].append(token)
        vocabulary["types"].append(4)
        vocabulary["scores"].append(-2000.0 - number)
    return vocabulary


def _train(tokenizer: Tokenizer, texts: list[str], size: int, alphabet: list[str]) -> tuple[list[str], list[str]]:
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts * 2, trainer)
    merges = [" ".join(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    return sorted(tokenizer.get_vocab()), merges


def main() -> None:
    """Ask llama.cpp, and write the file."""
    vocabularies = {"byte_level": byte_level(), "plain": plain(), "sentencepiece": sentencepiece()}
    files: dict[str, dict[str, Any]] = {
        f"gpt2/{name}": {"vocabulary": "byte_level" if kind.byte_level else "plain", "pre": name}
        for name, kind in PRE_TOKENIZERS.items()
    }
    for prefix in (False, True):
        files[f"llama/{prefix}"] = {"vocabulary": "sentencepiece", "kind": "llama", "add_space_prefix": prefix}
    with tempfile.TemporaryDirectory() as directory:
        paths = {}
        for number, (name, keys) in enumerate(files.items()):
            options = {key: value for key, value in keys.items() if key != "vocabulary"}
            path = Path(directory) / f"{number}.gguf"
            paths[name] = str(write_vocabulary(path, **vocabularies[keys["vocabulary"]], **options))
        command = [PEER, "-c", ASK, json.dumps(TEXTS), *paths.values()]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    version, answers = json.loads(run.stdout.strip().splitlines()[-1])
    # Most names agree about most texts, so each answer is written once.
    distinct: list[list[list[int]]] = [[] for _ in TEXTS]
    for name, keys in files.items():
        keys["answers"] = []
        for ids, known in zip(answers[paths[name]], distinct, strict=True):
            if ids not in known:
                known.append(ids)
            keys["answers"].append(known.index(ids))
    record = {
        "llama_cpp_python": version,
        "vocabularies": vocabularies,
        "texts": TEXTS,
        "ids": distinct,
        "files": files,
    }
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in record.items())
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text("{\n" + lines + "\n}\n")
    print(f"{TARGET}: {len(files)} files, {sum(map(len, distinct))} answers of llama-cpp-python {version}")


if __name__ == "__main__":
    main()
