"""GGUF files mean the same model to llama.cpp and to us: log-probabilities of random tokens agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

import llama_cpp
from gguf_files import export_model, write_model
from gossamer import LLM
from native_checkpoints import LLAMA3_ROPE

pytestmark = [pytest.mark.peers, pytest.mark.usefixtures("private_cache")]

BASE = {"rope_theta": 10000.0}
YARN = BASE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
IDS = torch.randint(3, 250, (120,), generator=torch.Generator().manual_seed(1)).tolist()


def ours(file: Path, **options: Any) -> np.ndarray:
    (score,) = LLM(file, **options).score({"prompt_token_ids": IDS}, use_tqdm=False)
    return np.array(score.token_logprobs[1:])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": BASE | {"rope_type": "linear", "factor": 3.0}}),
        ("llama", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": YARN | {"attention_factor": 1.5}}),
        ("llama", {"rope_parameters": LLAMA3_ROPE}),
        ("qwen2", {"rope_parameters": YARN}),
        ("llama_biases", {}),
        ("mistral", {"head_dim": 64}),
        ("qwen3", {"head_dim": 64}),
        ("gemma3", {}),
    ],
)
def test_exports_mean_the_same_to_llama_cpp(name, changes, tmp_path):
    _, file = export_model(name, tmp_path, **changes)
    expected = llama_cpp.logprobs(file, IDS)
    # llama.cpp rounds activations to 8 bit where weights are Q8_0, which ours do as well, by other rules.
    spread = np.abs(expected - np.roll(expected, 1)).mean()
    assert np.abs(ours(file) - expected).mean() < 0.06 * spread
    assert np.abs(ours(file, quantization="int8") - expected).mean() < 0.1 * spread
    assert np.abs(ours(file, weights="int8") - expected).mean() < 0.2 * spread


SIZES = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 64}
SIZES |= {"num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 512, "initializer_range": 0.2}


@pytest.mark.parametrize(
    ("architecture", "config", "keys"),
    [
        (
            gguf.MODEL_ARCH.QWEN3MOE,
            hf.Qwen3MoeConfig(
                **SIZES,
                num_hidden_layers=2,
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=64,
                norm_topk_prob=True,
                rope_parameters=BASE | {"rope_type": "default"},
            ),
            EXPERTS,
        ),
        (
            gguf.MODEL_ARCH.GPT_OSS,
            hf.GptOssConfig(
                **SIZES | {"intermediate_size": 64},
                num_hidden_layers=4,
                sliding_window=9,
                num_local_experts=4,
                num_experts_per_tok=2,
                rope_parameters=BASE | {"rope_type": "default"},
            ),
            {
                "expert_count": 4,
                "expert_used_count": 2,
                "expert_feed_forward_length": 64,
                "attention.sliding_window": 9,
            },
        ),
        (
            gguf.MODEL_ARCH.GEMMA2,
            hf.Gemma2Config(**SIZES, num_hidden_layers=4, sliding_window=9, query_pre_attn_scalar=32),
            {"attention.sliding_window": 9, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        ),
        (
            gguf.MODEL_ARCH.GEMMA3,
            hf.Gemma3TextConfig(**SIZES, num_hidden_layers=7, sliding_window=9, query_pre_attn_scalar=32),
            {"attention.sliding_window": 9, "rope.freq_base": 1e6},
        ),
    ],
    ids=["qwen3moe", "gpt-oss", "gemma2", "gemma3"],
)
def test_other_architectures_mean_the_same_to_llama_cpp(architecture, config, keys, tmp_path):
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    file = write_model(model, architecture, tmp_path / "x.gguf", keys, tokens=300)
    expected = llama_cpp.logprobs(file, IDS)
    assert np.abs(ours(file) - expected).mean() < 1e-3 * np.abs(expected).mean()
