"""int8 checkpoints of bitsandbytes (LLM.int8()), read as Gossamer's own.

A linear layer ``P`` has ``P.weight`` int8 [N, K], ``P.SCB`` float32 [N] with the largest magnitude of each row, and
``P.weight_format`` uint8 [], 0 for rows. So a weight is about ``weight * SCB[:, None] / 127``. It is the only foreign
format that carries the decomposition's threshold.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.foreign_config import as_names, refuse_unknown
from gossamer.models.int8_layout import check_scale, int8_layers
from gossamer.models.shards import TensorSpec

QUANT_METHOD = "bitsandbytes"
PAPER_THRESHOLD = 6.0
ROW_FORMAT = 0
# Keys whose value is checked, or says nothing about what is computed; those of the 4-bit format do not apply.
_KNOWN = {
    *("quant_method", "load_in_8bit", "load_in_4bit", "_load_in_8bit", "_load_in_4bit"),
    *("llm_int8_threshold", "llm_int8_skip_modules", "llm_int8_enable_fp32_cpu_offload", "llm_int8_has_fp16_weight"),
    *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage"),
    "bnb_4bit_target_parameters",
}


def read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translates a bitsandbytes ``quantization_config``.

    bitsandbytes takes a column as an outlier if any row of the batch reaches the threshold there, and has no
    decomposition when the threshold is 0.

    Returns:
        ``threshold``, ``criterion``, ``outliers`` and ``skip`` of a native configuration.

    Raises:
        UnsupportedModelError: the weights are not of LLM.int8().

    >>> read_config({"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 5.0})
    {'threshold': 5.0, 'criterion': 'absolute', 'outliers': 'batch', 'skip': ['lm_head']}
    """
    if not (config.get("load_in_8bit") or config.get("_load_in_8bit")):
        raise UnsupportedModelError(
            "the checkpoint is in bitsandbytes' 4-bit format; only its 8-bit format (load_in_8bit) can be read"
        )
    refuse_unknown(config, _KNOWN, "quantization_config", _refusal)
    threshold = config.get("llm_int8_threshold", PAPER_THRESHOLD)
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or threshold < 0:
        raise CheckpointError(f"quantization_config.llm_int8_threshold is {threshold!r}; it has to be 0 or above")
    skip = config.get("llm_int8_skip_modules")
    return {
        "threshold": float(threshold) or PAPER_THRESHOLD,
        "criterion": "absolute",
        "outliers": "batch" if threshold else None,
        "skip": ["lm_head"] if skip is None else as_names(skip, "quantization_config.llm_int8_skip_modules"),
    }


def _refusal(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the bitsandbytes checkpoint cannot be read: {reason}")


def native_names(name: str) -> str | None:
    """The native name of a tensor, or ``None`` for one that has no counterpart.

    >>> native_names("fc.SCB"), native_names("fc.weight_format"), native_names("fc.weight")
    ('fc.scale', None, 'fc.weight')
    """
    path, _, last = name.rpartition(".")
    return {"SCB": f"{path}.scale", "weight_format": None}.get(last, name)


def native_tensor(name: str, tensor: Tensor) -> Tensor | None:
    """The native value of a tensor: ``scale = SCB / 127``; all but the scales stays as it is.

    Codes of -128, which bitsandbytes never writes itself, are kept.

    Returns:
        The tensor for the name that :func:`native_names` gives, or ``None`` where that gives ``None``.

    Raises:
        CheckpointError: a scale is negative or not finite.
        UnsupportedModelError: the codes are not stored row by row.
    """
    last = name.rpartition(".")[2]
    if last == "SCB":
        check_scale(name, tensor)
        return tensor.float() / 127
    if last == "weight_format":
        if int(tensor) != ROW_FORMAT:
            raise UnsupportedModelError(
                f"{name} is {int(tensor)}: the codes are stored in a layout for one kind of GPU. Only row by row (0) "
                "can be read; save the model again with a current bitsandbytes."
            )
        return None
    return tensor


def check_layers(specs: Mapping[str, TensorSpec]) -> list[str]:
    """Checks names, dtypes and shapes of a checkpoint without reading data; returns the paths of its int8 layers.

    Raises:
        CheckpointError: names the tensor that is missing or wrong.
    """
    return int8_layers(specs, "SCB")
