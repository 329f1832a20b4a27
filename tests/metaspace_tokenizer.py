"""A tokenizer of SentencePiece's kind (Llama 2's): a space in front, words with their spaces, bytes for the rest."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

WORDS = ["dog", "do", "d", "o", "g", "ok", "k", "s", "!", "é"]
MERGES = [("▁", "d"), ("▁d", "o"), ("▁do", "g"), ("▁", "o"), ("▁o", "k"), ("o", "k")]
PIECES = ["▁", *WORDS, "▁d", "▁do", "▁dog", "▁o", "▁ok", "▁▁"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
FIRST_BYTE = len(SPECIAL)
IDS = {piece: number for number, piece in enumerate([*SPECIAL, *BYTES, *PIECES])}


def make_tokenizer() -> Tokenizer:
    """Byte tokens begin at ``FIRST_BYTE``; ``IDS`` has all."""
    tokenizer = Tokenizer(models.BPE(IDS, MERGES, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def decode(ids: list[int], *, skip_special_tokens: bool = True) -> str:
    """What SentencePiece makes of tokens: bytes that are no character become U+FFFD, one by one."""
    pieces = [piece for piece in IDS if piece not in SPECIAL or not skip_special_tokens]
    spelled = {IDS[piece]: piece for piece in pieces}
    text, run = "", b""
    for token in [*ids, None]:
        if token is not None and FIRST_BYTE <= token < FIRST_BYTE + 256:
            run += bytes([token - FIRST_BYTE])
        elif token is None or token in spelled:
            text, run = text + characters(run), b""
            text += spelled[token].replace("▁", " ") if token is not None else ""
    return text.removeprefix(" ")


def characters(run: bytes) -> str:
    """The characters of a run of bytes."""
    text = ""
    while run:
        for length in range(1, 5):
            try:
                character, run = run[:length].decode(), run[length:]
                break
            except UnicodeDecodeError:
                continue
        else:
            character, run = "\ufffd", run[1:]
        text += character
    return text


def save_llama(directory: Path, **changes: object) -> Path:
    """A random Llama with this tokenizer, which puts ``<s>`` first."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from gossamer.models.quiet import quiet_transformers

    tokenizer = make_tokenizer()
    tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", IDS["<s>"])])
    settings: dict[str, object] = {
        "vocab_size": len(IDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": IDS["<s>"],
        "eos_token_id": IDS["</s>"],
        "initializer_range": 0.4,
    }
    torch.manual_seed(0)
    with quiet_transformers():
        LlamaForCausalLM(LlamaConfig(**(settings | changes))).save_pretrained(directory)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
        ).save_pretrained(directory)
    return directory
