"""GGUF files and tokenizers of both kinds, for the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers as hf
from tokenizers import Tokenizer
from transformers.tokenization_utils_base import generate_merges

from gossamer.compress.export import export
from gossamer.models.quiet import quiet_transformers
from native_checkpoints import (
    byte_level,
    save_model,
    write_native,
)

QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_WORDS = QWEN2_WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|", 1)


def export_model(name: str, directory: Path, **changes: Any) -> tuple[Path, Path]:
    """A native directory and the GGUF file made from it."""
    native = write_native(save_model(name, directory / "model", **changes), directory / "int8")
    return native, export(native, directory / "model.gguf", "gguf").path


def read_model(file: Path) -> Any:
    with quiet_transformers():
        return hf.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32).eval()


def read_tokenizer(file: Path) -> Any:
    with quiet_transformers():
        return hf.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


# --- tokenizers ------------------------------------------------------------------------------------------------------


def as_transformers(tokenizer: Tokenizer) -> Any:
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentencepiece(*, metaspace: bool = False, prefix: bool = False) -> Any:
    """SentencePiece's BPE as transformers converts it: byte fallback, and merges in the order of the vocabulary."""
    pieces = {token.replace("Ġ", "▁") for token in byte_level().get_vocab() if token.isascii() or "Ġ" in token}
    pieces = {piece for piece in pieces if not piece.startswith("<") and piece}
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    ordered = special + sorted(pieces, key=lambda piece: (len(piece) == 1, len(piece), piece))
    vocabulary = {piece: number for number, piece in enumerate(ordered)}
    merges = generate_merges(vocabulary, {piece: -number for piece, number in vocabulary.items() if number >= 259})
    cls = hf.LlamaTokenizer if metaspace else hf.GemmaTokenizer
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    more = {"add_prefix_space": prefix} if metaspace else {"pad_token": "</s>", "mask_token": "<unk>"}
    return cls(vocab=vocabulary, merges=merges, **names, **more)
