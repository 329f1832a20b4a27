"""Tiny encoders and embedding decoders, as sentence-transformers writes them, and what their vectors should be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaModel,
)

from gossamer.models.quiet import quiet_transformers

SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
LONGEST = 40  # tokens
TEXTS = ["a cat", "The cat sat on the mat.", "dog", "Rain falls in the spring, and snow.", "cat a"]


def write_tokenizer(directory: Path, *, types: bool = True) -> int:
    """One token per letter, between [CLS] and [SEP]; returns the size of the vocabulary."""
    letters = [chr(code) for code in range(32, 127)]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if types else ["input_ids", "attention_mask"]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
        model_input_names=names,
    ).save_pretrained(directory)
    return len(vocabulary)


def write_pooling(directory: Path, pooling: str, *, legacy: bool = True, longest: int | None = LONGEST) -> None:
    """``modules.json`` and what belongs to it."""
    steps = ["Transformer", "Pooling", "Normalize"]
    folders = ["", "1_Pooling", "2_Normalize"]
    (directory / "modules.json").write_text(
        json.dumps(
            [
                {"idx": i, "name": str(i), "path": folder, "type": f"sentence_transformers.models.{step}"}
                for i, (step, folder) in enumerate(zip(steps, folders, strict=True))
            ]
        )
    )
    (directory / "1_Pooling").mkdir(exist_ok=True)
    field = {"mean": "mean_tokens", "cls": "cls_token", "max": "max_tokens", "lasttoken": "lasttoken"}[pooling]
    old = {f"pooling_mode_{name}": name == field for name in ("mean_tokens", "cls_token", "max_tokens", "lasttoken")}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(old if legacy else {"pooling_mode": pooling}))
    if longest is not None:
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": longest}))


def write_bert(directory: Path, pooling: str = "mean", **changes: Any) -> Path:
    """A random BERT of embeddings."""
    directory.mkdir(exist_ok=True)
    size = write_tokenizer(directory)
    torch.manual_seed(0)
    with quiet_transformers():
        config = BertConfig(vocab_size=size, max_position_embeddings=64, **(SIZES | changes))
        _shaken(BertModel(config)).save_pretrained(directory)
    write_pooling(directory, pooling)
    return directory


def write_roberta(directory: Path) -> Path:
    """A random RoBERTa, whose positions begin behind that of the padding; without a word about pooling."""
    directory.mkdir(exist_ok=True)
    size = write_tokenizer(directory, types=False)
    torch.manual_seed(0)
    with quiet_transformers():
        config = RobertaConfig(vocab_size=size, max_position_embeddings=65, type_vocab_size=1, **SIZES)
        _shaken(RobertaModel(config)).save_pretrained(directory)
    return directory


def write_cross_encoder(directory: Path) -> Path:
    """A random BERT with a head of one score."""
    directory.mkdir(exist_ok=True)
    size = write_tokenizer(directory)
    torch.manual_seed(0)
    with quiet_transformers():
        config = BertConfig(vocab_size=size, max_position_embeddings=64, num_labels=1, **SIZES)
        _shaken(BertForSequenceClassification(config)).save_pretrained(directory)
    return directory


def _shaken(network: Any) -> Any:
    """Norms and biases are not 1 and 0, as in trained models: otherwise some faults would not show."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return network


@torch.no_grad()
def by_hand(directory: Path, kind: Any, ids: list[int], pooling: str, dtype: torch.dtype = torch.float64) -> Tensor:
    """The vector of one text: transformers' network in ``dtype``, and its tokens pooled here."""
    with quiet_transformers():
        network = kind.from_pretrained(directory, dtype=dtype, attn_implementation="eager").eval()
    hidden = network(torch.tensor([ids])).last_hidden_state[0]
    if pooling == "mean":
        return sum(hidden) / len(ids)  # type: ignore[return-value]  # of tensors
    return hidden.max(0).values if pooling == "max" else hidden[0 if pooling == "cls" else -1]
