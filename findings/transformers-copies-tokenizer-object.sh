#!/usr/bin/env bash
# PreTrainedTokenizerFast(tokenizer_object=...) and the tokenizer that it is given.
#
# One would guess: the object is wrapped. That is what the argument's name says, it costs nothing, and tokens that are
# added to the object later are known to the wrapper.
# What happens: it is deep-copied, which for a tokenizer means: written as JSON, and read again. For a vocabulary of
# 150,000 tokens that takes about as long as it took to make the tokenizer from its vocabulary and merges, and the
# wrapper does not see what is added to the object afterwards.
# Versions: transformers 5.23.0, tokenizers 0.23.3. Source: this script; TokenizersBackend.__init__ in transformers'
# tokenization_utils_tokenizers.py.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet transformers==5.23.0 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import itertools
import sys
import time

import tokenizers
import transformers
from tokenizers import Tokenizer, models

letters = "abcdefghijklmnopqrstuvwxyz"
pairs = ["".join(pair) for pair in itertools.product(letters, repeat=2)]
words = ["".join(pair) for pair in itertools.product(pairs, repeat=2)][:150_000]
vocabulary = {token: number for number, token in enumerate([*letters, *pairs, *words])}
merges = [(pair[0], pair[1]) for pair in pairs] + [(word[:2], word[2:]) for word in words]

begin = time.perf_counter()
backend = Tokenizer(models.BPE(vocabulary, merges))
made = time.perf_counter() - begin
begin = time.perf_counter()
wrapper = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
wrapped = time.perf_counter() - begin
backend.add_tokens(["<new>"])
known = wrapper.convert_tokens_to_ids("<new>")
print(f"transformers {transformers.__version__}, tokenizers {tokenizers.__version__}, {len(vocabulary):,} tokens")
print(f"made in {made:.2f} s, wrapped in {wrapped:.2f} s")
print(f"a token that was added to the object afterwards: {backend.token_to_id('<new>')}, in the wrapper: {known}")
sys.exit(known is not None)
PYTHON
