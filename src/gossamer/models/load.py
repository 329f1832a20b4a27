"""A checkpoint directory becomes a model and a tokenizer, ready for inference."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gossamer.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from gossamer.models.checkpoint import check_directory, check_weights
from gossamer.models.quiet import quiet_transformers
from gossamer.models.support import check_supported

DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(
    path: str | Path, dtype: str = "auto", attn_implementation: str | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a decoder for inference: evaluation mode, no gradients, no remote code, no pickle, no network.

    Args:
        path: a checkpoint directory, as :func:`gossamer.models.resolve_model` returns it.
        dtype: ``auto`` keeps the checkpoint's; or ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: a name in transformers' attention interface; ``None`` lets transformers choose.
        device: where the weights go, for example ``cpu`` or ``cuda:0``.

    Returns:
        The model and its tokenizer.

    Raises:
        ConfigurationError: ``dtype`` is not one of the four.
        CheckpointError: a file is missing, damaged, or lacks tensors of the model.
        UnsupportedModelError: the architecture cannot be run exactly.
    """
    if dtype not in DTYPES:
        raise ConfigurationError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    directory = Path(path)
    config = load_config(directory)
    check_directory(directory)
    check_weights(directory)
    check_supported(config)
    with quiet_transformers():
        tokenizer = _load_tokenizer(directory)
        model = _load_weights(directory, config, dtype, attn_implementation)
    return model.to(device).eval().requires_grad_(False), tokenizer


def load_config(directory: str | Path) -> PreTrainedConfig:
    """Reads ``config.json``.

    Raises:
        CheckpointError: the file is missing or damaged.
        UnsupportedModelError: transformers does not know the model type.
    """
    file = Path(directory) / "config.json"
    try:
        fields = json.loads(file.read_text())
        model_type = fields.get("model_type")
    except FileNotFoundError:
        raise CheckpointError(f"{directory} is not a complete checkpoint; missing: config.json") from None
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if model_type not in CONFIG_MAPPING:
        name = ", ".join(fields.get("architectures") or ()) or "no architecture named"
        remote = "; its own Python code (auto_map) is not run" if "auto_map" in fields else ""
        raise UnsupportedModelError(
            f"{file}: the model type {model_type!r} ({name}) is unknown to the installed transformers{remote}. "
            "A later transformers may know it."
        )
    try:
        with quiet_transformers():
            return AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # config classes check their fields with assorted builtin and strict-dataclass errors
        raise CheckpointError(f"{file} has a value that {model_type} does not accept: {error}") from error


def _load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error


def _load_weights(
    directory: Path, config: PreTrainedConfig, dtype: str, attn_implementation: str | None
) -> PreTrainedModel:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            directory,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except ImportError as error:  # a quantized checkpoint whose quantizer is not installed, for example
        raise UnsupportedModelError(f"{directory} needs a package that is not installed: {error}") from error
    except (RuntimeError, OSError, KeyError) as error:  # tensors of the wrong shape, unreadable files
        raise CheckpointError(f"the weights in {directory} do not fit its config.json: {error}") from error
    # transformers would fill these with random numbers and go on.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the weights in {directory} lack {len(missing)} tensors, among them {missing[0]}")
    return model
