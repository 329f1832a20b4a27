"""A GGUF file becomes a Hugging Face checkpoint directory with fp32 weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gossamer.models.load import load_model
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
    model, tokenizer = load_model(gguf, "float32")
    with quiet_transformers():
        if sampling:
            model.generation_config.update(do_sample=True, **sampling)
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # safetensors creates its file readable by the owner only; a shared cache is to be readable like its other files.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
