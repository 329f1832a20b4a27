"""Tokens become vectors, or scores. Texts are sorted by length, so that those of a pass need no padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.errors import RequestError
from gossamer.models.pooling_config import Pooling
from gossamer.options import is_integer
from gossamer.pooling.encoder import Group
from gossamer.pooling.ranking import Ranking, finish
from gossamer.pooling.texts import Texts, Tokens

PASS_TOKENS = 2048  # of one pass: enough for the products of matrices, and the rows of a layer stay in the caches
Network = Callable[[list[Group]], list[Tensor]]


class PoolingModel:
    """A model that makes one vector, or one score, of each input.

    Args:
        task: ``"embed"`` or ``"score"``.
        network: from groups of texts to the vectors of their tokens.
        texts: makes tokens.
        pooling: from the vectors of a text's tokens to that of the text; of ``"embed"``.
        head: from the vectors of tokens (texts, length, D) to scores (texts); of ``"score"``.
        width: numbers of an embedding.

    Attributes:
        weights: what is computed with, such as ``int8``.
        note: why PyTorch computes it and not the kernels of csrc/; empty if they do.
    """

    def __init__(
        self,
        task: Literal["embed", "score"],
        network: Network,
        texts: Texts,
        *,
        pooling: Pooling = "mean",
        head: Callable[[Tensor], Tensor] | None = None,
        width: int,
        weights: str,
        note: str,
    ) -> None:
        self.task: Literal["embed", "score"] = task
        self.texts = texts
        self.width = width
        self.weights, self.note = weights, note
        self._network, self._pooling, self._head = network, pooling, head

    @property
    def max_length(self) -> int:
        """Tokens of the longest input."""
        return self.texts.max_length

    @torch.inference_mode()
    def compute(self, inputs: Sequence[Tokens], progress: Callable[[int], None] = lambda count: None) -> Tensor:
        """One row for each input, in their order.

        Args:
            inputs: as :class:`~gossamer.pooling.texts.Texts` makes them.
            progress: called with the number of inputs that were computed, after each pass.

        Returns:
            (inputs, width) fp32, not normalized; for scores (inputs, 1).
        """
        out = torch.empty(len(inputs), self.width if self.task == "embed" else 1)
        for places in passes(inputs, PASS_TOKENS):
            hidden = self._network([_group([inputs[place] for place in group]) for group in places])
            for group, vectors in zip(places, hidden, strict=True):
                out[group] = pool(vectors, self._pooling) if self._head is None else self._head(vectors)[:, None]
            progress(sum(map(len, places)))
        return out

    def check_dimensions(self, dimensions: int | None) -> None:
        """Whether embeddings can be cut to so many numbers.

        Raises:
            RequestError
        """
        if dimensions is not None and (not is_integer(dimensions) or not 1 <= dimensions <= self.width):
            raise RequestError(
                f"dimensions must be from 1 to {self.width}, which is what this model makes, got {dimensions!r}",
                param="dimensions",
            )

    def finish(self, rows: Tensor, dimensions: int | None = None, *, normalize: bool = True) -> Tensor:
        """Embeddings as they are handed out; see :func:`finish`."""
        return finish(rows, dimensions, normalize=normalize)

    def ranking(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        truncate: int | None = None,
        *,
        texts: Texts | None = None,
        names: tuple[str, str] = ("query", "documents"),
    ) -> Ranking:
        """Pairs to be scored; see :class:`~gossamer.pooling.ranking.Ranking`."""
        return Ranking(
            queries, documents, truncate, texts=texts or self.texts, together=self.task == "score", names=names
        )


def passes(inputs: Sequence[Tokens], most: int) -> Iterator[list[list[int]]]:
    """The places of inputs, in groups of one length; a pass has groups of up to ``most`` tokens, or one input.

    >>> inputs = [Tokens([1, 2]), Tokens([3]), Tokens([4, 5]), Tokens([6])]
    >>> list(passes(inputs, 4))
    [[[1, 3], [0]], [[2]]]
    """
    together: list[list[int]] = []
    tokens = 0
    for place in sorted(range(len(inputs)), key=lambda place: _kind(inputs[place])):
        length = len(inputs[place].ids)
        if together and tokens + length > most:
            yield together
            together, tokens = [], 0
        if not together or _kind(inputs[together[-1][0]]) != _kind(inputs[place]):
            together.append([])
        together[-1].append(place)
        tokens += length
    if together:
        yield together


def _kind(tokens: Tokens) -> tuple[int, bool]:
    """What the texts of a group have in common."""
    return len(tokens.ids), tokens.types is not None


def _group(inputs: list[Tokens]) -> Group:
    types: Any = [each.types for each in inputs]
    ids = torch.tensor([each.ids for each in inputs])
    return Group(ids, None if types[0] is None else torch.tensor(types))


def pool(vectors: Tensor, pooling: Pooling) -> Tensor:
    """The vectors of texts, of those of their tokens: (texts, length, D) -> (texts, D).

    >>> pool(torch.tensor([[[1.0, 4.0], [3.0, 2.0]]]), "mean")
    tensor([[2., 3.]])
    """
    if pooling == "mean":
        return vectors.mean(1)
    if pooling == "max":
        return vectors.amax(1)
    return vectors[:, 0 if pooling == "cls" else -1]
