"""W8A8 checkpoints of compressed-tensors (``int-quantized``), read as Gossamer's own.

A linear layer ``P`` has ``P.weight`` int8 [N, K] and ``P.weight_scale`` [N, 1], so a weight is about
``weight * weight_scale``. Activations are quantized per token when the model runs. There is no decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.errors import CheckpointError
from gossamer.models.compressed_tensors_config import (
    KNOWN_OF_SCHEME,
    check_int8_activations,
    config_groups,
    refusal,
    refuse_static_scales,
)
from gossamer.models.foreign_config import as_names, as_object, refuse_unknown
from gossamer.models.int8_layout import check_scale, int8_layers
from gossamer.models.shards import TensorSpec

FORMAT = "int-quantized"


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a compressed-tensors ``quantization_config``.

    Returns:
        ``threshold``, ``criterion``, ``outliers`` and ``skip`` of a native configuration. ``outliers`` is ``None``:
        vector-wise quantization without decomposition is what the format means.

    Raises:
        UnsupportedModelError: the format is another one than W8A8 with scales per row and token; says which.
    """
    for name, group in config_groups(config, FORMAT).items():
        _check_group(name, group)
    return {
        "threshold": 6.0,
        "criterion": "absolute",
        "outliers": None,
        "skip": [name.removeprefix("re:") for name in as_names(config.get("ignore"), "quantization_config.ignore")],
    }


def _check_group(name: str, group: Mapping[str, Any]) -> None:
    where = f"quantization_config.config_groups.{name}"
    weights = as_object(group.get("weights"), f"{where}.weights")
    inputs = as_object(group.get("input_activations"), f"{where}.input_activations")
    if (weights.get("num_bits"), weights.get("type")) != (8, "int"):
        raise refusal(f"the weights of {name} are {weights.get('num_bits')}-bit {weights.get('type')}")
    if weights.get("strategy") != "channel":
        raise refusal(f"the weights of {name} have one scale per {weights.get('strategy')} and not per row")
    if not weights.get("symmetric", True):
        raise refusal(f"the weights of {name} have zero-points")
    refuse_unknown(weights, KNOWN_OF_SCHEME, f"{where}.weights", refusal)
    check_int8_activations(name, inputs)


def native_names(name: str) -> str | None:
    """The native name of a tensor, or ``None`` for one that has no counterpart.

    >>> native_names("fc.weight_scale"), native_names("fc.weight_zero_point"), native_names("fc.weight")
    ('fc.scale', None, 'fc.weight')
    """
    path, _, last = name.rpartition(".")
    return {"weight_scale": f"{path}.scale", "weight_zero_point": None}.get(last, name)


def native_tensor(name: str, tensor: Tensor) -> Tensor | None:
    """The native value of a tensor: scales lose their second dimension; all but them stays as it is.

    Returns:
        The tensor for the name that :func:`native_names` gives, or ``None`` where that gives ``None``.

    Raises:
        CheckpointError: a scale is negative or not finite.
        UnsupportedModelError: a zero-point is not zero.
    """
    last = name.rpartition(".")[2]
    if last == "weight_scale":
        check_scale(name, tensor)
        return tensor.float().squeeze(1)
    if last == "weight_zero_point":
        if bool(tensor.any()):
            raise refusal(f"{name} is not zero")
        return None
    return tensor


def check_layers(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Checks names, dtypes and shapes of a checkpoint without reading data; returns the paths of its int8 layers.

    Raises:
        CheckpointError: names the tensor that is missing or wrong.
        UnsupportedModelError: the checkpoint has scales for activations.
    """
    refuse_static_scales(specs)
    layers = int8_layers(specs, "weight_scale", columns=(1,))
    for path in layers:
        zero_point = specs.get(f"{path}.weight_zero_point")
        if zero_point is not None and zero_point.shape != specs[f"{path}.weight_scale"].shape:
            raise CheckpointError(f"{zero_point.name} of {list(zero_point.shape)} does not fit {path}.weight_scale")
    return layers
