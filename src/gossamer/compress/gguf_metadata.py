"""What GGUF says of a model besides its weights and tokenizer, for the architectures that can be exported.

Readers of GGUF have each architecture's computation built in, and fill gaps with their own defaults. So whatever a
config changes and GGUF cannot say is refused here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gossamer.errors import UnsupportedModelError
from gossamer.models.support import has_fixed_factors

_QUANTIZATION_VERSION = 2
_GEMMA3_LOCAL_THETA = 10000.0
_GEMMA3_PERIOD = 6  # every sixth layer attends to the whole context
_GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True)
class Architecture:
    """How a model type is called in GGUF, and how its weights differ there.

    Attributes:
        gguf: the architecture.
        activation: the only activation function GGUF's readers compute for it.
        biases: names of the linear layers that may have a bias.
        rotary_pairs: query and key rows are stored so that the two rows that rotate together are neighbours.
        norm_offset: what the model adds to its norm weights, and GGUF stores as added.
    """

    gguf: MODEL_ARCH
    activation: str = "silu"
    biases: tuple[str, ...] = ()
    rotary_pairs: bool = False
    norm_offset: float = 0.0

    @property
    def name(self) -> str:
        """The name of the architecture in the file."""
        return MODEL_ARCH_NAMES[self.gguf]


_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_LLAMA = Architecture(MODEL_ARCH.LLAMA, biases=(*_ATTENTION, "gate_proj", "up_proj", "down_proj"), rotary_pairs=True)
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": Architecture(MODEL_ARCH.QWEN2, biases=_ATTENTION[:3]),
    "qwen3": Architecture(MODEL_ARCH.QWEN3),
    "gemma3_text": Architecture(MODEL_ARCH.GEMMA3, activation="gelu_pytorch_tanh", norm_offset=1.0),
}


def find_architecture(config: PreTrainedConfig) -> Architecture:
    """The GGUF architecture of a model.

    Raises:
        UnsupportedModelError: the model type is not among those that can be exported, or its activation is another one.
    """
    if config.model_type not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"a model of the type {config.model_type} cannot be exported to GGUF; these can: {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[config.model_type]
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation != architecture.activation:
        _refuse(config, f"its activation is {activation}, and readers compute {architecture.activation}")
    return architecture


def head_size(config: PreTrainedConfig) -> int:
    """Width of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def add_metadata(writer: GGUFWriter, config: PreTrainedConfig, name: str, file_type: LlamaFileType) -> list[str]:
    """Adds the model's measures and settings.

    Returns:
        What a reader will do differently, one sentence each.

    Raises:
        UnsupportedModelError: GGUF cannot say what the config says.
    """
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(_QUANTIZATION_VERSION)
    add_measures(writer, config)
    writer.add_rope_dimension_count(head_size(config))
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gemma3_text":
        _check_gemma3(config)
        writer.add_sliding_window(config.sliding_window)
        _add_rope(writer, config, config.rope_parameters["full_attention"])
        return []
    _add_rope(writer, config, config.rope_parameters)
    return _windows(config)


def add_measures(writer: GGUFWriter, config: PreTrainedConfig) -> None:
    """Adds the sizes that every architecture here has, and the epsilon of its norms."""
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_size(config))
    writer.add_value_length(head_size(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def rotary_factors(config: PreTrainedConfig) -> Tensor | None:
    """Divisors of the rotary frequencies that Llama 3.1 and later need, float32 ``[head_size / 2]``, or ``None``."""
    if has_fixed_factors(config.rope_parameters):
        return torch.tensor(config.rope_parameters["short_factor"], dtype=torch.float32)
    if config.rope_parameters.get("rope_type") != "llama3":
        return None
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return plain / frequencies


def _add_rope(writer: GGUFWriter, config: PreTrainedConfig, rope: dict[str, Any]) -> None:
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope.get("rope_type", "default")
    if kind == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    elif kind == "yarn" and config.model_type != "gemma3_text":
        _add_yarn(writer, config, rope)
    elif _has_factors(rope) and ARCHITECTURES[config.model_type].gguf == MODEL_ARCH.LLAMA:
        pass  # they are a tensor of their own
    elif kind != "default":
        _refuse(config, f"its RoPE type is {kind}; default, linear and yarn can be exported, and llama3 for Llama")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        _refuse(config, "only a part of each attention head is rotated")


def _has_factors(rope: dict[str, Any]) -> bool:
    """Whether every frequency has a divisor of its own, and attention is not scaled besides."""
    return rope.get("rope_type") == "llama3" or (has_fixed_factors(rope) and rope.get("attention_factor") == 1.0)


def _add_yarn(writer: GGUFWriter, config: PreTrainedConfig, rope: dict[str, Any]) -> None:
    """Readers scale attention by 0.1 ln(factor) + 1 themselves; what differs from it is the attention factor."""
    if rope.get("truncate", True) is not True:
        _refuse(config, "the bounds of its YaRN are not whole numbers")
    if (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1) != (32, 1):
        _refuse(config, "the bounds of its YaRN are not 32 and 1, as readers of this architecture have them built in")
    _, attention = ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    writer.add_rope_scaling_factor(rope["factor"])
    writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
    writer.add_rope_scaling_attn_factors(attention / (0.1 * math.log(max(rope["factor"], 1.0)) + 1.0))


def _windows(config: PreTrainedConfig) -> list[str]:
    window = getattr(config, "sliding_window", None)
    if window is None or "sliding_attention" not in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        return []
    return [
        f"GGUF readers know no sliding window for this architecture: beyond {window} tokens, layers with a window "
        "attend to more than they should"
    ]


def _check_gemma3(config: PreTrainedConfig) -> None:
    """What readers have built in for Gemma 3."""
    places = range(1, config.num_hidden_layers + 1)
    if config.layer_types != ["sliding_attention" if place % _GEMMA3_PERIOD else "full_attention" for place in places]:
        _refuse(config, "its layers do not take turns as five with a sliding window and one without")
    local = config.rope_parameters["sliding_attention"]
    if (local["rope_theta"], local.get("rope_type", "default")) != (_GEMMA3_LOCAL_THETA, "default"):
        _refuse(config, f"the RoPE of its sliding layers is not the plain one of base {_GEMMA3_LOCAL_THETA:.0f}")
    if config.final_logit_softcapping is not None or config.attn_logit_softcapping is not None:
        _refuse(config, "it caps its logits")
    largest = config.num_hidden_layers == _GEMMA3_27B_LAYERS
    scaled_by = config.hidden_size // config.num_attention_heads if largest else head_size(config)
    if config.query_pre_attn_scalar != scaled_by:
        _refuse(config, f"it scales its queries by {config.query_pre_attn_scalar} and not by {scaled_by}")


def _refuse(config: PreTrainedConfig, reason: str) -> NoReturn:
    raise UnsupportedModelError(f"this {config.model_type} model cannot be exported to GGUF exactly: {reason}")
