"""Layers with stored weights as a quantization method of transformers' ``from_pretrained``.

transformers makes the model without memory, this puts the stored weights in, and what is left, such as norms and
biases, is read as usual.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.nn.experts import separate_experts
from gossamer.nn.int8_embedding import unsupported_embedding
from gossamer.nn.quantize import tied_head
from gossamer.nn.replacing import irreplaceable, used_otherwise
from gossamer.nn.stored_linear import StoredEmbedding, StoredLinear
from gossamer.nn.stored_matrix import StoredMatrix

_METHOD = "gossamer_stored"

# What a model that is loaded takes, and where it is from; set it with :func:`storing`.
_matrices: ContextVar[tuple[Mapping[str, StoredMatrix], str]] = ContextVar("matrices")


@contextmanager
def storing(matrices: Mapping[str, StoredMatrix], where: str) -> Iterator[StoredWeightsConfig]:
    """Have a model that is loaded in the body with the configuration take these as weights, by transformers' names.

    Args:
        matrices: see :func:`place_stored`.
        where: they are from, for messages.
    """
    token = _matrices.set((matrices, where))
    try:
        yield StoredWeightsConfig()
    finally:
        _matrices.reset(token)


@register_quantization_config(_METHOD)
class StoredWeightsConfig(QuantizationConfigMixin):
    """Says that weights are as a file stores them. The file says the rest."""

    def __init__(self, quant_method: str = _METHOD) -> None:
        self.quant_method = _METHOD


@register_quantizer(_METHOD)
class StoredWeightsQuantizer(HfQuantizer):
    """Puts layers with stored weights in the places of a model's layers."""

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self) -> bool:
        """Transformers has no format for it; the file is there already."""
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        place_stored(model, *_matrices.get())


def place_stored(model: PreTrainedModel, matrices: Mapping[str, StoredMatrix], where: str) -> None:
    """Put layers with stored weights in the places of a model's linear layers and embedding.

    Args:
        model: on the meta device.
        matrices: by the names of the weights that they replace. The weight of a tied output layer is the embedding's.
        where: they are from, for messages.

    Raises:
        CheckpointError: a matrix is of another shape than the layer's weight.
        UnsupportedModelError: a layer cannot be replaced.
    """
    separate_experts(model, lambda name: f"{name}.0.gate_proj.weight" in matrices, clamped=True)
    head = tied_head(model)
    head_name = next((name for name, module in model.named_modules() if module is head), "")
    embedding = model.get_input_embeddings()
    for weight, matrix in matrices.items():
        name = weight.removesuffix(".weight")
        try:
            old = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"the weights in {where} do not fit their configuration: the model has no {weight}"
            ) from None
        if tuple(old.weight.shape) != tuple(matrix.shape):
            raise CheckpointError(
                f"the weights in {where} do not fit their configuration: {weight} is {list(matrix.shape)}, and the "
                f"model's {list(old.weight.shape)}"
            )
        parent, _, last = name.rpartition(".")
        if old is not embedding and not isinstance(old, nn.Embedding):
            if reason := irreplaceable(old, last, model.get_submodule(parent)):
                raise UnsupportedModelError(f"{where}: the weight of {name} cannot be as stored: {reason}")
            model.set_submodule(name, StoredLinear(matrix, _bias(old)))
            continue
        if reason := unsupported_embedding(old) or used_otherwise(old, last, model.get_submodule(parent)):
            raise UnsupportedModelError(f"{where}: the weight of {name} cannot be as stored: {reason}")
        if old is not embedding:
            model.set_submodule(name, StoredEmbedding.in_place_of(old, matrix))
            continue
        model.set_input_embeddings(StoredEmbedding.in_place_of(old, matrix))
        if head is not None:
            model.set_submodule(head_name, StoredLinear(matrix, _bias(head)))
            model.all_tied_weights_keys.pop(f"{head_name}.weight", None)  # tied by what the modules are


def _bias(layer: nn.Module) -> nn.Parameter | None:
    bias: nn.Parameter | None = layer.bias  # type: ignore[assignment]  # a linear layer has it
    return bias
