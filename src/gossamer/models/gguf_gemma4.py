"""How GGUF has a Gemma 4, as llama.cpp's conversion/gemma.py writes it."""

from __future__ import annotations

import math
from typing import Any

from transformers.modeling_gguf_pytorch_utils import TensorProcessor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_file import GGUFFile

KEYS = (  # that :func:`refine_gemma4` reads
    *("attention.key_length_swa", "attention.value_length_swa", "attention.shared_kv_layers"),
    *("attention.sliding_window_pattern", "embedding_length_per_layer_input"),
    *("rope.freq_base_swa", "rope.dimension_count_swa", "expert_count", "expert_used_count"),
)
_MOST_ENTRIES, _MOST = 1 << 16, 1 << 24
_NEVER = 1e29  # divisors of frequencies from which on nothing is rotated


class Gemma4TensorProcessor(TensorProcessor):
    """transformers' hook; what a router multiplies has names of its own in a file."""

    def perform_fallback_tensor_mapping(self, names: dict[str, str], suffix: str, qual_name: str, hf_name: str) -> None:
        for last, stored in (
            ("router.scale", "ffn_gate_inp.scale"),
            ("router.per_expert_scale", "ffn_down_exps.scale"),
        ):
            if hf_name.endswith(last):
                names[f"blk.{hf_name.split('.')[2]}.{stored}"] = hf_name


def refine_gemma4(fields: dict[str, Any], file: GGUFFile) -> None:
    """What a configuration says beyond the measures that all architectures have.

    Raises:
        CheckpointError: a key or tensor is missing, or a value has no meaning.
        UnsupportedModelError: a list or tensor is another one than Gemma 4 has.
    """

    def key(name: str, default: Any = None) -> Any:
        return file.get(f"gemma4.{name}", default)

    def refuse(what: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{file.path}: {what}, which is not known here")

    def count(name: str, default: int | None, least: int, most: int) -> int:
        value = key(name, default)
        if not isinstance(value, int) or not least <= value <= most:
            raise CheckpointError(f"{file.path}: gemma4.{name} is {value!r}; it has to be from {least} to {most}")
        return value

    def base(name: str) -> float:
        value = key(name, 10000.0)
        if not isinstance(value, float | int) or not 1.0 <= value < math.inf:
            raise CheckpointError(f"{file.path}: gemma4.{name} is {value!r}, not the base of a rotation")
        return float(value)

    layers = fields["num_hidden_layers"]
    sliding = key("attention.sliding_window_pattern")
    if not isinstance(sliding, list) or len(sliding) != layers or not sliding or sliding[-1]:
        raise refuse(f"gemma4.attention.sliding_window_pattern is {str(sliding)[:60]}")
    kinds = ["sliding_attention" if each else "full_attention" for each in sliding]
    fields["layer_types"] = kinds
    fields["global_head_dim"] = fields["head_dim"]
    fields["head_dim"] = count("attention.key_length_swa", fields["head_dim"], 1, _MOST_ENTRIES)
    fields["sliding_window"] = count("attention.sliding_window", None, 1, _MOST)
    for name in ("attention.value_length_swa", "rope.dimension_count_swa"):
        if key(name, fields["head_dim"]) != fields["head_dim"]:
            raise refuse(f"gemma4.{name} is {key(name)}, and heads with a window have {fields['head_dim']} entries")
    fields["num_kv_shared_layers"] = shared = count("attention.shared_kv_layers", 0, 0, layers - 1)
    heads = _by_layer(key("attention.head_count_kv", fields["num_key_value_heads"]), layers)
    if len(heads) != layers or any(not isinstance(each, int) or not 0 < each <= _MOST_ENTRIES for each in heads):
        raise CheckpointError(f"{file.path}: gemma4.attention.head_count_kv is {str(heads)[:60]}")
    by_kind = {kind: {count for count, each in zip(heads, kinds, strict=True) if each == kind} for kind in kinds}
    if any(len(counts) != 1 for counts in by_kind.values()):
        raise refuse(f"gemma4.attention.head_count_kv is {heads}")
    (fields["num_global_key_value_heads"],) = by_kind["full_attention"]
    (fields["num_key_value_heads"],) = by_kind.get("sliding_attention", by_kind["full_attention"])
    without = [place for place in range(layers - shared) if f"blk.{place}.attn_v.weight" not in file.tensors]
    fields["attention_k_eq_v"] = bool(without)
    if not without and fields["num_global_key_value_heads"] != fields["num_key_value_heads"]:
        raise refuse(f"gemma4.attention.head_count_kv is {heads}, with values of their own in all layers")
    if without and [kinds[place] for place in without] != ["full_attention"] * kinds[: layers - shared].count(
        "full_attention"
    ):
        raise refuse(f"blk.{without[0]}.attn_v.weight is not there")
    widths = _by_layer(key("feed_forward_length"), layers)
    if len(widths) != layers or any(not isinstance(each, int) or not 0 < each <= _MOST for each in widths):
        raise CheckpointError(f"{file.path}: gemma4.feed_forward_length is {str(widths)[:60]}")
    fields["intermediate_size"] = widths[0]
    fields["use_double_wide_mlp"] = shared > 0 and widths[-1] != widths[0]
    double = 2 if fields["use_double_wide_mlp"] else 1
    if widths != [widths[0]] * (layers - shared) + [double * widths[0]] * shared:
        raise refuse(f"gemma4.feed_forward_length is {widths}")
    fields["hidden_size_per_layer_input"] = count("embedding_length_per_layer_input", 0, 0, _MOST_ENTRIES)
    if table := file.tensors.get("per_layer_token_embd.weight"):
        fields["vocab_size_per_layer_input"] = table.shape[0]
        tokens = file.tensors["token_embd.weight"].shape[0]
        if table.shape[0] != tokens:
            raise CheckpointError(
                f"{file.path}: per_layer_token_embd.weight has {table.shape[0]} rows, and token_embd.weight {tokens}"
            )
    if experts := count("expert_count", 0, 0, _MOST_ENTRIES):
        count("expert_feed_forward_length", None, 1, _MOST)
        chosen = count("expert_used_count", None, 1, experts)
        fields |= {"enable_moe_block": True, "num_experts": experts, "top_k_experts": chosen}
    fields["rope_parameters"] = {
        "sliding_attention": {"rope_type": "default", "rope_theta": base("rope.freq_base_swa")},
        "full_attention": {
            "rope_type": "proportional",
            "rope_theta": base("rope.freq_base"),
            "partial_rotary_factor": _rotated_share(file, fields["global_head_dim"], refuse),
        },
    }


def _by_layer(value: Any, layers: int) -> list[int]:
    return value if isinstance(value, list) else [value] * layers


def _rotated_share(file: GGUFFile, size: int, refuse: Any) -> float:
    """The share of pairs that layers without a window rotate; the others have frequencies of about nothing."""
    if "rope_freqs.weight" not in file.tensors:
        raise CheckpointError(f"{file.path} lacks the tensor rope_freqs.weight, which says what is rotated")
    divisors = file.tensors["rope_freqs.weight"].dequantize().tolist()
    rotated = sum(each == 1.0 for each in divisors)
    if len(divisors) != size // 2 or any(each < _NEVER for each in divisors[rotated:]):
        raise refuse("rope_freqs.weight is not ones, and then numbers that are very large")
    return rotated / len(divisors)
