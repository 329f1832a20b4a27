"""The architectures that native kernels run: the one list, which help texts and the documentation quote.

All of them are the blocks of :mod:`gossamer.native.decoder`. What differs from one to the next, beside what their
modules say themselves, is said here: an architecture of known blocks is added as a line of
:data:`NATIVE_ARCHITECTURES`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """Where a decoder of transformers has what the definition needs, by the names of its modules.

    Attributes:
        name: as people write it.
        before_attention, after_attention, before_mlp, after_mlp: the norms of a layer; empty where there is none.
        query_norm, key_norm: those of the attention, if it has them: of each head, or of all heads together.
        mlp: of a layer; its experts, if it has them, are in ``experts``.
        router: of experts.
        rotated_first: queries and keys are rotated before they are normalized.
        neighbours: rotated pairs are entries next to each other, not those of two halves.
    """

    name: str
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    mlp: str = "mlp"
    router: str = "gate"
    rotated_first: bool = False
    neighbours: bool = False


def _after(name: str) -> Architecture:
    """What halves compute is normalized before it is added, and not what they read."""
    return Architecture(name, "", "post_attention_layernorm", "", "post_feedforward_layernorm")


NATIVE_ARCHITECTURES = {  # by model type
    "llama": Architecture("Llama"),
    "mistral": Architecture("Mistral"),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3"),
    "gemma3_text": Architecture(
        "Gemma 3",
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
    "phi3": Architecture("Phi-3"),
    "olmo2": _after("OLMo 2"),
    "olmo3": _after("OLMo 3"),
    "granite": Architecture("Granite"),
    "smollm3": Architecture("SmolLM3"),
    "glm4": Architecture(
        "GLM-4", after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm", neighbours=True
    ),
    "exaone4": _after("EXAONE 4"),
    "seed_oss": Architecture("Seed-OSS"),
    "hunyuan_v1_dense": Architecture(
        "Hunyuan", query_norm="query_layernorm", key_norm="key_layernorm", rotated_first=True
    ),
    "mixtral": Architecture("Mixtral"),
    "qwen2_moe": Architecture("Qwen2-MoE"),
    "qwen3_moe": Architecture("Qwen3-MoE"),
    "olmoe": Architecture("OLMoE"),
    "granitemoe": Architecture("Granite MoE", mlp="block_sparse_moe", router="router"),
}


def native_names() -> str:
    """Their names, as a sentence lists them.

    >>> native_names().startswith("Llama, Mistral, Qwen2") and native_names().endswith(" and Granite MoE")
    True
    """
    *names, last = (each.name for each in NATIVE_ARCHITECTURES.values())
    return f"{', '.join(names)} and {last}"
