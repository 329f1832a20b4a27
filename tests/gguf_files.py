"""GGUF files and tokenizers of both kinds, for the tests of exports."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as hf
from tokenizers import Tokenizer, pre_tokenizers
from transformers.tokenization_utils_base import generate_merges

from gossamer.compress.export import export
from gossamer.compress.gguf_metadata import add_measures
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


def damaged(data: bytes, trial: int, end: int, draw: np.random.Generator) -> bytes:
    """A file cut short, every third trial, or with a few other bytes before ``end``."""
    if trial % 3 == 0:
        return data[: int(draw.integers(4, len(data)))]
    copy = bytearray(data)
    for place in draw.integers(4, end, size=1 + trial % 4):
        copy[place] = int(draw.integers(256))
    return bytes(copy)


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


# --- vocabularies without a model ------------------------------------------------------------------------------------


def write_vocabulary(
    path: Path,
    *,
    tokens: list[str],
    types: list[int],
    kind: str = "gpt2",
    pre: str | None = None,
    merges: list[str] | None = None,
    scores: list[float] | None = None,
    **more: Any,
) -> Path:
    """A GGUF file with a tokenizer and nothing else; ``more`` are further keys of ``tokenizer.ggml``."""
    writer = gguf.GGUFWriter(path, "llama")
    # llama.cpp wants some measures even where it reads the vocabulary only.
    writer.add_context_length(8)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_tokenizer_model(kind)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges is not None:
        writer.add_token_merges(merges)
    if scores is not None:
        writer.add_token_scores(scores)
    for key, value in more.items():
        (writer.add_bool if isinstance(value, bool) else writer.add_uint32)(f"tokenizer.ggml.{key}", value)
    return finish(writer, path)


def rewrite(source: Path, target: Path, *, drop: tuple[str, ...] = (), tensors: Any = None, **more: Any) -> Path:
    """A copy of a GGUF file.

    Args:
        source: the file.
        target: the copy.
        drop: keys and tensors that are left out.
        tensors: further ones, by name, or in the place of others; blocks come with their type in GGUF.
        more: further keys, ``__`` for a dot, each with its value and its type in GGUF.
    """
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    given = {name.replace("__", "."): value for name, value in more.items()}
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name not in {"general.architecture", *drop, *given}:
            sub = field.types[1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub)
    for name, (value, kind) in given.items():
        writer.add_key_value(name, value, kind)
    for tensor in reader.tensors:
        if tensor.name not in drop and tensor.name not in (tensors or {}):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, data in (tensors or {}).items():
        blocks, kind = data if isinstance(data, tuple) else (data, None)
        writer.add_tensor(name, blocks, raw_dtype=kind)
    return finish(writer, target)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: gguf.GGUFWriter, tokens: int) -> None:
    """One of bytes, with so many tokens."""
    byte = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*byte, byte[0] + byte[1], *(f"<{number}>" for number in range(tokens - len(byte) - 1))])
    writer.add_token_types([1] * (len(byte) + 1) + [3] * (tokens - len(byte) - 1))
    writer.add_token_merges([f"{byte[0]} {byte[1]}"])


KINDS = {3: "weight", 2: "bias"}  # of experts' tensors, by their dimensions


def write_model(
    model: Any,
    architecture: gguf.MODEL_ARCH,
    path: Path,
    keys: dict[str, Any],
    tokens: int,
    type: gguf.GGMLQuantizationType | None = None,
) -> Path:
    """A GGUF file of a model of transformers whose rows are not permuted, with a tokenizer of bytes.

    Args:
        model: of transformers.
        architecture: in GGUF.
        path: the file.
        keys: of the architecture, beside those that all have.
        tokens: that the tokenizer has.
        type: of matrices other than a router's; fp32 by default.
    """
    config = model.config

    def add(name: str, data: np.ndarray) -> None:
        if type is None or data.ndim == 1 or "ffn_gate_inp" in name or name.endswith("bias"):
            writer.add_tensor(name, data)
        else:
            writer.add_tensor(name, gguf.quants.quantize(data, type), raw_dtype=type)

    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[architecture])
    add_measures(writer, config)
    for name, value in keys.items():
        adders = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        adders[value.__class__](f"{writer.arch}.{name}", value)
    add_tokenizer(writer, tokens)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    gemma = config.model_type.startswith("gemma")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, last = name.rpartition(".")
        data = weight.float().numpy()
        block = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
        if "experts.gate_up_proj" in name:
            biased = config.model_type == "gpt_oss"  # and stored the other way round
            data = data.swapaxes(1, 2) if biased and data.ndim == 3 else data
            gate, up = (data[:, 0::2], data[:, 1::2]) if biased else np.split(data, 2, axis=1)
            add(f"{block}.ffn_gate_exps.{KINDS[data.ndim]}", np.ascontiguousarray(gate))
            add(f"{block}.ffn_up_exps.{KINDS[data.ndim]}", np.ascontiguousarray(up))
        elif "experts.down_proj" in name:
            data = data.swapaxes(1, 2) if config.model_type == "gpt_oss" and data.ndim == 3 else data
            add(f"{block}.ffn_down_exps.{KINDS[data.ndim]}", np.ascontiguousarray(data))
        elif last == "sinks":
            add(f"{block}.attn_sinks.weight", data)
        else:
            if gemma and "norm" in module:
                data = data + 1
            add(f"{names.get_name(module)}.{last}", data)
    return finish(writer, path)
