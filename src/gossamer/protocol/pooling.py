"""``/v1/embeddings``, ``/v1/rerank`` and ``/v1/score``: bodies of endpoints that answer with vectors or scores.

Embeddings are OpenAI's; the other two are those of Jina, Cohere and vLLM. As everywhere, a field that cannot be
honoured is refused by name.
"""

from __future__ import annotations

import base64
import uuid
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema, field_validator, model_validator

from gossamer.errors import RequestError
from gossamer.protocol.fields import Fields, PositiveCount, parse_fields
from gossamer.protocol.responses import Json, new_head

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.pooling.model import PoolingModel
    from gossamer.pooling.texts import Texts, Tokens

MAX_INPUTS = 2048  # of one body, as at OpenAI
_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"anyOf": [_TEXT, {"type": "array", "items": _TEXT, "minItems": 1, "maxItems": MAX_INPUTS}]}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_INPUT = {"anyOf": [*_TEXTS["anyOf"], _IDS, {"type": "array", "items": _IDS, "minItems": 1, "maxItems": MAX_INPUTS}]}


def _as_texts(value: object) -> object:
    return [value] if isinstance(value, str) else value


TruncateTokens = Annotated[int, Field(ge=-1)]  # -1 is as many as the model reads
TextList = Annotated[
    list[str],
    Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True),
    BeforeValidator(_as_texts),
    WithJsonSchema(_TEXTS),
]


@dataclass(frozen=True, slots=True)
class PoolingWork:
    """What a body asks of a model.

    Attributes:
        inputs: to be computed.
        answer: from the rows that were computed, one for each, and the model's name to the whole answer.
    """

    inputs: Sequence[Tokens]
    answer: Callable[[Tensor, str], Json]


class PoolingBody(Fields, BaseModel):  # BaseModel for ruff, which would take the defaults for shared ones
    """Body of an endpoint that answers with vectors or scores."""

    #: The path of the endpoint, in batch files as well.
    url: ClassVar[str]
    #: One sentence for the OpenAPI document.
    description: ClassVar[str]

    model: str | None = None
    user: str | None = None  # OpenAI's tag for the end user; by definition it does not influence the answer
    truncate_prompt_tokens: TruncateTokens | None = None  # keep so many tokens of the beginning of each text

    @classmethod
    def parse(cls, body: object) -> Self:
        """Read a decoded JSON body.

        Raises:
            RequestError: a field is missing, unknown or of the wrong type; ``param`` names it.
        """
        return parse_fields(cls, body)

    @abstractmethod
    def work(self, model: PoolingModel, texts: Texts) -> PoolingWork:
        """What has to be computed.

        Args:
            model: which will compute it.
            texts: the model's, or a copy for another thread.

        Raises:
            RequestError: the model cannot answer this; ``param`` names the field.
        """


