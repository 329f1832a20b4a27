"""How well documents answer a query: by an encoder that reads both together, or by the cosine of two embeddings."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gossamer.pooling.model import PoolingModel, finish
from gossamer.pooling.texts import Texts, Tokens


class Ranking:
    """Pairs of a query and a document, and what has to be computed to score them.

    Args:
        model: a cross-encoder, or a model of embeddings.
        queries: one for all documents, or one each.
        documents: texts.
        truncate: see :meth:`gossamer.pooling.texts.Texts.encode`.
        texts: the model's, or a copy for another thread.
        names: of queries and documents, for errors.

    Attributes:
        inputs: to be computed.

    Raises:
        RequestError: a text cannot be read; its place is named.
    """

    def __init__(
        self,
        model: PoolingModel,
        queries: Sequence[str],
        documents: Sequence[str],
        truncate: int | None = None,
        *,
        texts: Texts | None = None,
        names: tuple[str, str] = ("query", "documents"),
    ) -> None:
        texts = texts or model.texts
        self._queries, self._documents = len(queries), len(documents)
        self._together = model.task == "score"
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


def best_first(scores: Sequence[float], most: int | None = None) -> list[int]:
    """The places of the scores, the highest first; those of equal scores in their order.

    >>> best_first([0.1, 0.9, 0.9], 2)
    [1, 2]
    """
    return sorted(range(len(scores)), key=lambda place: -scores[place])[:most]
