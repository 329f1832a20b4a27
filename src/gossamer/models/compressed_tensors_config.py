"""Settings of compressed-tensors checkpoints, as far as all of its formats share them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gossamer.errors import UnsupportedModelError
from gossamer.models.foreign_config import as_object, refuse_unknown

QUANT_METHOD = "compressed-tensors"
# Keys whose value is checked, or says nothing about what is computed. A key that is not among them may say anything.
_KNOWN = {
    *("quant_method", "format", "config_groups", "ignore", "kv_cache_scheme", "sparsity_config"),
    *("quantization_status", "global_compression_ratio", "version"),
    *("run_compressed", "dequantize", "use_optimized_inference"),  # how transformers is to run it
}
KNOWN_OF_GROUP = {"targets", "weights", "input_activations", "output_activations", "format"}
KNOWN_OF_SCHEME = {
    *("num_bits", "type", "symmetric", "strategy", "dynamic"),
    *("observer", "observer_kwargs", "scale_dtype", "zp_dtype"),  # how the scales were found and are stored
}
_STATIC = ("input_scale", "output_scale", "input_zero_point", "input_global_scale", "k_scale", "v_scale")


def config_groups(config: Mapping[str, Any], format: str) -> dict[str, Mapping[str, Any]]:
    """The schemes of a configuration by name, each spelled out and in ``format``.

    Raises:
        UnsupportedModelError: what stands around the schemes asks for more than quantized layers.
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
        if not isinstance(group, Mapping):
            raise refusal(f"the scheme of {name} is {group!r} and not spelled out")
        if (found := group.get("format") or config.get("format")) != format:
            raise refusal(f"the format of {name} is {found!r}")
        if group.get("output_activations"):
            raise refusal(f"the outputs of {name} are quantized")
        refuse_unknown(group, KNOWN_OF_GROUP, f"quantization_config.config_groups.{name}", refusal)
    refuse_unknown(config, _KNOWN, "quantization_config", refusal)
    return dict(groups)


def has_format(config: Mapping[str, Any], format: str) -> bool:
    """Whether any scheme of a configuration is in ``format``.

    >>> schemes = {"group_0": {"format": "pack-quantized"}, "group_1": {}}
    >>> has_format({"format": "mixed-precision", "config_groups": schemes}, "pack-quantized")
    True
    """
    groups = config.get("config_groups")
    schemes = groups.values() if isinstance(groups, Mapping) else ()
    found = {each.get("format") or config.get("format") for each in schemes if isinstance(each, Mapping)}
    return format in (found or {config.get("format")})


def check_int8_activations(name: str, inputs: Mapping[str, Any]) -> None:
    """Refuses activations of a scheme that are not int8 with a scale that every token gets as it comes.

    Raises:
        UnsupportedModelError: says what they are.
    """
    if (inputs.get("num_bits"), inputs.get("type"), inputs.get("strategy")) != (8, "int", "token"):
        raise refusal(f"the activations of {name} are not int8 with one scale per token")
    if inputs.get("dynamic") is not True or not inputs.get("symmetric", True):
        raise refusal(f"the activations of {name} have static scales or zero-points")
    refuse_unknown(inputs, KNOWN_OF_SCHEME, f"quantization_config.config_groups.{name}.input_activations", refusal)


def refuse_static_scales(names: Iterable[str]) -> None:
    """Refuses a checkpoint that brings scales of activations along.

    Raises:
        UnsupportedModelError: names one.
    """
    for name in names:
        if name.rpartition(".")[2] in _STATIC:
            raise refusal(f"{name} is a static scale of activations")


def refusal(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"the compressed-tensors checkpoint cannot be read: {reason}. Only 'int-quantized' W8A8 can (symmetric int8 "
        "weights with one scale per row, int8 activations with dynamic scales per token), and 'pack-quantized' with "
        "4-bit integer weights, in groups or with one scale per row."
    )
