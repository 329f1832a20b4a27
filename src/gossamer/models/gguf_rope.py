"""Rotary embeddings as GGUF says them, in transformers' terms.

llama.cpp turns neighbour i of a head by position / (factor_i * base^(2 i / size)), times what the kind of scaling makes
of it (``ggml_rope_cache_init`` and ``rope_yarn`` in ggml). Factors of their own, such as those of Llama 3.1 and later,
are a tensor (``rope_freqs.weight``). transformers has a kind with such factors, too: ``longrope``, which switches
between two lists by the length of the text; with the same list twice it does not depend on the length.
"""

from __future__ import annotations

import math
from typing import Any

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_file import GGUFFile

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
ROPE_KEYS = frozenset(
    {"rope.freq_base", "rope.scale_linear"}
    | {f"rope.scaling.{name}" for name in ("type", "factor", "attn_factor", "original_context_length", "finetuned")}
    | {
        f"rope.scaling.yarn_{name}"
        for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow", "log_multiplier")
    }
)
_BASE = 10000.0  # where the file says none


def rope_parameters(file: GGUFFile, context_length: int) -> dict[str, Any]:
    """``rope_parameters`` of a configuration.

    Args:
        file: the file.
        context_length: the longest text of the model.

    Raises:
        CheckpointError: a value that has no meaning.
        UnsupportedModelError: a kind of scaling that transformers does not compute in the same way; names the key.
    """

    def key(name: str, default: Any) -> Any:
        return file.get(f"{file.architecture}.rope.{name}", default)

    def number(name: str, default: float, least: float) -> float:
        value = key(name, default)
        if isinstance(value, bool) or not isinstance(value, float | int) or not least <= value < math.inf:
            raise CheckpointError(f"{file.path}: {file.architecture}.rope.{name} is {value!r}")
        return float(value)

    parameters: dict[str, Any] = {"rope_theta": number("freq_base", _BASE, 1.0), "rope_type": "default"}
    kind = key("scaling.type", "linear")
    # (A factor of 0 means none as well.)
    factor = 1.0 if kind == "none" else number("scaling.factor", number("scale_linear", 0.0, 0.0), 0.0) or 1.0
    original = int(number("scaling.original_context_length", context_length, 1))
    attention = float(key("scaling.attn_factor", 1.0)) * float(key("scaling.yarn_attn_factor", 1.0))
    short, long = _factors(file, kind)
    if kind == "yarn":
        if short is not None:
            raise _unknown(file, "rope_freqs.weight together with rope.scaling.type yarn")
        if key("scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):  # negative means that it is not set
            raise _unknown(
                file, f"{file.architecture}.rope.scaling.yarn_ext_factor {key('scaling.yarn_ext_factor', 1)}"
            )
        attention *= _yarn_scale(factor, 1.0) / _yarn_scale(factor, float(key("scaling.yarn_log_multiplier", 0.0)))
        return parameters | {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": attention,
            "beta_fast": float(key("scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(key("scaling.yarn_beta_slow", 1.0)),
        }
    if kind not in ("none", "linear", "longrope"):
        raise _unknown(file, f"{file.architecture}.rope.scaling.type {kind!r}")
    if short is not None and long is not None:
        return parameters | {
            "rope_type": "longrope",
            "short_factor": [factor * each for each in short],
            "long_factor": [factor * each for each in long],
            "original_max_position_embeddings": original,
            "factor": max(1.0, context_length / original),
            "attention_factor": attention,
        }
    if attention != 1.0:
        raise _unknown(file, f"{file.architecture}.rope.scaling.attn_factor without factors or YaRN")
    return parameters if factor == 1.0 else parameters | {"rope_type": "linear", "factor": factor}


def _factors(file: GGUFFile, kind: str) -> tuple[list[float] | None, list[float] | None]:
    """Divisors of the frequencies, for short and for long texts."""
    names = (
        ("rope_factors_short.weight", "rope_factors_long.weight") if kind == "longrope" else ("rope_freqs.weight",) * 2
    )
    # A converter that knows no better writes the tensors of the other kind; they would be read by nobody.
    for name in set(ROPE_TENSORS) - set(names):
        if name in file.tensors:
            raise _unknown(file, f"the tensor {name} with {file.architecture}.rope.scaling.type {kind!r}")
    short, long = (file.tensors[name].dequantize().tolist() if name in file.tensors else None for name in names)
    if (short is None) != (long is None):
        raise _unknown(file, f"{names[0]} or {names[1]} without the other")
    return short, long


def _yarn_scale(factor: float, multiplier: float) -> float:
    """What queries and keys are multiplied with (YaRN, arXiv 2309.00071, equation 22)."""
    return 1.0 if factor <= 1.0 else 0.1 * multiplier * math.log(factor) + 1.0


def _unknown(file: GGUFFile, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{file.path}: {what} is not known here, and leaving it out would change the model")
