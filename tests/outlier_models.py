"""Models with planted outlier features, and what the tests of reports read from them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from gossamer.report.outliers import FeatureGroup, OutlierReport

LAYERS, WIDTH, TOKENS = 8, 32, 64


def group(report: OutlierReport, name: str) -> FeatureGroup:
    return next(each for each in report.groups if each.name == name)


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": TOKENS, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**(sizes | heads | changes)))
    return model.eval().requires_grad_(False)


def plant(dimension: int, sign: int, layers: list[int], tokens: list[int]) -> Any:
    """A model whose attention inputs have an outlier in this dimension, in these layers and at these tokens, only.

    The dimension passes through the residual stream unchanged, as nothing writes to it, and is large in the embeddings
    of the tokens. RMSNorm brings it to at most sqrt(WIDTH) = 5.7; the gain of the layers lifts that over 6.
    """
    model = tiny_llama()
    model.model.embed_tokens.weight[:, dimension] = 0.0
    model.model.embed_tokens.weight[tokens, dimension] = 50.0
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.o_proj.weight[dimension] = 0.0
        layer.mlp.down_proj.weight[dimension] = 0.0
        layer.input_layernorm.weight[dimension] = sign * (2.0 if number in layers else 0.5)
        layer.post_attention_layernorm.weight[dimension] = 0.1
    return model


def assert_close(one: Any, other: Any) -> None:
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_close(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for pair in zip(one, other, strict=True):
            assert_close(*pair)
    else:
        assert one == pytest.approx(other, rel=1e-4) if isinstance(one, float) else one == other


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules())
