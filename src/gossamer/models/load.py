"""A checkpoint directory becomes a model and a tokenizer, ready for inference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.checkpoint import check_directory, check_weights, stored_dtype
from gossamer.models.foreign_int8 import foreign_format, read_foreign
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.gguf_weights import open_weights, read_gguf
from gossamer.models.int8_quantizer import QUANT_METHOD, GossamerInt8Config
from gossamer.models.quiet import quiet_transformers
from gossamer.models.support import check_supported
from gossamer.nn.int8_embedding import Int8TiedHead
from gossamer.nn.int8_head import quantize_head
from gossamer.nn.int8_linear import Int8Linear
from gossamer.options import ModelOptions


def load_model(
    path: str | Path,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: GossamerInt8Config | None = None,
    *,
    options: ModelOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a decoder for inference: evaluation mode, no gradients, no remote code, no pickle, no network.

    Args:
        path: a checkpoint directory, as :func:`gossamer.models.resolve_model` returns it; or a GGUF file, whose
            weights are dequantized.
        dtype: ``auto`` keeps the checkpoint's; or ``float32``, ``bfloat16``, ``float16``.
        attn_implementation: a name in transformers' attention interface; ``None`` lets transformers choose.
        quantization: make the linear layers int8 while they are read. A checkpoint that is int8 already needs no
            such argument; its layers then take over what this one says about outliers.
        options: the same and more, as a whole, in place of ``dtype``; see :mod:`gossamer.nn.int8_head` for the output
            layer. ``quantization`` says more about int8 layers, and counts if both do.

    Returns:
        The model and its tokenizer.

    Raises:
        ConfigurationError: ``dtype`` is not one of the four, or the weights cannot be quantized.
        CheckpointError: a file is missing, damaged, or lacks tensors of the model.
        UnsupportedModelError: the architecture cannot be run exactly.
    """
    options = options or ModelOptions(dtype=dtype)
    dtype, quantization = options.dtype, quantization or int8_config(options)
    path = Path(path)
    gguf: GGUFFile | None = None
    if path.is_file():
        gguf, config, tokenizer = read_gguf(path)
    else:
        config = load_config(path)
        check_directory(path)
        check_weights(path)
    check_supported(config)
    with quiet_transformers():
        if path.is_dir():
            tokenizer = load_tokenizer(path)
        source: dict[str, Any] = {}
        if path.is_dir() and (foreign := foreign_format(config)):
            source = {"pretrained_model_name_or_path": None, "state_dict": read_foreign(path, config, foreign)}
            dtype = str(config.dtype or stored_dtype(path)).removeprefix("torch.") if dtype == "auto" else dtype
        if quantization and not is_int8_checkpoint(config):
            model = _quantize_weights(path, gguf, config, dtype, attn_implementation, quantization)
        else:
            if gguf is not None:
                source = {"pretrained_model_name_or_path": None, "state_dict": open_weights(gguf, config)}
                dtype = "float32" if dtype == "auto" else dtype
            model = _load_weights(path, config, dtype, attn_implementation, **source)
            if quantization:
                use_decomposition(model, quantization)
    model = model.to(options.device).eval().requires_grad_(False)
    if options.int8_head:
        done = quantize_head(model, quantization.decomposition() if quantization else None)
        report = getattr(getattr(model, "hf_quantizer", None), "report", None)
        if done and report is not None:
            report.skipped.pop(done.name, None)
            report.layers.append(done)
    return model, tokenizer


def int8_config(options: ModelOptions) -> GossamerInt8Config | None:
    """How the linear layers become int8, if they do."""
    if options.quantization is None:
        return None
    return GossamerInt8Config(options.int8_threshold, options.int8_criterion, options.int8_outliers)


def is_int8_checkpoint(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of ``gossamer compress --int8``, or of ``save_pretrained`` of such a model."""
    stored = getattr(config, "quantization_config", None)
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


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


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a directory; no remote code, no network."""
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exception
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error


def _quantize_weights(
    path: Path,
    gguf: GGUFFile | None,
    config: PreTrainedConfig,
    dtype: str,
    attn_implementation: str | None,
    quantization: GossamerInt8Config,
) -> PreTrainedModel:
    """Reads the weights in the type they are stored in, so that none is rounded before it is quantized."""
    options: dict[str, Any] = {"quantization_config": quantization}
    stored = "float32"
    if gguf is not None:
        options |= {"pretrained_model_name_or_path": None, "state_dict": open_weights(gguf, config, quantization.skip)}
    else:
        stored = stored_dtype(path)
    model = _load_weights(path, config, stored, attn_implementation, **options)
    wanted = dtype if dtype != "auto" else str(config.dtype or stored).removeprefix("torch.")
    model.config.dtype = getattr(torch, wanted)
    return model if wanted == stored else model.to(model.config.dtype)


def _load_weights(
    path: Path, config: PreTrainedConfig, dtype: str, attn_implementation: str | None, **options: Any
) -> PreTrainedModel:
    arguments = {"pretrained_model_name_or_path": path} | options
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **arguments,
        )
    except ImportError as error:  # a quantized checkpoint whose quantizer is not installed, for example
        raise UnsupportedModelError(f"{path} needs a package that is not installed: {error}") from error
    except (RuntimeError, OSError, KeyError) as error:  # tensors of the wrong shape, unreadable files
        raise CheckpointError(f"the weights in {path} do not fit its configuration: {error}") from error
    # transformers would fill these with random numbers and go on.
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(f"the weights in {path} lack {len(missing)} tensors, among them {missing[0]}")
    return model


def use_decomposition(model: PreTrainedModel, quantization: GossamerInt8Config) -> None:
    """Let the int8 layers of a model treat outliers as ``quantization`` says."""
    for module in model.modules():
        if isinstance(module, (Int8Linear, Int8TiedHead)):
            module.decomposition = quantization.decomposition()
    own = model.config.quantization_config
    own.threshold, own.criterion, own.outliers = quantization.threshold, quantization.criterion, quantization.outliers
