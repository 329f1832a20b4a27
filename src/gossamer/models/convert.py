"""A GGUF file becomes a Hugging Face checkpoint directory with fp32 weights."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.quiet import quiet_transformers

_MAGIC = b"GGUF"


def check_magic(path: Path) -> None:
    """Refuses a file that does not start like a GGUF file.

    Raises:
        CheckpointError: the first four bytes are not ``GGUF``.
    """
    with path.open("rb") as file:
        found = file.read(len(_MAGIC))
    if found != _MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it starts with {found!r} instead of {_MAGIC!r}. "
            "An interrupted download or a Git LFS pointer looks like this; fetch the file again."
        )


def convert_gguf(gguf: Path, directory: Path) -> None:
    """Dequantizes ``gguf`` into a new checkpoint in ``directory``.

    The result holds ``model.safetensors`` (fp32), ``config.json``, ``generation_config.json``, the tokenizer, and the
    chat template where there is one. Its logits equal those of the GGUF file read through transformers bit for bit.

    Args:
        gguf: the file; nothing else in its directory is looked at.
        directory: does not exist yet.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: transformers does not know the file's architecture.
    """
    with gguf_alone(gguf) as options, quiet_transformers():
        model, info = AutoModelForCausalLM.from_pretrained(dtype=torch.float32, output_loading_info=True, **options)
        tokenizer = AutoTokenizer.from_pretrained(**options)
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"{gguf} lacks {len(missing)} tensors of its model, among them {missing[0]}")
    # The weights are plain fp32 now; with these two left in place they would be saved and reloaded as quantized.
    del model.config.quantization_config
    model.hf_quantizer = None
    with quiet_transformers():
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    # safetensors creates its file readable by the owner only; a shared cache is to be readable like its other files.
    (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)


@contextmanager
def gguf_alone(gguf: Path) -> Iterator[dict[str, Any]]:
    """Arguments for ``from_pretrained`` to read a GGUF file, in a directory of its own; errors become typed ones.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: transformers does not know the file's architecture.
    """
    check_magic(gguf)
    # transformers takes a directory and a name in it, and would mix in the tokenizer files it finds beside the GGUF.
    with tempfile.TemporaryDirectory(prefix="gossamer-gguf-") as alone:
        (Path(alone) / "model.gguf").symlink_to(gguf.absolute())
        try:
            yield {
                "pretrained_model_name_or_path": alone,
                "gguf_file": "model.gguf",
                "local_files_only": True,
            }
        except Exception as error:  # transformers and gguf raise nearly every builtin type for a damaged file
            if "not supported" in str(error):
                raise UnsupportedModelError(f"{gguf}: {error}") from error
            raise CheckpointError(f"{gguf} cannot be read; it may be damaged or incomplete: {error}") from error
