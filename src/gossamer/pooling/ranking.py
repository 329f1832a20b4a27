"""How well documents answer a query: by an encoder that reads both together, or by the cosine of two embeddings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gossamer.pooling.texts import Texts, Tokens


class Ranking:
    """Pairs of a query and a document, and what has to be computed to score them.

    Args:
        queries: one for all documents, or one each.
        documents: texts.
        truncate: see :meth:`gossamer.pooling.texts.Texts.encode`.
        texts: makes tokens.
        together: a query and a document are read as one input, by a model that scores pairs.
        names: of queries and documents, for errors.

    Attributes:
        inputs: to be computed.

    Raises:
        RequestError: a text cannot be read; its place is named.
    """

    def __init__(
        self,
        queries: Sequence[str],
        documents: Sequence[str],
        truncate: int | None = None,
        *,
        texts: Texts,
        together: bool,
        names: tuple[str, str],
    ) -> None:
        self._queries, self._documents = len(queries), len(documents)
        self._together = together
        self.inputs: list[Tokens] = []
        if self._together:
            for place, document in enumerate(documents):
                query = queries[0] if len(queries) == 1 else queries[place]
                self.inputs.append(texts.encode_pair(query, document, f"{names[1]}[{place}]", truncate))
            return
        one = len(queries) == 1
        self.inputs += [
            texts.encode(query, names[0] if one else f"{names[0]}[{place}]", truncate)
            for place, query in enumerate(queries)
        ]
        self.inputs += [
            texts.encode(document, f"{names[1]}[{place}]", truncate) for place, document in enumerate(documents)
        ]

    def scores(self, rows: Tensor) -> list[float]:
        """One for each document, the higher the better: from 0 to 1 of a cross-encoder, a cosine otherwise.

        Args:
            rows: what the model computed of ``inputs``.
        """
        if self._together:
            scores: list[float] = rows[:, 0].tolist()
            return scores
        unit = finish(rows)
        scores = (unit[: self._queries] * unit[self._queries :]).sum(-1).tolist()
        return scores

    def best_first(self, rows: Tensor, most: int | None = None) -> list[tuple[int, float]]:
        """Place and score of each document, or of the best ``most``, the highest score first."""
        scores = self.scores(rows)
        return [(place, scores[place]) for place in by_score(scores)[:most]]


def by_score(scores: Sequence[float]) -> list[int]:
    """The places of the scores, the highest first; those of equal scores in their order.

    >>> by_score([0.1, 0.9, 0.9])
    [1, 2, 0]
    """
    return sorted(range(len(scores)), key=lambda place: -scores[place])


def finish(rows: Tensor, dimensions: int | None = None, *, normalize: bool = True) -> Tensor:
    """Embeddings as they are handed out: cut to the first ``dimensions`` numbers, then of length 1.

    >>> finish(torch.tensor([[3.0, 4.0, 5.0]]), 2)
    tensor([[0.6000, 0.8000]])
    """
    rows = rows if dimensions is None else rows[:, :dimensions]
    return torch.nn.functional.normalize(rows, dim=-1) if normalize else rows
