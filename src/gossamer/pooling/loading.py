"""A checkpoint becomes a model that makes vectors or scores of texts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForSequenceClassification

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.kernels.library import instruction_set
from gossamer.models.encoder import is_encoder, load_encoder
from gossamer.models.load import load_config
from gossamer.models.pooling_config import is_classifier, makes_embeddings, positions, read_pooling
from gossamer.models.resolve import resolve_model
from gossamer.models.support import check_supported
from gossamer.nn.int8_linear import Decomposition
from gossamer.options import ModelOptions, Options, Task
from gossamer.pooling.encoder import AnyNetwork, Encoder, is_defined
from gossamer.pooling.linears import LinearPacker, replace_linears
from gossamer.pooling.model import PoolingModel
from gossamer.pooling.refusals import check_options
from gossamer.pooling.texts import Texts


def find_task(model: str | Path, task: Task = "auto") -> Literal["generate", "embed", "score"]:
    """What a model is for: what was asked for, or what its checkpoint was made for.

    Raises:
        GossamerError: it cannot be found.
        UnsupportedModelError: it cannot do what was asked for.
    """
    path = resolve_model(model, as_file=True)
    config = None if path.is_file() else load_config(path)
    if config is None or not makes_embeddings(path, config):
        if task == "score":
            raise UnsupportedModelError(f"{model} has no head that scores texts; task 'embed' ranks them by embeddings")
        return "generate" if task == "auto" else task
    classifier = is_classifier(config)
    if task == "generate" and is_encoder(config):
        raise UnsupportedModelError(f"{model} is an encoder, which generates no text; leave the task out")
    if task == "score" and not classifier:
        raise UnsupportedModelError(f"{model} has no head that scores texts; task 'embed' ranks them by embeddings")
    if task == "auto":
        return "score" if classifier else "embed"
    return task


def load_pooling(model: str | Path, task: Literal["embed", "score"], options: Options) -> tuple[PoolingModel, Path]:
    """Find a model and load it for embeddings or scores.

    Args:
        model: what :func:`~gossamer.models.resolve.resolve_model` finds.
        task: see :func:`find_task`.
        options: ``dtype``, int8, ``device``, ``runner`` and ``max_model_len`` count.

    Returns:
        The model, and the directory that it was loaded from.

    Raises:
        GossamerError: what finding and loading raise.
        ConfigurationError: an option has no meaning for such models.
    """
    check_options(str(model), task, options)
    path = resolve_model(model)
    config = load_config(path)
    if not is_encoder(config):
        check_supported(config)
    dtype = _dtype(options.model)
    kind = AutoModelForSequenceClassification if task == "score" else AutoModel
    network, tokenizer = load_encoder(path, "float32", kind)
    described = read_pooling(path, config, tokenizer)
    isa, note = _instruction_set(options)
    decomposition = None
    if options.model.int8:
        given = options.model
        decomposition = Decomposition(given.int8_threshold, given.int8_criterion, given.int8_outliers)
    pack = LinearPacker(isa, dtype, decomposition)
    body: Any = network.base_model
    head = _score_head(network) if task == "score" else None
    if is_defined(config) and options.model.device == "cpu" and (isa or dtype == "float32"):
        runs: Any = Encoder(body, pack)
    else:
        if isa is not None or decomposition is not None:
            replace_linears(body, pack)
        runs = AnyNetwork(body.to(options.model.device, None if isa else getattr(torch, dtype)))
    texts = Texts(
        tokenizer,
        vocab_size=body.get_input_embeddings().weight.shape[0],
        max_length=_max_length(options.engine.max_model_len, positions(config), described.max_length),
        lower_case=described.lower_case,
    )
    weights = "int8" if decomposition else dtype
    width = int(config.get_text_config().hidden_size)
    found = PoolingModel(
        task, runs, texts, pooling=described.pooling, head=head, width=width, weights=weights, note=note
    )
    return found, path


def _dtype(options: ModelOptions) -> str:
    if options.dtype == "float16":
        raise ConfigurationError("embeddings are computed in float32 or bfloat16, not in float16")
    if options.weights == "as-stored":
        raise ConfigurationError("weights='as-stored' is for generating models; leave it out")
    return "float32" if options.dtype == "auto" else options.dtype


def _instruction_set(options: Options) -> tuple[str | None, str]:
    """That of the kernels; and why there is none, where there might have been."""
    if options.runner.runner == "transformers" or options.model.device != "cpu":
        return None, ""
    isa = instruction_set()
    if isa is None and options.runner.runner == "native":
        raise UnsupportedModelError("the native kernels are not there; leave the runner out")
    return isa, "" if isa else "the native kernels are not there"


def _max_length(asked: int | None, most: int, advised: int) -> int:
    if asked is not None and asked > most:
        raise ConfigurationError(f"max_model_len is {asked}; the model has positions for {most} tokens")
    return asked or advised


def _score_head(network: Any) -> Callable[[Tensor], Tensor]:
    """From the vectors of tokens (texts, length, D) to scores (texts): of one logit its sigmoid, unless it is to stay.

    Raises:
        UnsupportedModelError: it has several labels.
    """
    if network.config.num_labels != 1:
        raise UnsupportedModelError(
            f"the model has {network.config.num_labels} labels; one that scores pairs has a single one"
        )
    pooler = getattr(network.base_model, "pooler", None)
    said = getattr(network.config, "sentence_transformers", None)
    activation = said.get("activation_fn") if isinstance(said, dict) else None
    keeps_logit = str(activation or "").endswith("Identity")

    def scores(vectors: Tensor) -> Tensor:
        logits = network.classifier(vectors if pooler is None else pooler(vectors))[:, 0]
        return logits if keeps_logit else logits.sigmoid()

    return scores
