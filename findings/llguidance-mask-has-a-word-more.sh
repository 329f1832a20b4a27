#!/usr/bin/env bash
# The length of llguidance's masks of tokens.
#
# One would guess: LLMatcher.compute_bitmask() of a vocabulary of V tokens has V bits rounded up to words of 32, as
# those of llguidance's own llguidance.numpy.allocate_token_bitmask have. Masks that are joined, one behind the other, are
# then read with that stride.
# What happens: where V is a multiple of 32, as most models' is, a mask has one word more. Every mask but the first is
# then read 32 tokens off: other tokens are allowed than the grammar allows. Where V is no multiple, the lengths agree.
# Version: llguidance 1.9.1 with tokenizers 0.22.2. Source: this script.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llguidance==1.9.1 tokenizers==0.22.2
"$folder/venv/bin/python" - <<'PYTHON'
import sys

from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

differ = {}
print("vocabulary, bytes of a mask, bytes of so many bits in words of 32")
for size in (287, 288, 289, 320):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = alphabet + [f"<extra {number}>" for number in range(size - len(alphabet))]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trie = LLTokenizer(tokenizer.to_str(), n_vocab=size, eos_token=0)
    matcher = LLMatcher(trie, LLMatcher.grammar_from_regex("ab"))
    mask, expected = len(matcher.compute_bitmask()), (trie.vocab_size + 31) // 32 * 4
    differ[size] = mask - expected
    print(size, mask, expected)
sys.exit(0 if differ == {287: 0, 288: 4, 289: 0, 320: 4} else 1)
PYTHON
