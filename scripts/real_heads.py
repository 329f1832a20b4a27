"""Queries, keys and values of real attention heads on real text, for the scripts beside this one."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from gossamer.models import resolve_model
from gossamer.models.encoder import is_encoder, load_encoder
from gossamer.models.load import load_config, load_model
from gossamer.texts import reference_text

Head = tuple[Tensor, Tensor, Tensor]  # queries, keys, values: (n, d) each


class RealHeads:
    """The attention heads of a model, a decoder or an encoder.

    Args:
        model: whatever :func:`gossamer.models.resolve_model` understands.
    """

    def __init__(self, model: str) -> None:
        path = resolve_model(model)
        config = load_config(path)
        self.encoder = is_encoder(config)
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.longest = config.max_position_embeddings
        network, tokenizer = load_encoder(path, "float32") if self.encoder else load_model(path, dtype="float32")
        self.ids = torch.tensor(tokenizer(reference_text(), add_special_tokens=False, verbose=False)["input_ids"])
        self._network = network.base_model

    def on_text(self, first: int, n: int, wanted: Collection[tuple[int, int]]) -> dict[tuple[int, int], Head]:
        """Some (layer, head) on ``n`` tokens of the text from token ``first`` on, after rotary embedding."""
        found: dict[tuple[int, int], Head] = {}
        calls = itertools.count()

        def record(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any) -> Any:
            layer, group = next(calls), q.shape[1] // k.shape[1]
            for head in range(self.heads):
                if (layer, head) in wanted:
                    found[layer, head] = (q[0, head].clone(), k[0, head // group].clone(), v[0, head // group].clone())
            many = (part.repeat_interleave(group, 1) for part in (k, v))
            causal = not self.encoder
            out = torch.nn.functional.scaled_dot_product_attention(q, *many, is_causal=causal, scale=scaling)
            return out.transpose(1, 2).contiguous(), None

        AttentionInterface.register("recorded", record)
        self._network.set_attn_implementation("recorded")
        with torch.no_grad():
            self._network(input_ids=self.ids[None, first : first + n])
        return found
