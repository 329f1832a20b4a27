"""W8A8 checkpoints of compressed-tensors (``int-quantized``), read as Gossamer's own.

A linear layer ``P`` has ``P.weight`` int8 [N, K] and ``P.weight_scale`` [N, 1], so a weight is about
``weight * weight_scale``. Activations are quantized per token when the model runs. There is no decomposition.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.foreign_config import as_names, as_object, refuse_unknown
from gossamer.models.int8_layout import check_scale, int8_layers
from gossamer.models.shards import TensorSpec

QUANT_METHOD = "compressed-tensors"
FORMAT = "int-quantized"
# Keys whose value is checked, or says nothing about what is computed. A key that is not among them may say anything.
_KNOWN = {
    *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config"),
    *("quantization_status", "global_compression_ratio", "version"),
    *("run_compressed", "dequantize", "use_optimized_inference"),  # how transformers is to run it
}
_KNOWN_OF_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
_KNOWN_OF_SCHEME = {
    *("num_bits", "type", "symmetric", "strategy", "dynamic"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),  # how the scales were found and are stored
}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a compressed-tensors ``quantization_config``.

    Returns:
        ``threshold``, ``criterion``, ``outliers`` and ``skip`` of a native configuration. ``outliers`` is ``None``:
        vector-wise quantization without decomposition is what the format means.

    Raises:
        UnsupportedModelError: the format is another one than W8A8 with scales per row and token; says which.
    """
    sparsity = as_object(config.get("sparsity_config"), "quantization_config.sparsity_config").get("format", "dense")
    if sparsity != "dense":
        raise refusal(f"its weights are stored in the sparse format {sparsity!r}")
    if config.get("kv_cache_scheme"):
        raise refusal("it prescribes a quantized key/value cache (kv_cache_scheme)")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise refusal("its config_groups are empty or missing")
    for name, group in groups.items():
        _check_group(name, group, config.get("format"))
    refuse_unknown(config, _KNOWN, "quantization_config", refusal)
    return {
        "threshold": 6.0,
        "criterion": "absolute",
        "outliers": None,
        "skip": [name.removeprefix("re:") for name in as_names(config.get("ignore"), "quantization_config.ignore")],
    }


def _check_group(name: str, group: Any, default_format: str | None) -> None:
    if not isinstance(group, Mapping):
        raise refusal(f"the scheme of {name} is {group!r} and not spelled out")
    where = f"quantization_config.config_groups.{name}"
    found = group.get("format") or default_format
    if found != FORMAT:
        raise refusal(f"the format of {name} is {found!r}")
    weights = as_object(group.get("weights"), f"{where}.weights")
    inputs = as_object(group.get("input_activations"), f"{where}.input_activations")
    if (weights.get("num_bits"), weights.get("type")) != (8, "int"):
        raise refusal(f"the weights of {name} are {weights.get('num_bits')}-bit {weights.get('type')}")
    if weights.get("strategy") != "channel":
        raise refusal(f"the weights of {name} have one scale per {weights.get('strategy')} and not per row")
    if not weights.get("symmetric", True):
        raise refusal(f"the weights of {name} have zero-points")
    if (inputs.get("num_bits"), inputs.get("type"), inputs.get("strategy")) != (8, "int", "token"):
        raise refusal(f"the activations of {name} are not int8 with one scale per token")
    if inputs.get("dynamic") is not True or not inputs.get("symmetric", True):
        raise refusal(f"the activations of {name} have static scales or zero-points")
    if group.get("output_activations"):
        raise refusal(f"the outputs of {name} are quantized")
    refuse_unknown(group, _KNOWN_OF_GROUP, where, refusal)
    refuse_unknown(weights, _KNOWN_OF_SCHEME, f"{where}.weights", refusal)
    refuse_unknown(inputs, _KNOWN_OF_SCHEME, f"{where}.input_activations", refusal)


def refusal(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the compressed-tensors checkpoint cannot be read: {reason}. Only 'int-quantized' W8A8 can: symmetric int8 "
        "weights with one scale per row, and int8 activations with dynamic scales per token."
    )


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
    for name in specs:
        if name.rpartition(".")[2] in ("input_scale", "output_scale", "k_scale", "v_scale"):
            raise refusal(f"{name} is a static scale of activations")
    layers = int8_layers(specs, "weight_scale", columns=(1,))
    for path in layers:
        zero_point = specs.get(f"{path}.weight_zero_point")
        if zero_point is not None and zero_point.shape != specs[f"{path}.weight_scale"].shape:
            raise CheckpointError(f"{zero_point.name} of {list(zero_point.shape)} does not fit {path}.weight_scale")
    return layers
