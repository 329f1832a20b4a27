"""Small models and batches for the tests of pruning."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from gossamer.pruning import (
    BlockFisher,
    DiagFisher,
    LayerGram,
    Magnitude,
    MFACFisher,
    Wanda,
)

CURVATURES = [Magnitude(), Wanda(), LayerGram(), DiagFisher(), BlockFisher(4), MFACFisher(8, dtype=torch.float32)]


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8), nn.ReLU(), nn.Linear(8, 4))


def batches(count: int = 4, size: int = 8, seed: int = 1) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 16, generator=generator), torch.randint(4, (size,), generator=generator))
        for _ in range(count)
    ]


def language_batches(vocabulary: int = 64, length: int = 12) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(vocabulary, (1, length), generator=generator) for _ in range(4)]
    return [{"input_ids": part, "labels": part} for part in ids]


def language_model(kind: str) -> Any:
    torch.manual_seed(0)
    common = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}
    small = common | {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    configs = {
        "llama": lambda: LlamaConfig(**small, num_key_value_heads=2),
        "gemma3": lambda: Gemma3TextConfig(**small, num_key_value_heads=2, head_dim=8, sliding_window=4),
        "gpt2": lambda: GPT2Config(**common, n_embd=32, n_layer=2, n_head=4),
    }
    return AutoModelForCausalLM.from_config(configs[kind]()).eval()


def language_loss(outputs: Any, batch: Any) -> torch.Tensor:
    return outputs.loss


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)
