#!/usr/bin/env bash
# The ByteFallback decoder of the tokenizers library, and a text that ends inside a character.
#
# One would guess: of tokens <0xE1> <0x88> <0xB0> <0xE1>, of which the first three are the letter U+1230 and the last
# begins another, decode() makes that letter and U+FFFD, as SentencePiece does, whose byte fallback it is.
# What happens: one byte too many, and all bytes beside it become U+FFFD, the whole characters too, as far as the run of
# byte tokens goes. An Amharic or Cherokee answer of a Llama or Gemma model that max_tokens cuts is all lost by it; and
# whoever decodes a stream's tokens together sees text vanish that was there a token before.
# Versions: tokenizers 0.23.3, sentencepiece 0.2.1. Source: this script.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet tokenizers==0.23.3 sentencepiece==0.2.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys
from importlib.metadata import version
from pathlib import Path

import sentencepiece
from tokenizers import Tokenizer, decoders, models

text = Path(sys.argv[1]) / "text.txt"
text.write_text("the quick brown fox jumps over the lazy dog\n" * 50)
sentencepiece.SentencePieceTrainer.train(
    input=str(text), model_prefix=str(text.with_suffix("")), vocab_size=300, byte_fallback=True, model_type="bpe",
    hard_vocab_limit=False, minloglevel=2,
)
reference = sentencepiece.SentencePieceProcessor(model_file=str(text.with_suffix(".model")))
vocabulary = {reference.id_to_piece(number): number for number in range(reference.get_piece_size())}
tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
print(f"tokenizers {version('tokenizers')}, sentencepiece {version('sentencepiece')}")
found = []
for bytes_ in ("\u1230\u120b".encode(), "\u1230\u120b".encode()[:-1]):
    ids = [vocabulary[f"<0x{byte:02X}>"] for byte in bytes_]
    found.append((tokenizer.decode(ids), reference.decode(ids)))
    print(f"{len(ids)} bytes: tokenizers {ascii(found[-1][0])}, sentencepiece {ascii(found[-1][1])}")
sys.exit(found != [("\u1230\u120b",) * 2, ("\ufffd" * 5, "\u1230\ufffd\ufffd")])
PYTHON
