#!/usr/bin/env bash
# llguidance, and a grammar whose text is spelled like a special token.
#
# One would guess: a grammar made of text, start: "a<|end|>b", can be followed with a tokenizer that has a special token
# <|end|>: its text never matches a special token, so the mask offers the tokens "<", "|", "e" ... of the text.
# What happens: where only one text can come, the mask holds the one token that the tokenizer makes of that text, and this
# is the special token. The matcher then refuses that very token: every token that its mask allows is an error. With the
# undocumented option no_forcing the mask offers the tokens of the text. Answers whose keys or values are such words, as
# in the JSON of a document about prompts, cannot be generated otherwise.
# Versions: llguidance 1.9.1, tokenizers 0.23.3. Source: this script.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llguidance==1.9.1 tokenizers==0.23.3
"$folder/venv/bin/python" - <<'PYTHON'
import ctypes
import sys
from importlib.metadata import version

from llguidance import LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|eos|>", special=True)])
special, eos = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|eos|>")
vocabulary = LLTokenizer(tokenizer.to_str(), eos_token=eos)


def allowed(matcher):
    words = (ctypes.c_uint32 * ((vocabulary.vocab_size + 31) // 32))()
    matcher.unsafe_compute_mask_ptr(ctypes.addressof(words), ctypes.sizeof(words))
    return [token for token in range(vocabulary.vocab_size) if words[token // 32] >> token % 32 & 1]


print(f"llguidance {version('llguidance')}, tokenizers {version('tokenizers')}; <|end|> is token {special}")
results = []
for options in ("", '%llguidance {"no_forcing": true}\n'):
    matcher = LLMatcher(vocabulary, options + 'start: "a<|end|>b"', log_level=0)
    matcher.consume_token(tokenizer.token_to_id("a"))
    (token,) = allowed(matcher)
    accepted = matcher.consume_token(token) and not matcher.is_error()
    results.append((token == special, accepted))
    print(f"{options.strip() or 'as it is'}: behind 'a' the mask allows {tokenizer.id_to_token(token)!r} alone; "
          f"the matcher then {'accepts' if accepted else 'refuses'} it")
sys.exit(results != [(True, False), (False, True)])
PYTHON
