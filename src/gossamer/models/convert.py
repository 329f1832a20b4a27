"""A GGUF file becomes a Hugging Face checkpoint directory with fp32 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

from gossamer.errors import CheckpointError
from gossamer.models.gguf_weights import open_weights, read_gguf
from gossamer.models.quiet import quiet_transformers


def convert_gguf(gguf: Path, directory: Path, sampling: Mapping[str, Any] | None = None) -> None:
    """Dequantizes ``gguf`` into a new checkpoint in ``directory``.

    The result holds ``model.safetensors`` (fp32), ``config.json``, ``generation_config.json``, the tokenizer, and the
    chat template where there is one. Every tensor and every key of the architecture is used, or refused by name.

    Args:
        gguf: the file, or any part of a split one.
        directory: does not exist yet.
        sampling: settings for ``generation_config.json``, such as ``temperature``.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: the file says something that is not known here, or its model cannot be run.
    """
    file, config, tokenizer = read_gguf(gguf)
    with quiet_transformers():
        try:
            model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
                None,
                config=config,
                state_dict=open_weights(file, config),
                dtype=torch.float32,
                output_loading_info=True,
            )
        except (RuntimeError, ValueError) as error:  # tensors of the wrong shape
            raise CheckpointError(f"the weights in {gguf} do not fit its keys: {error}") from error
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{gguf} lacks {len(missing)} tensors of its model, among them {missing[0]}")
        if sampling:
            model.generation_config.update(do_sample=True, **sampling)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # safetensors creates its file readable by the owner only; a shared cache is to be readable like its other files.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
