"""Modules whose weights stay as a file stores them: a linear layer, and an embedding."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Self

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.int8_embedding import unsupported_embedding
from gossamer.nn.stored_matrix import StoredMatrix
from gossamer.ops.int8 import piece_rows

_shapes_only: ContextVar[bool] = ContextVar("shapes_only", default=False)


@contextmanager
def shapes_only() -> Iterator[None]:
    """In the body, stored weights are not read, and results are zeros: for whoever looks at shapes only."""
    token = _shapes_only.set(True)
    try:
        yield
    finally:
        _shapes_only.reset(token)


class StoredLinear(nn.Module):
    """``x W^T + b`` with a weight in quantized blocks.

    A reference in little memory: the weight is dequantized some rows at a time, anew in every call. Native kernels take
    :attr:`stored` as it is.

    Args:
        stored: the weight (N, K).
        bias: parameter (N), or ``None``.

    Attributes:
        in_features, out_features: K and N.
        stored: the weight; a tied output layer shares the embedding's.

    >>> import numpy as np
    >>> layer = StoredLinear(StoredMatrix("Q8_0", 32, np.zeros((4, 34), np.uint8)))
    >>> layer, layer(torch.ones(2, 32)).shape
    (StoredLinear(32, 4, Q8_0), torch.Size([2, 4]))
    """

    def __init__(self, stored: StoredMatrix, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.out_features, self.in_features = stored.shape
        self.stored = stored
        self.bias = bias

    @property
    def input_order(self) -> Tensor | None:
        """(K) int64: the rows of :attr:`stored` multiply ``x[..., input_order]``; ``None`` if they multiply x."""
        return self.stored.input_order

    @property
    def weight(self) -> StoredMatrix:
        """What stands for the weight where its shape, or whether it is tied, is looked at."""
        return self.stored

    @weight.setter
    def weight(self, value: Any) -> None:
        """Tying the weights again is nothing new; another weight is a mistake.

        Raises:
            ConfigurationError
        """
        _check_same(self.stored, value)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N), in the dtype of x."""
        if _shapes_only.get():
            return x.new_zeros(*x.shape[:-1], self.out_features)
        result = x.new_empty(*x.shape[:-1], self.out_features)
        step = piece_rows(self.in_features)
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            bias = None if self.bias is None else self.bias[rows]
            result[..., rows] = nn.functional.linear(x, self.stored.dequantize(rows).to(x), bias)
        return result

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.stored.type}"


class StoredEmbedding(nn.Module):
    """Rows of a table in quantized blocks, dequantized as they are looked up.

    Args:
        stored: the table (V, D).
        multiplier: of every output (Gemma scales its embeddings).

    Attributes:
        num_embeddings, embedding_dim: V and D.
        stored: the table.
        multiplier: as given.
    """

    def __init__(self, stored: StoredMatrix, multiplier: float = 1.0) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = stored.shape
        self.stored = stored
        self.multiplier = multiplier

    @classmethod
    def in_place_of(cls, embedding: nn.Module, stored: StoredMatrix) -> Self:
        """One that does what ``embedding`` does.

        Raises:
            ConfigurationError: ``embedding`` does more than look up rows.
        """
        if reason := unsupported_embedding(embedding):
            raise ConfigurationError(reason)
        return cls(stored, float(getattr(embedding, "scalar_embed_scale", 1.0)))

    @property
    def weight(self) -> StoredMatrix:
        """What stands for the weight where its shape, or whether it is tied, is looked at."""
        return self.stored

    @weight.setter
    def weight(self, value: Any) -> None:
        """As in :class:`StoredLinear`."""
        _check_same(self.stored, value)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (...) -> (..., D) fp32."""
        if _shapes_only.get():
            return torch.zeros(*ids.shape, self.embedding_dim, device=ids.device)
        rows = self.stored.dequantize(ids).to(ids.device)
        # Gemma's factor is a tensor of the type of the weights
        return rows * torch.tensor(self.multiplier, device=rows.device) if self.multiplier != 1.0 else rows

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.stored.type}"


def _check_same(stored: StoredMatrix, value: Any) -> None:
    if value is not stored:
        raise ConfigurationError("a layer with stored weights takes no other weight")
