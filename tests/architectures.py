"""Tiny random models of many architectures, and transformers' own answers as the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

VOCAB = 199
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # spreads the logits, so that the largest is not decided by rounding
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}

_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 16,
}

_GEMMA4 = {
    "head_dim": 16,
    "global_head_dim": 32,
    "num_hidden_layers": 5,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "sliding", "full")],
    "sliding_window": 11,
    "vocab_size_per_layer_input": VOCAB,
    "use_double_wide_mlp": True,
}

# name -> (config class, model class, what differs from _SMALL)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
    "mistral": ("MistralConfig", "MistralForCausalLM", {"sliding_window": 13}),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {"num_local_experts": 4}),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
    "qwen2_sliding": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 16}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {"head_dim": 16, "num_key_value_heads": 1}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 11,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {"head_dim": 16, "sliding_window": 7, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _GEMMA4 | {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 2},
    ),
    "gemma4_large": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _GEMMA4 | {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4_experts": (
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        _GEMMA4
        | {"hidden_size_per_layer_input": 0, "enable_moe_block": True, "num_experts": 4, "top_k_experts": 2}
        | {"moe_intermediate_size": 24},
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {}),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {}),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "opt": ("OPTConfig", "OPTForCausalLM", {"ffn_dim": 64, "word_embed_proj_dim": 48, "init_std": 0.3}),
    "phi3_partial": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {"head_dim": 16, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", {}),
    "olmo3": ("Olmo3Config", "Olmo3ForCausalLM", {"sliding_window": 11, "num_hidden_layers": 4}),
    "granite": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {
            "attention_multiplier": 0.3,
            "logits_scaling": 1.5,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.7,
        },
    ),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {"no_rope_layers": [1, 0]}),
    "glm4": ("Glm4Config", "Glm4ForCausalLM", {"head_dim": 16, "attention_bias": True}),
    "exaone4": (
        "Exaone4Config",
        "Exaone4ForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 11,
            "sliding_window_pattern": 2,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen2_moe": ("Qwen2MoeConfig", "Qwen2MoeForCausalLM", _EXPERTS | {"decoder_sparse_step": 1}),
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", _EXPERTS | {"head_dim": 16, "mlp_only_layers": [0]}),
    "olmoe": ("OlmoeConfig", "OlmoeForCausalLM", {"num_experts": 6, "num_experts_per_tok": 3}),
    "granitemoe": (
        "GraniteMoeConfig",
        "GraniteMoeForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "residual_multiplier": 0.7, "attention_multiplier": 0.3},
    ),
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "router_jitter_noise": 0.2, "lm_head_bias": True},
    ),
    "seed_oss": ("SeedOssConfig", "SeedOssForCausalLM", {"head_dim": 16}),
    "hunyuan": ("HunYuanDenseV1Config", "HunYuanDenseV1ForCausalLM", {"head_dim": 16}),
    "cohere": ("CohereConfig", "CohereForCausalLM", {}),
    "cohere2": ("Cohere2Config", "Cohere2ForCausalLM", {"head_dim": 12, "sliding_window": 11, "logit_scale": 0.4}),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", {}),
    "ministral": ("MinistralConfig", "MinistralForCausalLM", {"head_dim": 16, "sliding_window": 13}),
    "ministral3": (
        "Ministral3Config",
        "Ministral3ForCausalLM",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 4.0,
                "original_max_position_embeddings": 24,
                "llama_4_scaling_beta": 0.3,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
        },
    ),
    "phi": (
        "PhiConfig",
        "PhiForCausalLM",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
    ),
    "starcoder2": ("Starcoder2Config", "Starcoder2ForCausalLM", {"sliding_window": 13}),
    "gpt_neox_serial": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {"use_parallel_residual": False, "hidden_act": "gelu", "hidden_size": 64},
    ),
    "ernie4_5": ("Ernie4_5Config", "Ernie4_5ForCausalLM", {"head_dim": 16}),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        "Ernie4_5_MoeForCausalLM",
        {
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 24,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            "head_dim": 16,
            "sliding_window": 10,
            "num_local_experts": 4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
}

_LINEAR = {
    "head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 12,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "num_hidden_layers": 3,
}
_MAMBA2 = {
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_d_state": 8,
    "mamba_n_groups": 2,
    "mamba_expand": 2,
    "mamba_chunk_size": 16,
}

# The same, with layers that keep a state
RECURRENT: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", _LINEAR),
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", _LINEAR | _EXPERTS),
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3, "block_auto_adjust_ff_dim": False},
    ),
    "lfm3": (
        "Lfm3Config",
        "Lfm3ForCausalLM",
        {"layer_types": ["conv", "full_attention", "conv"], "num_hidden_layers": 3},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _MAMBA2
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_hidden_layers": 3,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 32,
        },
    ),
    "granitemoehybrid_dense": (
        "GraniteMoeHybridConfig",
        "GraniteMoeHybridForCausalLM",
        _MAMBA2
        | {
            "layer_types": ["mamba", "attention", "mamba"],
            "num_hidden_layers": 3,
            "num_local_experts": 0,
            "shared_intermediate_size": 32,
            "position_embedding_type": "rope",
            "residual_multiplier": 0.5,
            "mamba_n_groups": 3,
        },
    ),
    "bamba": ("BambaConfig", "BambaForCausalLM", _MAMBA2 | {"attn_layer_indices": [1], "num_hidden_layers": 3}),
    "falcon_h1": ("FalconH1Config", "FalconH1ForCausalLM", _MAMBA2 | {"mamba_d_ssm": 96, "head_dim": 16}),
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        {
            "hybrid_override_pattern": "M*-M",
            "num_hidden_layers": 4,
            "head_dim": 16,
            "ssm_state_size": 8,
            "mamba_num_heads": 6,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
        },
    ),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM", _LINEAR | {"linear_num_value_heads": 2}),
    "jamba": (
        "JambaConfig",
        "JambaForCausalLM",
        {
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "num_hidden_layers": 3,
            "num_experts": 2,
            "mamba_d_state": 8,
            "mamba_dt_rank": 8,
            "use_mamba_kernels": False,
        },
    ),
    "mamba2": (
        "Mamba2Config",
        "Mamba2ForCausalLM",
        {"num_heads": 6, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 16, "expand": 2},
    ),
    "zamba2": (
        "Zamba2Config",
        "Zamba2ForCausalLM",
        {
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "num_hidden_layers": 3,
            "mamba_d_state": 8,
            "n_mamba_heads": 6,
            "mamba_headdim": 16,
            "mamba_ngroups": 2,
            "chunk_size": 16,
            "num_mem_blocks": 1,
        },
    ),
}


def make_model(name: str, **more: Any) -> Any:
    """A random fp32 model of an architecture, in evaluation mode; ``more`` goes into its configuration."""
    config_class, model_class, changes = (ARCHITECTURES | RECURRENT)[name]
    settings = _SMALL | changes | more
    torch.manual_seed(sum(name.encode()))
    config = getattr(hf, config_class)(**settings)
    return _prepared(getattr(hf, model_class)(config))


def make_model_of_more_than_text(name: str) -> Any:
    """Such a model as checkpoints of Gemma 3 and 4 have it, as a part of one that could read images too."""
    changes = {key: value for key, value in (_SMALL | ARCHITECTURES[name][2]).items() if key != "attn_implementation"}
    torch.manual_seed(sum(name.encode()))
    if name == "gemma4":
        config = hf.Gemma4Config(
            text_config=changes, vision_config=None, audio_config=None, attn_implementation="eager"
        )
        return _prepared(hf.Gemma4ForConditionalGeneration(config))
    eyes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    eyes |= {"image_size": 28, "patch_size": 14}
    config = hf.Gemma3Config(text_config=changes, vision_config=eyes, attn_implementation="eager")
    return _prepared(hf.Gemma3ForConditionalGeneration(config))


def _prepared(model: Any) -> Any:
    model = model.float().eval()
    model.requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1 and parameter.numel() > 1:  # sinks, biases and norms start as constants
            torch.nn.init.normal_(parameter, std=0.1, mean=float(parameter.mean()))
    for module in model.modules():
        if hasattr(module, "layer_scalar"):
            module.layer_scalar.fill_(0.7)
    return model


def reference(model: Any) -> Callable[[list[int], int], list[int]]:
    """Greedy answers of transformers' ``generate``, with its eager attention. Nothing is masked as padding."""

    def generate(prompt: list[int], count: int) -> list[int]:
        ids = torch.tensor([prompt])
        model.generation_config.eos_token_id = None
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False
        )
        return out[0, len(prompt) :].tolist()

    return generate
