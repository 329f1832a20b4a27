"""The output layer in int8, by itself. With tied embeddings the table stays as it is for looking tokens up.

LLM.int8() leaves the output layer in 16 bit. But it is read whole for every step, and in a small model with a large
vocabulary it holds a third of the weights and more. What costs accuracy in an int8 table is looking tokens up in it: an
error there goes through the whole model, while one in the output layer meets the logits only.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.nn.int8_embedding import Int8TiedHead
from gossamer.nn.int8_linear import Decomposition, Int8Linear
from gossamer.nn.int8_weight import quantize_weight
from gossamer.nn.outlier_store import find_outlier_columns, random_reading
from gossamer.nn.quantize import OUTLIER_STORE, LayerReport, describe


def quantize_head(
    model: Any, decomposition: Decomposition | None = None, outlier_store: float = OUTLIER_STORE
) -> LayerReport | None:
    """Replace the output layer of a transformers model by an :class:`Int8Linear`, in place.

    Args:
        model: a causal language model; its other layers may be int8 already.
        decomposition: what is an outlier; that of LLM.int8() per token by default.
        outlier_store: share of its input columns whose weights are kept in 16 bit as well, found by letting the model
            read random tokens.

    Returns:
        What was done; ``None`` if the output layer was int8 already.

    Raises:
        ConfigurationError: the model has no output layer that can be quantized.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, (Int8Linear, Int8TiedHead)):
        return None
    if type(head) is not nn.Linear:
        raise ConfigurationError(
            f"the output layer of {type(model).__name__} is a {type(head).__name__}, not nn.Linear"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    run = random_reading(model, head=True)
    columns = find_outlier_columns({name: head}, outlier_store, run)[name] if run and outlier_store else None
    weight = head.weight.detach()
    quantized = quantize_weight(weight, f"the weight of {name}")
    new = Int8Linear.from_weight(
        quantized, head.bias, decomposition=decomposition, outlier_columns=columns, source=weight
    )
    model.set_output_embeddings(new)
    getattr(model, "all_tied_weights_keys", {}).pop(f"{name}.weight", None)
    return describe(name, new, weight.element_size(), quantized.relative_error)
