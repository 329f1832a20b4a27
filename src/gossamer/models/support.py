"""Which architectures Gossamer runs exactly, decided from the config before any weight is read."""

from __future__ import annotations

from typing import Any

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from gossamer.errors import UnsupportedModelError

# Named in error messages. Any other architecture that passes the checks below is accepted as well.
SUPPORTED_MODEL_TYPES = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo",
    "olmo2",
    "olmo3",
    "granite",
    "starcoder2",
    "smollm3",
    "cohere",
    "glm4",
)

# "su" is the name early Phi-3 checkpoints use for longrope.
_LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope", "su")
_CAUSAL_IN_ANY_CASE = ("gpt_neox", "gpt_neox_japanese")  # their configs have `is_decoder`, their attention ignores it
_ATTENTION_LAYERS = ("full_attention", "sliding_attention", "attention")
# Their states are where transformers' caches keep those of such layers; "hybrid" layers attend as well.
_RECURRENT_LAYERS = ("linear_attention", "conv", "hybrid", "hybrid_sliding")
LAYERS_WITHOUT_MEMORY = ("moe", "mlp")


def check_supported(config: PreTrainedConfig) -> None:
    """Refuses a model that could not be run exactly with shared prefixes.

    Args:
        config: a transformers config, of any type.

    Raises:
        UnsupportedModelError: names the architecture, the reason, and architectures that do run.

    Example:
        >>> from transformers import LlamaConfig
        >>> check_supported(LlamaConfig())
        >>> rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
        >>> check_supported(LlamaConfig(rope_parameters=rope))
        Traceback (most recent call last):
        gossamer.errors.UnsupportedModelError: LlamaForCausalLM: RoPE type 'dynamic' computes its frequencies from ...
    """
    if config.is_encoder_decoder:
        raise _refusal(config, "it is an encoder-decoder model; Gossamer runs decoders only")
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise _refusal(config, "transformers has no causal language model for it")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    text = config.get_text_config(decoder=True)
    # BERT-like models attend in both directions unless told that they are decoders; other configs lack the field.
    encoder = getattr(text, "is_decoder", None) is False and text.model_type not in _CAUSAL_IN_ANY_CASE
    if encoder or getattr(text, "use_bidirectional_attention", None):
        raise _refusal(config, "its attention is not causal")
    kinds = set(getattr(text, "layer_types", None) or ())
    if getattr(model_class, "_is_stateful", False) and not kinds & set(_RECURRENT_LAYERS):
        raise _refusal(config, "it keeps a recurrent state in a cache of its own")
    foreign = sorted(kinds - {*_ATTENTION_LAYERS, *_RECURRENT_LAYERS, *LAYERS_WITHOUT_MEMORY})
    if foreign:
        raise _refusal(
            config, f"its layers of type {', '.join(foreign)} are neither full or sliding attention nor recurrent"
        )
    replaceable = model_class._supports_attention_backend or (
        kinds & set(_RECURRENT_LAYERS) and model_class._can_set_attn_implementation()
    )
    attends = not kinds or not kinds <= {"linear_attention", "conv", *LAYERS_WITHOUT_MEMORY}
    if attends and not replaceable:
        raise _refusal(config, "its class in transformers does not let the attention function be replaced")
    fixed = has_fixed_factors(getattr(text, "rope_parameters", None) or {})
    for rope_type in rope_types(text):
        if rope_type in _LENGTH_DEPENDENT_ROPE and not fixed:
            # transformers modeling_rope_utils.dynamic_rope_update: seq_len = max(position_ids) + 1, over the batch.
            raise _refusal(
                config,
                f"RoPE type {rope_type!r} computes its frequencies from the longest sequence of the batch, so a shared "
                "prefix would hold different keys for different requests; use a variant with a fixed RoPE",
            )


def rope_types(config: PreTrainedConfig) -> list[str]:
    """The RoPE types of a config, of all its layer types.

    >>> from transformers import Gemma3TextConfig, GPT2Config
    >>> rope_types(Gemma3TextConfig()), rope_types(GPT2Config())
    (['default'], [])
    """
    found: set[str] = set()
    for field in ("rope_parameters", "rope_scaling"):  # the second is the name before transformers 5
        parameters = getattr(config, field, None)
        if isinstance(parameters, dict):
            # Gemma 3 nests one dictionary per layer type.
            nested = [value for value in parameters.values() if isinstance(value, dict)]
            found |= {_rope_type(each) for each in (parameters, *nested)}
    return sorted(found - {""})


def _rope_type(parameters: dict[str, Any]) -> str:
    return str(parameters.get("rope_type") or parameters.get("type") or "")


def has_fixed_factors(parameters: dict[str, Any]) -> bool:
    """Whether a longrope switches between two lists of factors that are the same, and so does not switch.

    Rotary factors that a checkpoint brings along, as those of Llama 3.1 in GGUF, are told in this way.

    >>> has_fixed_factors({"rope_type": "longrope", "short_factor": [1.0, 8.0], "long_factor": [1.0, 8.0]})
    True
    """
    short = parameters.get("short_factor")
    return _rope_type(parameters) == "longrope" and short is not None and short == parameters.get("long_factor")


def _refusal(config: PreTrainedConfig, reason: str) -> UnsupportedModelError:
    name = ", ".join(getattr(config, "architectures", None) or ()) or _class_name(config)
    return UnsupportedModelError(f"{name}: {reason}. Supported model types include {', '.join(SUPPORTED_MODEL_TYPES)}.")


def _class_name(config: PreTrainedConfig) -> str:
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return str(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__)
    return config.model_type or type(config).__name__
