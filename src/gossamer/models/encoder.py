"""Loads encoders, such as BERT, and decoders without their output layer: for reports, embeddings and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gossamer.errors import CheckpointError
from gossamer.models.checkpoint import check_directory
from gossamer.models.checkpoint_weights import check_loaded, open_checkpoint
from gossamer.models.described import described_model
from gossamer.models.load import load_config, load_tokenizer
from gossamer.models.quiet import quiet_transformers
from gossamer.options import ModelOptions


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of a model that reads a text in both directions.

    >>> from transformers import BertConfig, LlamaConfig
    >>> is_encoder(BertConfig()), is_encoder(BertConfig(is_decoder=True)), is_encoder(LlamaConfig())
    (True, False, False)
    """
    generates = config.is_encoder_decoder or getattr(config, "is_decoder", False)
    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not generates


def load_encoder(
    path: Path, dtype: str = "auto", kind: Any = AutoModel
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An encoder without a head, in evaluation mode, and its tokenizer; no remote code, no pickle, no network.

    Args:
        path: a checkpoint directory.
        dtype: ``auto`` keeps the checkpoint's; or ``float32``, ``bfloat16``, ``float16``.
        kind: transformers' auto class; others than ``AutoModel`` have a head.

    Raises:
        ConfigurationError: ``dtype`` is not one of the four.
        CheckpointError: a file is missing, damaged, or lacks tensors of the model.
    """
    ModelOptions(dtype=dtype)  # refuses an unknown one
    check_directory(path)
    config = load_config(path)
    with quiet_transformers():
        tokenizer = load_tokenizer(path)
        with open_checkpoint(path, config, kind) as (reader, weights):
            described: Any = type(described_model(config, kind))
            stored = str(config.dtype or reader.stored_dtype()).removeprefix("torch.")
            try:
                model, info = described.from_pretrained(
                    None,
                    state_dict=weights,
                    config=config,
                    dtype=getattr(torch, stored if dtype == "auto" else dtype),
                    local_files_only=True,
                    output_loading_info=True,
                )
            except (RuntimeError, OSError, KeyError) as error:  # tensors of the wrong shape, unreadable files
                raise CheckpointError(f"the weights in {path} do not fit its configuration: {error}") from error
            check_loaded(model, info, reader, path)
    return model.eval().requires_grad_(False), tokenizer
