"""The architectures that native kernels run.

All of them are the blocks of :mod:`gossamer.native.decoder`. What differs from one to the next, beside what their
modules say themselves, is said here: an architecture of known blocks is added as a line of
:data:`NATIVE_ARCHITECTURES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Architecture:
    """Where a decoder of transformers has what the definition needs, by the names of its modules.

    Attributes:
        name: as people write it.
        body, layers, embedding, positions, final_norm: of the model; positions are empty where none are embedded.
        attention: of a layer.
        recurrent: of a layer without attention.
        qkv: of the attention: three layers, or one that has their outputs.
        output: of the attention.
        before_attention, after_attention, before_mlp, after_mlp: the norms of a layer; empty where there is none.
        query_norm, key_norm: those of the attention, if it has them: of each head, or of all heads together.
        mlp: of a layer; its experts, if it has them, are in ``experts``.
        shared: of a layer, the MLP for all tokens beside one with experts, or in its place.
        activation: of an MLP, if the configuration does not say.
        gate, up, down: of an MLP; a gate that is empty is none.
        gate_up: of an MLP that has both as one layer.
        router: of experts.
        parallel: MLPs read what attention reads, and not what it adds to: always, or where this entry of the
            configuration says so.
        rotated_first: queries and keys are rotated before they are normalized.
        neighbours: rotated pairs are entries next to each other, not those of two halves.
        by_head: of one layer for queries, keys and values, each head has its three parts one after the other.
    """

    name: str
    body: str = "model"
    layers: str = "layers"
    embedding: str = "embed_tokens"
    positions: str = ""
    final_norm: str = "norm"
    attention: str = "self_attn"
    recurrent: str = ""
    qkv: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    output: str = "o_proj"
    before_attention: str = "input_layernorm"
    after_attention: str = ""
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str = ""
    query_norm: str = "q_norm"
    key_norm: str = "k_norm"
    mlp: str = "mlp"
    shared: str = ""
    activation: str = ""
    gate: str = "gate_proj"
    up: str = "up_proj"
    gate_up: str = "gate_up_proj"
    down: str = "down_proj"
    router: str = "gate"
    parallel: bool | str = False
    rotated_first: bool = False
    neighbours: bool = False
    by_head: bool = False


def _after(name: str) -> Architecture:
    """What halves compute is normalized before it is added, and not what they read."""
    return Architecture(
        name,
        before_attention="",
        after_attention="post_attention_layernorm",
        before_mlp="",
        after_mlp="post_feedforward_layernorm",
    )


def _gemma(name: str) -> Architecture:
    return Architecture(
        name,
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    )


def _cohere(name: str) -> Architecture:
    return Architecture(name, before_mlp="input_layernorm", parallel=True, neighbours=True)


def _lfm(name: str) -> Architecture:
    return Architecture(
        name,
        recurrent="conv",
        final_norm="embedding_norm",
        before_attention="operator_norm",
        before_mlp="ffn_norm",
        mlp="feed_forward",
        activation="silu",
        gate="w1",
        up="w3",
        down="w2",
    )


NATIVE_ARCHITECTURES = {  # by model type
    "llama": Architecture("Llama"),
    "mistral": Architecture("Mistral"),
    "qwen2": Architecture("Qwen2"),
    "qwen3": Architecture("Qwen3"),
    "gemma": Architecture("Gemma"),
    "gemma2": _gemma("Gemma 2"),
    "gemma3_text": _gemma("Gemma 3"),
    "gemma4_text": replace(_gemma("Gemma 4"), router="router"),
    "ministral": Architecture("Ministral"),
    "ministral3": Architecture("Ministral 3"),
    "phi3": Architecture("Phi-3", qkv=("qkv_proj",)),
    "phi": Architecture(
        "Phi",
        final_norm="final_layernorm",
        output="dense",
        before_mlp="input_layernorm",
        gate="",
        up="fc1",
        down="fc2",
        query_norm="q_layernorm",
        key_norm="k_layernorm",
        parallel=True,
    ),
    "olmo": Architecture("OLMo"),
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
    "cohere": _cohere("Cohere"),
    "cohere2": _cohere("Cohere 2"),
    "starcoder2": Architecture("StarCoder 2", gate="", up="c_fc", down="c_proj"),
    "gpt_neox": Architecture(
        "GPT-NeoX",
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
        attention="attention",
        qkv=("query_key_value",),
        output="dense",
        gate="",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        parallel="use_parallel_residual",
        by_head=True,
    ),
    "gpt2": Architecture(
        "GPT-2",
        body="transformer",
        layers="h",
        embedding="wte",
        positions="wpe",
        final_norm="ln_f",
        attention="attn",
        qkv=("c_attn",),
        output="c_proj",
        before_attention="ln_1",
        before_mlp="ln_2",
        gate="",
        up="c_fc",
        down="c_proj",
    ),
    "lfm2": replace(_lfm("LFM2"), output="out_proj", query_norm="q_layernorm", key_norm="k_layernorm"),
    "lfm3": replace(_lfm("LFM3"), after_attention="post_operator_norm", after_mlp="post_ffn_norm"),
    "granitemoehybrid": Architecture(
        "Granite 4",
        recurrent="mamba",
        mlp="block_sparse_moe",
        shared="shared_mlp",
        router="router",
        gate_up="input_linear",
        down="output_linear",
    ),
    "bamba": Architecture(
        "Bamba", recurrent="mamba", final_norm="final_layernorm", before_mlp="pre_ff_layernorm", mlp="feed_forward"
    ),
    "qwen3_5_text": Architecture("Qwen3.5", recurrent="linear_attn"),
    "qwen3_next": Architecture("Qwen3-Next", recurrent="linear_attn"),
    "mixtral": Architecture("Mixtral"),
    "qwen2_moe": Architecture("Qwen2-MoE"),
    "qwen3_moe": Architecture("Qwen3-MoE"),
    "olmoe": Architecture("OLMoE"),
    "ernie4_5": Architecture("ERNIE 4.5", neighbours=True),
    "ernie4_5_moe": Architecture("ERNIE 4.5 MoE", neighbours=True),
    "gpt_oss": Architecture("gpt-oss", router="router"),
    "phimoe": Architecture("Phi-3.5-MoE", router="router"),
    "granitemoe": Architecture("Granite MoE", mlp="block_sparse_moe", router="router"),
}
