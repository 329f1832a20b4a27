"""A checkpoint directory becomes a model and a tokenizer, ready for inference."""

from __future__ import annotations

from dataclasses import dataclass
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

from gossamer.errors import CheckpointError, GossamerError, UnsupportedModelError
from gossamer.models.checkpoint import check_directory
from gossamer.models.checkpoint_weights import check_loaded, load_generation_config, open_checkpoint
from gossamer.models.config_fields import check_fields
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.gguf_weights import open_weights, read_gguf
from gossamer.models.int8_quantizer import QUANT_METHOD, GossamerInt8Config
from gossamer.models.json_file import read_object
from gossamer.models.quiet import quiet_transformers
from gossamer.models.shard_reader import ShardReader
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
        check_directory(path)
        config = load_config(path)
    check_supported(config)
    with quiet_transformers():
        if path.is_dir():
            tokenizer = load_tokenizer(path)
            with open_checkpoint(path, config) as (reader, weights):
                source = _Source(path, config, weights, reader)
                model = _load(source, dtype, attn_implementation, quantization)
            load_generation_config(model, path)
        else:
            assert gguf is not None
            weights = open_weights(gguf, config, quantization.skip if quantization else None)
            model = _load(_Source(path, config, weights, None), dtype, attn_implementation, quantization)
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
    if not file.exists():
        raise CheckpointError(f"{directory} is not a complete checkpoint; missing: config.json")
    check_fields(fields := read_object(file), file)
    model_type = fields.get("model_type")
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
    """The tokenizer of a directory; no remote code, no network.

    Raises:
        CheckpointError: a file of it is missing or damaged, or it cannot encode a text.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        if not isinstance(tokenizer.model_max_length, int | float):
            raise TypeError(f"model_max_length is {type(tokenizer.model_max_length).__name__}, and has to be a number")
        tokenizer.encode("")  # reads settings that are taken over unseen
        return tokenizer
    except BaseException as error:  # the tokenizers library raises plain Exception, and its panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"the tokenizer in {directory} cannot be read: {error}") from error


@dataclass(frozen=True)
class _Source:
    """What a model is made from: a directory, or a GGUF file, which has no reader."""

    path: Path
    config: PreTrainedConfig
    weights: dict[str, Any]
    reader: ShardReader | None


def _load(
    source: _Source, dtype: str, attn_implementation: str | None, quantization: GossamerInt8Config | None
) -> PreTrainedModel:
    """The model, whose layers become int8 if asked for."""
    stored = source.reader.stored_dtype() if source.reader else "float32"
    wanted = dtype if dtype != "auto" else str(source.config.dtype or stored).removeprefix("torch.")
    if not quantization or is_int8_checkpoint(source.config):
        model = _from_weights(source, wanted, attn_implementation)
        if quantization:
            use_decomposition(model, quantization)
        return model
    # The type that the weights are stored in, so that none is rounded before it is quantized.
    model = _from_weights(source, stored, attn_implementation, quantization_config=quantization)
    model.config.dtype = getattr(torch, wanted)
    return model if wanted == stored else model.to(model.config.dtype)


def _from_weights(source: _Source, dtype: str, attn_implementation: str | None, **options: Any) -> PreTrainedModel:
    path = source.path
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(source.config)].from_pretrained(
            None,
            state_dict=source.weights,
            config=source.config,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    except ImportError as error:  # a quantized checkpoint whose quantizer is not installed, for example
        raise UnsupportedModelError(f"{path} needs a package that is not installed: {error}") from error
    except (RuntimeError, OSError, KeyError, IndexError, TypeError, ValueError) as error:
        # tensors of the wrong shape, values of the configuration that only show when modules are made
        if isinstance(error, GossamerError):
            raise
        raise CheckpointError(f"the weights in {path} do not fit its configuration: {error}") from error
    check_loaded(model, info, source.reader, path)
    model.config._name_or_path = str(path)
    return model


def use_decomposition(model: PreTrainedModel, quantization: GossamerInt8Config) -> None:
    """Let the int8 layers of a model treat outliers as ``quantization`` says."""
    for module in model.modules():
        if isinstance(module, (Int8Linear, Int8TiedHead)):
            module.decomposition = quantization.decomposition()
    own = model.config.quantization_config
    own.threshold, own.criterion, own.outliers = quantization.threshold, quantization.criterion, quantization.outliers