class EmbeddingsRequest(PoolingBody):
    """Body of ``POST /v1/embeddings``.

    Attributes:
        input: one or several inputs, each a string or a list of token ids; normalised to a list of inputs.
        encoding_format: numbers, or base64 of their little-endian fp32.
        dimensions: the first so many numbers, brought to length 1 again.
        normalize: to length 1.
        add_special_tokens: those that the tokenizer puts around a text.

    >>> EmbeddingsRequest.parse({"input": [1, 2, 3]}).input
    [[1, 2, 3]]
    """

    url: ClassVar[str] = "/v1/embeddings"
    description: ClassVar[str] = "Vectors of one or several texts."

    input: Annotated[list[str | list[int]], WithJsonSchema(_INPUT)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: PositiveCount | None = None
    normalize: bool = True
    add_special_tokens: bool = True

    @field_validator("input", mode="plain")
    @classmethod
    def _as_inputs(cls, value: object) -> list[Any]:
        if isinstance(value, str):
            return [value]
        if not isinstance(value, list) or not value:
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
        if isinstance(value[0], int):
            return [value]  # its ids are checked with the vocabulary
        if len(value) > MAX_INPUTS:
            raise ValueError(f"holds {len(value)} inputs; at most {MAX_INPUTS} are answered together")
        if not all(isinstance(each, type(value[0])) for each in value) or not isinstance(value[0], str | list):
            raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists")
        return value

    def work(self, model: PoolingModel, texts: Texts) -> PoolingWork:
        """See :meth:`PoolingBody.work`."""
        if model.task != "embed":
            raise RequestError("this model scores pairs of texts, and makes no embeddings; ask /v1/rerank or /v1/score")
        model.check_dimensions(self.dimensions)
        inputs = [
            texts.encode(each, f"input[{place}]", self.truncate_prompt_tokens, special=self.add_special_tokens)
            for place, each in enumerate(self.input)
        ]

        def answer(rows: Tensor, name: str) -> Json:
            vectors = model.finish(rows, self.dimensions, normalize=self.normalize).numpy().astype("<f4")
            written: list[Any] = (
                [base64.b64encode(vector.tobytes()).decode("ascii") for vector in vectors]
                if self.encoding_format == "base64"
                else vectors.tolist()
            )
            data = [
                {"object": "embedding", "index": place, "embedding": vector} for place, vector in enumerate(written)
            ]
            return {"object": "list", "data": data, "model": name, "usage": _usage(inputs)}

        return PoolingWork(inputs, answer)


class DocumentText(Fields):
    """A document as an object, as Cohere's clients may send it."""

    text: str


class RerankRequest(PoolingBody):
    """Body of ``POST /v1/rerank``: documents in the order in which they answer a query.

    Attributes:
        query: a text.
        documents: texts, or objects with a ``text``.
        top_n: the best so many; all by default.
        return_documents: with their texts.

    >>> RerankRequest.parse({"query": "a", "documents": [{"text": "b"}, "c"]}).documents
    ['b', 'c']
    """

    url: ClassVar[str] = "/v1/rerank"
    description: ClassVar[str] = "The order in which documents answer a query."

    query: str
    documents: TextList
    top_n: PositiveCount | None = None
    return_documents: bool = True

    @field_validator("documents", mode="before")
    @classmethod
    def _texts_of_objects(cls, value: object) -> object:
        if isinstance(value, list) and len(value) <= MAX_INPUTS:
            return [DocumentText.model_validate(each).text if isinstance(each, dict) else each for each in value]
        return value

    def work(self, model: PoolingModel, texts: Texts) -> PoolingWork:
        """See :meth:`PoolingBody.work`."""
        ranking = model.ranking([self.query], self.documents, self.truncate_prompt_tokens, texts=texts)

        def answer(rows: Tensor, name: str) -> Json:
            results = []
            for place, score in ranking.best_first(rows, self.top_n):
                document = {"document": {"text": self.documents[place]}} if self.return_documents else {}
                results.append({"index": place, "relevance_score": score} | document)
            usage = _usage(ranking.inputs)
            return {"id": f"rerank-{uuid.uuid4().hex}", "model": name, "usage": usage, "results": results}

        return PoolingWork(ranking.inputs, answer)


class ScoreRequest(PoolingBody):
    """Body of ``POST /v1/score``: one score for each pair of texts.

    Attributes:
        text_1: one text for all of ``text_2``, or one each. vLLM's other name is ``queries``.
        text_2: texts; ``documents``.

    >>> ScoreRequest.parse({"queries": "a", "documents": ["b", "c"]}).text_1
    ['a']
    """

    url: ClassVar[str] = "/v1/score"
    description: ClassVar[str] = "Scores of pairs of texts."

    text_1: TextList
    text_2: TextList

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        names = {"queries": "text_1", "documents": "text_2"}
        for other, name in names.items():
            if other in value and name in value:
                raise ValueError(f"{other} and {name} mean the same; give one of them")
        return {names.get(name, name): each for name, each in value.items()}

    @model_validator(mode="after")
    def _can_be_paired(self) -> Self:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise ValueError(
                f"text_1 holds {len(self.text_1)} texts and text_2 {len(self.text_2)}; give one for all, or one each"
            )
        return self

    def work(self, model: PoolingModel, texts: Texts) -> PoolingWork:
        """See :meth:`PoolingBody.work`."""
        ranking = model.ranking(
            self.text_1, self.text_2, self.truncate_prompt_tokens, texts=texts, names=("text_1", "text_2")
        )

        def answer(rows: Tensor, name: str) -> Json:
            scores = ranking.scores(rows)
            data = [{"index": place, "object": "score", "score": score} for place, score in enumerate(scores)]
            return new_head("score", "list", name) | {"data": data, "usage": _usage(ranking.inputs)}

        return PoolingWork(ranking.inputs, answer)


def _usage(inputs: Sequence[Tokens]) -> Json:
    tokens = sum(len(each.ids) for each in inputs)
    return {"prompt_tokens": tokens, "total_tokens": tokens}
