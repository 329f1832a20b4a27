"""A checkpoint directory becomes a model and a tokenizer, ready for inference."""

from __future__ import annotations

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
from transformers.distributed import DistributedConfig

from gossamer.errors import CheckpointError, GossamerError, UnsupportedModelError
from gossamer.models.checkpoint import check_directory
from gossamer.models.checkpoint_weights import check_loaded, load_generation_config, open_checkpoint
from gossamer.models.config_fields import check_fields
from gossamer.models.gguf_weights import GGUFModel, open_weights, read_gguf
from gossamer.models.int8_quantizer import QUANT_METHOD, GossamerInt8Config
from gossamer.models.json_file import read_object
from gossamer.models.manifest import kept_sampling
from gossamer.models.quiet import quiet_transformers
from gossamer.models.shard_reader import ShardReader
from gossamer.models.stored_quantizer import storing
from gossamer.models.support import check_supported
from gossamer.nn.int8_embedding import Int8TiedHead
from gossamer.nn.int8_head import quantize_head
from gossamer.nn.int8_linear import Int8Linear
from gossamer.nn.stored_matrix import StoredMatrix
from gossamer.options import ModelOptions


def load_model(
    path: str | Path | GGUFModel,
    dtype: str = "auto",
    attn_implementation: str | None = None,
    quantization: GossamerInt8Config | None = None,
    *,
    options: ModelOptions | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a decoder for inference: evaluation mode, no gradients, no remote code, no pickle, no network.

    Args:
        path: a checkpoint directory, as :func:`gossamer.models.resolve_model` returns it; or a GGUF file, which may
            have been opened already. Its weights are dequantized, unless ``options.weights`` is ``"as-stored"``: then
            they stay in the file, which is mapped, and become :class:`~gossamer.nn.StoredLinear` and
            :class:`~gossamer.nn.StoredEmbedding`. (What ``"auto"`` means is for whoever runs the model to decide, see
            :mod:`gossamer.runners.loading`.)
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
        UnsupportedModelError: the architecture cannot be run exactly, or weights cannot be used as they are stored.
    """
    options = options or ModelOptions(dtype=dtype)
    quantization = quantization or int8_config(options)
    if isinstance(path, GGUFModel) or Path(path).is_file():
        opened = path if isinstance(path, GGUFModel) else read_gguf(Path(path))
        model, tokenizer = _load_gguf(opened, options, attn_implementation, quantization), opened.tokenizer
    else:
        model, tokenizer = _load_directory(Path(path), options, attn_implementation, quantization)
    model = model.to(options.device).eval().requires_grad_(False)
    if options.int8_head:
        done = quantize_head(model, quantization.decomposition() if quantization else None)
        report = getattr(getattr(model, "hf_quantizer", None), "report", None)
        if done and report is not None:
            report.skipped.pop(done.name, None)
            report.layers.append(done)
    return model, tokenizer


def _load_directory(
    path: Path, options: ModelOptions, attn_implementation: str | None, quantization: GossamerInt8Config | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_directory(path)
    config = load_config(path)
    check_supported(config)
    with quiet_transformers():
        tokenizer = load_tokenizer(path)
        skip, as_stored = quantization.skip if quantization else None, options.weights == "as-stored"
        with open_checkpoint(path, config, skip=skip, as_stored=as_stored) as (reader, weights):
            ranks = options.tensor_parallel
            model = _load(path, config, weights, reader, options.dtype, attn_implementation, quantization, ranks)
        load_generation_config(model, path)
    return model, tokenizer


def _load_gguf(
    opened: GGUFModel, options: ModelOptions, attn_implementation: str | None, quantization: GossamerInt8Config | None
) -> PreTrainedModel:
    file, config, _ = opened
    skip = quantization.skip if quantization else None
    weights = open_weights(file, config, skip, as_stored=options.weights == "as-stored")
    sampling = kept_sampling(file.path)
    with quiet_transformers():
        model = _load(file.path, config, weights, None, options.dtype, attn_implementation, quantization)
        if sampling:
            model.generation_config.update(do_sample=True, **sampling)
    return model


def int8_config(options: ModelOptions) -> GossamerInt8Config | None:
    """How the linear layers become int8, if they do."""
    if not options.int8:
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


def load_config_and_tokenizer(path: Path) -> tuple[PreTrainedConfig, PreTrainedTokenizerBase]:
    """What a checkpoint directory, or a GGUF file, says beside its weights.

    Raises:
        GossamerError: what reading them raises.
    """
    if path.is_file():
        opened = read_gguf(path)
        return opened.config, opened.tokenizer
    return load_config(path), load_tokenizer(path)


def _load(
    path: Path,
    config: PreTrainedConfig,
    weights: dict[str, Any],
    reader: ShardReader | None,
    dtype: str,
    attn_implementation: str | None,
    quantization: GossamerInt8Config | None,
    num_ranks: int = 1,
) -> PreTrainedModel:
    """The model of a directory, or of a GGUF file (which has no reader), whose layers become int8 if asked for.

    If there are several ``num_ranks``, its weights in floating point are shared by so many processes.
    """
    stored = reader.stored_dtype() if reader else "float32"
    wanted = dtype if dtype != "auto" else str(config.dtype or stored).removeprefix("torch.")
    matrices = {name: weight for name, weight in weights.items() if isinstance(weight, StoredMatrix)}
    if matrices:
        others = {name: weight for name, weight in weights.items() if name not in matrices}
        with storing(matrices, str(path)) as placed:
            return _from_weights(path, config, others, reader, wanted, attn_implementation, quantization_config=placed)
    if not quantization or is_int8_checkpoint(config):
        parts = {"distributed_config": DistributedConfig(tp_size=num_ranks, tp_plan="auto")} if num_ranks > 1 else {}
        model = _from_weights(path, config, weights, reader, wanted, attn_implementation, **parts)
        if quantization:
            use_decomposition(model, quantization)
        return model
    # The type that the weights are stored in, so that none is rounded before it is quantized.
    model = _from_weights(path, config, weights, reader, stored, attn_implementation, quantization_config=quantization)
    model.config.dtype = getattr(torch, wanted)
    return model if wanted == stored else model.to(model.config.dtype)


def _from_weights(
    path: Path,
    config: PreTrainedConfig,
    weights: dict[str, Any],
    reader: ShardReader | None,
    dtype: str,
    attn_implementation: str | None,
    **options: Any,
) -> PreTrainedModel:
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None,
            state_dict=weights,
            config=config,
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
    check_loaded(model, info, reader, path)
    model.config._name_or_path = str(path)
    return model


def use_decomposition(model: PreTrainedModel, quantization: GossamerInt8Config) -> None:
    """Let the int8 layers of a model treat outliers as ``quantization`` says."""
    for module in model.modules():
        if isinstance(module, (Int8Linear, Int8TiedHead)):
            module.decomposition = quantization.decomposition()
    own = model.config.quantization_config
    own.threshold, own.criterion, own.outliers = quantization.threshold, quantization.criterion, quantization.outliers
