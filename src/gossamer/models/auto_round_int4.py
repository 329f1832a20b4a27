"""4-bit checkpoints that AutoRound wrote: tensors of GPTQ or AWQ, described in words of its own.

Exports for other projects have their ``quant_method`` and more settings; AutoRound's own have the method ``auto-round``
and a ``packing_format`` (https://github.com/intel/auto-round, ``auto_round/inference/backend.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.models.int4_layout import check_values

QUANT_METHOD = "auto-round"
_PACKINGS = {
    "auto_round": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:gptqmodel": {"quant_method": "gptq", "checkpoint_format": "gptq_v2"},
    "auto_round:auto_gptq": {"quant_method": "gptq", "checkpoint_format": "gptq"},
    "auto_round:auto_awq": {"quant_method": "awq"},
}
_INERT = {
    *("autoround_version", "provider", "packing_format", "data_type", "act_bits"),
    # how the codes were found
    *("iters", "lr", "minmax_lr", "nsamples", "seqlen", "batch_size", "gradient_accumulate_steps", "dataset", "amp"),
    *("enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "low_gpu_mem_usage", "scale_dtype"),
    # for which layers, whose tensors tell what counts of it
    *("to_quant_block_names", "block_name_to_quantize", "extra_config"),
}


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that AutoRound wrote as those of the format whose tensors it used; others as they are.

    Raises:
        UnsupportedModelError: its tensors are packed otherwise, are not integers, or activations have scales too.

    >>> translated({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "iters": 200})
    {'quant_method': 'awq', 'bits': 4}
    >>> translated({"quant_method": "gptq", "bits": 4})
    {'quant_method': 'gptq', 'bits': 4}
    """
    own = config.get("quant_method") == QUANT_METHOD
    if not own and "autoround_version" not in config:
        return dict(config)
    check_values(config, {"data_type": (None, "int"), "act_bits": (None, 16, 32)}, "AutoRound")
    theirs = {}
    if own:
        check_values(config, {"packing_format": _PACKINGS}, "AutoRound")
        theirs = _PACKINGS[config["packing_format"].lower()]
    return {key: value for key, value in config.items() if key not in _INERT} | theirs
