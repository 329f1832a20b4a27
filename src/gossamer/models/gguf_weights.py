"""The weights of a GGUF file under the names transformers gives them, dequantized when they are asked for, by rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.dequantized_rows import DequantizedRows, quantized_weights
from gossamer.models.gguf_config import check_architecture, embedding_rows, read_config, stored_as
from gossamer.models.gguf_experts import find_experts, is_of_experts
from gossamer.models.gguf_file import GGUFFile, GGUFTensor
from gossamer.models.gguf_gemma4 import Gemma4TensorProcessor
from gossamer.models.gguf_qwen35 import Qwen35TensorProcessor
from gossamer.models.gguf_rope import ROPE_TENSORS
from gossamer.models.gguf_tokenizer import GGUFVocabulary, read_tokenizer
from gossamer.models.quiet import quiet_transformers
from gossamer.models.support import check_supported
from gossamer.nn.block_types import BLOCK_TYPES
from gossamer.nn.stored_matrix import StoredMatrix
from gossamer.progress import Progress

_PROCESSORS = {"gemma4": Gemma4TensorProcessor, "qwen35": Qwen35TensorProcessor}
_INSTEAD = "weights='dequantized' computes with it in floating point."


class GGUFWhole:
    """A tensor of a GGUF file that is no matrix of plain rows; ``[...]`` dequantizes it."""

    def __init__(self, read: Callable[[], np.ndarray]) -> None:
        self._read = read

    def __getitem__(self, rows: Any) -> Tensor:
        return torch.from_numpy(self._read())


Weights = dict[str, Any]  # DequantizedRows, GGUFWhole and the like, StoredMatrix, or a tensor


class GGUFModel(NamedTuple):
    """A GGUF file, and what it says beside the weights."""

    file: GGUFFile
    config: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase


def read_gguf(path: Path) -> GGUFModel:
    """A GGUF file, its configuration and its tokenizer.

    Raises:
        CheckpointError: the file is damaged or incomplete.
        UnsupportedModelError: its architecture, a key of it or its tokenizer is unknown here, or cannot be run.
    """
    file = GGUFFile(path)
    check_architecture(file)
    vocabulary = GGUFVocabulary(file, embedding_rows(file))
    config = read_config(file, vocabulary)
    check_supported(config)
    return GGUFModel(file, config, read_tokenizer(file, vocabulary))


def unstorable(file: GGUFFile) -> str:
    """Why the weights of a file cannot be computed with as they are stored; an empty string if they can."""
    quantized = [tensor for tensor in file.tensors.values() if tensor.in_blocks]
    if not quantized:
        return f"none of its tensors is in quantized blocks ({stored_as(file)})"
    for tensor in quantized:
        if tensor.type.name not in BLOCK_TYPES:
            return f"{tensor.name} is stored as {tensor.type.name}, which is computed in floating point only"
        if len(tensor.shape) != 2 and not is_of_experts(tensor):
            return f"{tensor.name} of shape {list(tensor.shape)} is no matrix"
    for tensor in file.tensors.values():
        if is_of_experts(tensor) and tensor.name.endswith(".weight") and not tensor.in_blocks:
            return f"{tensor.name} is stored as {tensor.type.name}, and other weights in quantized blocks"
    return ""


def open_weights(
    file: GGUFFile, config: PreTrainedConfig, skip: Sequence[str] | None = None, *, as_stored: bool = False
) -> Weights:
    """The weights of a file by transformers' names; nothing of them is read yet.

    Args:
        file: the file.
        config: the model's, as :func:`read_gguf` gives it.
        skip: layers that will not be quantized, as in :func:`gossamer.models.quantize.quantize`, while the other linear
            layers will be; ``None`` if none will be.
        as_stored: weights in quantized blocks are given as they are.

    Raises:
        CheckpointError: a tensor has another size than the keys say, or a block of it has a scale that is NaN or
            infinite.
        UnsupportedModelError: the model has no place for a tensor of the file, or not as it is stored; names it.
    """
    if as_stored and (reason := unstorable(file)):
        raise UnsupportedModelError(f"{file.path} cannot be used as it is stored: {reason}. {_INSTEAD}")
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    kind = _PROCESSORS.get(file.architecture) or TENSOR_PROCESSORS.get(file.architecture, TensorProcessor)
    processor = kind(config=config.to_dict())
    names = _names_in(file, model, processor)
    kept = quantized_weights(model, skip)
    stored = _storable_weights(model) if as_stored else frozenset()
    weights: Weights = {}
    unknown = []
    of_experts = [tensor for tensor in file.tensors.values() if is_of_experts(tensor)]
    for tensor in file.tensors.values():
        if is_of_experts(tensor):
            continue
        name = names.get(tensor.name) or names.get(tensor.name.removesuffix(".weight"))
        if name is None:
            if tensor.name not in ROPE_TENSORS:  # these are part of the configuration
                unknown.append(tensor.name)
        else:
            try:
                if as_stored and tensor.in_blocks:
                    weights[name] = _stored(tensor, processor, name in stored)
                else:
                    weights[name] = _open(tensor, processor, name in kept)
            except (ValueError, IndexError) as error:  # rows that cannot be divided among the heads
                raise CheckpointError(
                    f"{file.path}: {tensor.name} does not fit the keys of the file: {error}"
                ) from None
    if unknown:
        raise UnsupportedModelError(
            f"{file.path}: {config.model_type} of transformers has no place for {len(unknown)} of its tensors, among "
            f"them {unknown[0]}; without them it would be another model"
        )
    _check_scales(file)
    for experts in find_experts(of_experts, model):
        weights |= experts.separate() if as_stored else experts.whole()
    # A bias that a file leaves out is none, even where other layers of the model have one.
    for name, parameter in model.state_dict().items():
        if name.endswith(".bias") and name not in weights:
            weights[name] = torch.zeros(parameter.shape, device="cpu")
    return weights


def _names_in(file: GGUFFile, model: Any, processor: TensorProcessor) -> dict[str, str]:
    """transformers' names of tensors, by those that they have in a file of this architecture."""
    architecture = next(each for each, name in gguf.MODEL_ARCH_NAMES.items() if name == file.architecture)
    known = gguf.get_tensor_name_map(architecture, model.config.get_text_config().num_hidden_layers)
    names: dict[str, str] = {}
    for name in map(processor.preprocess_name, model.state_dict()):
        module, _, last = name.rpartition(".")
        stem, suffix = (module, f".{last}") if last in ("weight", "bias") else (name, "")
        if (found := known.get_name(stem)) is not None:
            names[found + suffix] = name
        else:  # one of transformers for several in the file
            processor.perform_fallback_tensor_mapping(names, suffix, "", name)
    return names


