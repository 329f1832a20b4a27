"""Loads a model for a runner: where it is, what its weights are computed as, and what computes them.

The weights of a GGUF file, and 4-bit weights of a directory, are used as they are stored where the native runner can.
Otherwise they are computed with in floating point: the file is converted once into the cache, those of a directory are
dequantized whenever they are loaded. Asking for int8 keeps those in Q8_0 as they are: rows with one scale each would
only lose what blocks of 32 have kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from gossamer.engine.runner import Runner
from gossamer.errors import UnsupportedModelError
from gossamer.kernels.library import instruction_set
from gossamer.models.foreign_int4 import int4_format
from gossamer.models.gguf_weights import GGUFModel, read_gguf, unstorable
from gossamer.models.load import load_config, load_model
from gossamer.models.lora import Adapter, load_adapter
from gossamer.models.mxfp4 import is_mxfp4
from gossamer.models.resolve import resolve_model
from gossamer.native.packing import unsupported
from gossamer.nn import Int8Linear, StoredEmbedding, StoredLinear
from gossamer.options import ModelOptions, RunnerOptions
from gossamer.runners.choose import make_runner
from gossamer.runners.transformers import IMPLEMENTATION


@dataclass(frozen=True)
class LoadedModel:
    """A model and what runs it.

    Attributes:
        path: the directory, or GGUF file, it was loaded from.
        network: of transformers; the native runner has taken its weights over.
        tokenizer: of it.
        runner: what computes it.
        runner_note: why that is not the native runner, if it might have been; otherwise empty.
        weights: what is computed with, such as ``as stored: Q4_K 169, Q6_K 29``, ``int8`` or ``float32``.
        weights_note: why the weights of a GGUF file are not used as they are stored, if they might have been; otherwise
            empty.
        adapters: that requests may ask for.
    """

    path: Path
    network: Any
    tokenizer: Any
    runner: Runner
    runner_note: str
    weights: str
    weights_note: str
    adapters: tuple[Adapter, ...] = ()


def load_for_runner(
    model: str | Path,
    options: ModelOptions = ModelOptions(),
    runner: RunnerOptions = RunnerOptions(),
    *,
    max_rows: int,
    max_seqs: int | None = None,
    adapters: Mapping[str, str | Path] | None = None,
) -> LoadedModel:
    """Find a model, load it and make its runner.

    Args:
        model: what :func:`~gossamer.models.resolve.resolve_model` finds.
        options: what it is loaded as.
        runner: which runner, and what it does.
        max_rows, max_seqs: see :func:`~gossamer.runners.choose.make_runner`.
        adapters: name -> directory; see :func:`~gossamer.models.lora.load_adapter`.

    Raises:
        GossamerError: what finding, loading and running raise. Weights that were asked for as they are stored, and
            cannot be used so, are an ``UnsupportedModelError``.
    """
    adapters = adapters or {}
    choosing = _may_choose(options) and _may_be_native(options, runner)
    path = resolve_model(model, as_file=choosing or _reads_file(options))
    note = ""
    if choosing and (found := _in_blocks(path, options)):
        source, note = found
        if not note:
            stored = _as_stored(options)
            try:
                return _load(source, stored, replace(runner, runner="native"), max_rows, max_seqs, adapters)
            except UnsupportedModelError as error:
                note = str(error)
    if choosing and path.is_file() and not options.int8:
        path = resolve_model(model)
    return replace(_load(path, options, runner, max_rows, max_seqs, adapters), weights_note=note)


def load_network(model: str | Path, options: ModelOptions = ModelOptions()) -> tuple[Any, Any]:
    """Find a model and load it, to be called by itself, without a runner.

    Its weights are as they are stored where they would be with a runner. They are dequantized anew in every pass then,
    which takes time in place of memory, and changes no value.

    Returns:
        A model of transformers and its tokenizer.

    Raises:
        GossamerError: what finding and loading raise.
    """
    choosing = _may_choose(options)
    path = resolve_model(model, as_file=choosing or _reads_file(options))
    if choosing and (found := _in_blocks(path, options)) and not found[1]:
        return load_model(found[0], options=_as_stored(options))
    if choosing and path.is_file() and not options.int8:
        path = resolve_model(model)
    return load_model(path, options=options)


def _may_choose(options: ModelOptions) -> bool:
    """Whether it is left open if weights in quantized blocks are used as they are."""
    return options.weights == "auto" and (options.may_stay_stored or options.may_stay_in_8_bits)


def _as_stored(options: ModelOptions) -> ModelOptions:
    """What was asked for, once weights are found to stay as they are."""
    return replace(options, weights="as-stored", quantization=None, int8_head=False)


def _reads_file(options: ModelOptions) -> bool:
    """Whether a GGUF file is loaded by itself in any case."""
    return options.int8 or options.weights == "as-stored"


def _in_blocks(path: Path, options: ModelOptions) -> tuple[Path | GGUFModel, str] | None:
    """What holds weights in quantized blocks, and why the native runner would not take them as they are.

    The reason is told as far as the files tell it, and is empty otherwise. ``None``: no weights are in such blocks, or
    int8 was asked for and they are something else.
    """
    if path.is_file():
        opened = read_gguf(path)
        types = {tensor.type.name for tensor in opened.file.tensors.values() if tensor.in_blocks}
        if not types or (options.int8 and types != {"Q8_0"}):
            return None
        return opened, unstorable(opened.file) or unsupported(opened.config.get_text_config())
    if options.int8:
        return None
    config = load_config(path)
    text = config.get_text_config()
    return (path, unsupported(text)) if int4_format(config) or is_mxfp4(config) else None


def _may_be_native(options: ModelOptions, runner: RunnerOptions) -> bool:
    """Whether the native runner is there, and not ruled out by what was asked for."""
    return runner.runner != "transformers" and options.device == "cpu" and instruction_set() is not None


def _load(
    source: Path | GGUFModel,
    options: ModelOptions,
    runner: RunnerOptions,
    max_rows: int,
    max_seqs: int | None,
    adapters: Mapping[str, str | Path],
) -> LoadedModel:
    network, tokenizer = load_model(source, attn_implementation=IMPLEMENTATION, options=options)
    weights = weights_of(network)
    loaded = [load_adapter(name, directory, network) for name, directory in adapters.items()]
    made, reason = make_runner(network, runner, max_rows=max_rows, max_seqs=max_seqs, adapters=loaded)
    path = source.file.path if isinstance(source, GGUFModel) else source
    return LoadedModel(path, network, tokenizer, made, reason, weights, "", tuple(loaded))


def weights_of(network: nn.Module) -> str:
    """What a model that was loaded computes with.

    >>> weights_of(nn.Linear(2, 2))
    'float32'
    """
    modules = list(network.modules())
    stored = {id(each.stored): each.stored for each in modules if isinstance(each, StoredLinear | StoredEmbedding)}
    if stored:
        counts = Counter(matrix.type for matrix in stored.values())
        return "as stored: " + ", ".join(f"{name} {count}" for name, count in counts.most_common())
    if any(isinstance(each, Int8Linear) for each in modules):
        return "int8"
    return str(next(network.parameters()).dtype).removeprefix("torch.")
