"""BERT and its relatives (arXiv 1810.04805), as one definition that reads whole texts side by side, without padding.

Rows of all texts go through the linear layers together. Attention takes texts of the same length at a time, so that
none of them needs a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from gossamer.models.pooling_config import first_position
from gossamer.pooling.linears import Linear, LinearPacker

#: Model types that are this definition.
ARCHITECTURES = ("bert", "roberta", "xlm-roberta", "camembert")


def is_defined(config: PreTrainedConfig) -> bool:
    """Whether a model of this configuration is the definition below.

    >>> from transformers import BertConfig, DistilBertConfig
    >>> is_defined(BertConfig()), is_defined(DistilBertConfig())
    (True, False)
    """
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    return config.model_type in ARCHITECTURES and positions == "absolute"


@dataclass(frozen=True)
class Group:
    """Texts of one length.

    Attributes:
        ids: (texts, length) int64.
        types: (texts, length) int64, the segment of each token; ``None`` if all are of the first.
    """

    ids: Tensor
    types: Tensor | None = None


@dataclass
class Layer:
    """A block: attention, then an MLP; each is added to its input and normalized."""

    qkv: Linear
    output: Linear
    attention_norm: nn.Module
    up: Linear
    down: Linear
    mlp_norm: nn.Module


class Encoder:
    """A network of transformers, packed; its layers lose their tensors on the way.

    Args:
        network: a ``BertModel`` or one of :data:`ARCHITECTURES`.
        pack: packs its linear layers.
    """

    def __init__(self, network: Any, pack: LinearPacker) -> None:
        config = network.config
        embeddings = network.embeddings
        self.words, self.positions, self.types = (
            embeddings.word_embeddings.weight,
            embeddings.position_embeddings.weight[first_position(config) :],
            embeddings.token_type_embeddings.weight,
        )
        self.norm: nn.Module = embeddings.LayerNorm
        self.width, self.heads = int(config.hidden_size), int(config.num_attention_heads)
        self.activation: Any = ACT2FN[config.hidden_act]
        self.layers = [self._layer(block, pack) for block in network.encoder.layer]

    @staticmethod
    def _layer(block: Any, pack: LinearPacker) -> Layer:
        attention, output = block.attention.self, block.attention.output
        layer = Layer(
            qkv=pack([attention.query, attention.key, attention.value]),
            output=pack([output.dense]),
            attention_norm=output.LayerNorm,
            up=pack([block.intermediate.dense]),
            down=pack([block.output.dense]),
            mlp_norm=block.output.LayerNorm,
        )
        if pack.isa is not None:
            for each in (attention.query, attention.key, attention.value, output, block.intermediate, block.output):
                getattr(each, "dense", each).to("meta")
        return layer

    def __call__(self, groups: list[Group]) -> list[Tensor]:
        """The last layer's vectors: of each group (texts, length, width) fp32."""
        x = self.norm(torch.cat([self._embed(group).reshape(-1, self.width) for group in groups]))
        for layer in self.layers:
            x = layer.attention_norm(layer.output(self._attend(layer.qkv(x), groups)).add_(x))
            x = layer.mlp_norm(layer.down(self.activation(layer.up(x))).add_(x))
        parts = x.split([group.ids.numel() for group in groups])
        return [part.view(*group.ids.shape, self.width) for part, group in zip(parts, groups, strict=True)]

    def _embed(self, group: Group) -> Tensor:
        length = group.ids.shape[1]
        types = self.types[0] if group.types is None else self.types[group.types]
        return self.words[group.ids] + self.positions[:length] + types

    def _attend(self, qkv: Tensor, groups: list[Group]) -> Tensor:
        """softmax(q k^T / sqrt(d)) v of each head and text; qkv (rows, 3 width) -> (rows, width)."""
        out = torch.empty(len(qkv), self.width)
        row = 0
        for group in groups:
            texts, length = group.ids.shape
            rows = slice(row, row + texts * length)
            q, k, v = qkv[rows].view(texts, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            out[rows].view(texts, length, self.heads, -1).copy_(attended)
            row = rows.stop
        return out


class AnyNetwork:
    """Any other network of transformers, one group after the other."""

    def __init__(self, network: Any) -> None:
        self.network = network

    def __call__(self, groups: list[Group]) -> list[Tensor]:
        """The last layer's vectors: of each group (texts, length, width) fp32."""
        device = self.network.device
        found = []
        for group in groups:
            types = {} if group.types is None else {"token_type_ids": group.types.to(device)}
            found.append(self.network(input_ids=group.ids.to(device), **types).last_hidden_state.float().cpu())
        return found