def _storable_weights(model: Any) -> frozenset[str]:
    """Names of the weights that can stay in blocks: those of linear layers and of embeddings."""
    layers = (name for name, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Embedding))
    return frozenset(f"{name}.weight" for name in layers)


def _stored(tensor: GGUFTensor, processor: TensorProcessor, storable: bool) -> StoredMatrix:
    order = _row_order(tensor, processor) if storable else None
    if order is None:
        raise UnsupportedModelError(
            f"{tensor.path}: {tensor.name} is stored as {tensor.type.name}, and is not the weight of a linear layer or "
            f"of an embedding. {_INSTEAD}"
        )
    columns = _input_order(tensor, processor)
    inputs = None if columns is None else torch.from_numpy(columns)
    return StoredMatrix(tensor.type.name, tensor.shape[1], tensor.data, order, tensor.mapped, inputs)


def _check_scales(file: GGUFFile) -> None:
    """Reads the scales of all blocks, so that none is a surprise later."""
    tensors = file.tensors.values()
    with Progress(len(tensors), "checking weights") as progress, ThreadPoolExecutor() as pool:
        for _ in pool.map(GGUFTensor.check_scales, tensors):
            progress.advance()


def _open(tensor: GGUFTensor, processor: TensorProcessor, kept: bool) -> DequantizedRows | GGUFWhole:
    order = _row_order(tensor, processor)
    if order is None or _input_order(tensor, processor) is not None:
        return GGUFWhole(lambda: np.array(processor.process(tensor.dequantize(), tensor.name).weights))
    return DequantizedRows(tensor.shape, lambda rows: torch.from_numpy(tensor.dequantize(order[rows])), kept)


def _input_order(tensor: GGUFTensor, processor: Any) -> np.ndarray | None:
    """Which input of the model each column of a file's matrix is for, where they are not in order."""
    found: np.ndarray | None = processor.input_order(tensor.name) if hasattr(processor, "input_order") else None
    return found


def _row_order(tensor: GGUFTensor, processor: TensorProcessor) -> np.ndarray | None:
    """Which row of the file each row of the weight is, or ``None`` if the weight is not the file's rows in some order.

    The processor is asked what it does to a matrix of one column that holds the numbers of its rows.
    """
    if len(tensor.shape) != 2:
        return None
    numbers = np.arange(tensor.shape[0], dtype=np.int64)
    moved = processor.process(numbers[:, None].copy(), tensor.name).weights
    rows = moved is not None and moved.shape == (len(numbers), 1) and np.array_equal(np.sort(moved[:, 0]), numbers)
    return moved[:, 0] if rows else None
