"""An embedding with int8 weights, and the output layer that is tied to it and shares its one store."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.int8_linear import Decomposition, keep_type
from gossamer.nn.int8_weight import Int8Weight, quantize_weight
from gossamer.ops.int8 import int8_linear


class Int8Embedding(nn.Module):
    """Rows of an int8 table: ``weight[ids] * scale[ids]``, one scale per row.

    Args:
        num_embeddings: V.
        embedding_dim: D.
        multiplier: of every output (Gemma scales its embeddings).
        device: of all tensors.
        dtype: of the output; ``.to(dtype)`` changes it.

    Attributes:
        weight: buffer (V, D) int8.
        scale: buffer (V) fp32.

    >>> Int8Embedding.from_embedding(nn.Embedding(10, 4))(torch.tensor([1, 2])).shape
    torch.Size([2, 4])
    """

    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        *,
        multiplier: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.multiplier = multiplier
        self.dtype = dtype or torch.get_default_dtype()
        self.register_buffer("weight", torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8, device=device))
        self.register_buffer("scale", torch.zeros(num_embeddings, dtype=torch.float32, device=device))

    @classmethod
    def like(cls, embedding: nn.Embedding, device: torch.device | str | None = None) -> Self:
        """An empty one of the same sizes.

        Raises:
            ConfigurationError: the embedding does more than look up rows.
        """
        if reason := unsupported_embedding(embedding):
            raise ConfigurationError(reason)
        multiplier = float(getattr(embedding, "scalar_embed_scale", 1.0))
        return cls(
            embedding.num_embeddings,
            embedding.embedding_dim,
            multiplier=multiplier,
            device=device,
            dtype=embedding.weight.dtype,
        )

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, quantized: Int8Weight | None = None) -> Self:
        """Quantize an ``nn.Embedding`` (or Gemma's, which scales its output), unless its weight has been already.

        Raises:
            ConfigurationError: the embedding does more than look up rows, or cannot be quantized.
        """
        result = cls.like(embedding, device="meta")
        quantized = quantized or quantize_weight(embedding.weight.detach(), "the embedding")
        result.weight, result.scale = quantized.codes, quantized.scale
        return result

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D)."""
        rows = self.weight[ids].float() * self.scale[ids][..., None]
        # Gemma rounds the factor to the type of the weights before it multiplies
        factor = torch.tensor(self.multiplier, dtype=self.dtype, device=rows.device)
        return rows.to(self.dtype) * factor if self.multiplier != 1.0 else rows.to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = keep_type(scale, self.scale)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=scale.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


class Int8TiedHead(nn.Module):
    """The output layer of a model with tied embeddings: it multiplies with the embedding's own store.

    It owns no tensor but its bias, so that nothing is stored, moved or saved twice.

    Args:
        embedding: whose store it shares.
        decomposition: what is an outlier.
        bias: parameter (V), or ``None``.
    """

    def __init__(
        self,
        embedding: Int8Embedding,
        decomposition: Decomposition | None = None,
        bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it does not become a submodule with a second name
        self.decomposition = decomposition or Decomposition()
        self.in_features = embedding.embedding_dim
        self.out_features = embedding.num_embeddings
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        """(V, D) int8."""
        return self._embedding[0].weight

    @weight.setter
    def weight(self, value: Tensor) -> None:
        """Tying the weights again is nothing new; another weight is a mistake.

        Raises:
            ConfigurationError
        """
        if value is not self.weight:
            raise ConfigurationError("the output layer shares the store of the embedding; it takes no other weight")

    @property
    def scale(self) -> Tensor:
        """(V) fp32."""
        return self._embedding[0].scale

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D) -> logits (..., V), in the dtype of x."""
        settings = self.decomposition
        outliers = None if settings.outliers == "static" else settings.outliers  # it has no outlier store
        return int8_linear(x, self.weight, self.scale, self.bias, settings.threshold, settings.criterion, outliers)


def unsupported_embedding(embedding: nn.Module) -> str:
    """Why an embedding cannot be quantized; an empty string when it can."""
    if not isinstance(embedding, nn.Embedding):
        return f"{type(embedding).__name__} is no nn.Embedding"
    if embedding.max_norm is not None:
        return "an embedding with max_norm changes its own weights"
    if type(embedding) is not nn.Embedding and not hasattr(embedding, "scalar_embed_scale"):
        return f"{type(embedding).__name__} does more than look up rows"
    return ""
