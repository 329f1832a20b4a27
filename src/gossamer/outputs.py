"""What comes back from a request. Field names are vLLM's, so that code carries over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gossamer.errors import RequestError


@dataclass(slots=True)
class Logprob:
    """Log-probability (natural) of one token, its rank (1 is the most probable) and its text.

    Attributes:
        decoded_token: the text that the token completes behind those before it: the texts of the tokens of a completion
            add up to its text. It is empty for a token that ends inside a character, whose last token has all of it.
            A token that is no part of the text, such as the one that ended it, stands here as it is spelled.
        token_bytes: the bytes that the token adds to the text; none for one that is no part of it.
    """

    logprob: float
    rank: int
    decoded_token: str | None = None
    token_bytes: bytes | None = None


@dataclass(slots=True)
class CompletionOutput:
    """One completion of a prompt.

    Attributes:
        finish_reason: ``"stop"`` (end-of-sequence, stop token or stop string), ``"length"``, or ``None`` if unfinished.
        stop_reason: the stop string or stop token id that ended it, ``None`` for end-of-sequence and length.
        answer: of ``LLM.chat``: the text read as content, thoughts and calls of tools (:class:`gossamer.chat.Answer`).
        cumulative_logprob: sum of the chosen tokens' log-probabilities; ``None`` unless logprobs were asked for.
        logprobs: one mapping per generated token: token id -> :class:`Logprob`.
        num_reasoning_tokens: how many of the tokens are thoughts, with the markers around them; known if the parameters
            say what marks thoughts.
        num_accepted_prediction_tokens, num_rejected_prediction_tokens: of the request's prediction, as far as they were
            verified: those that came, and those that did not.
    """

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    answer: Any = None
    num_reasoning_tokens: int = 0
    num_accepted_prediction_tokens: int = 0
    num_rejected_prediction_tokens: int = 0


@dataclass(slots=True)
class RequestMetrics:
    """When something happened to a request, in seconds of ``time.perf_counter``; ``None`` if it did not.

    Attributes:
        arrived: it was queued.
        admitted: it got memory for the first time.
        first_token, last_token: the first and the last token, of any of its completions, came.
        max_tokens: what it may generate at most.
    """

    arrived: float
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    max_tokens: int | None = None


@dataclass(slots=True)
class RequestOutput:
    """A prompt with its completions.

    Attributes:
        num_cached_tokens: prompt tokens whose keys and values were already there or were computed for another request.
        error: why the request failed, or ``None``. A failed request has no outputs.
        metrics: when it was queued, admitted and answered.
        adapter: that it was computed with; ``None`` for the model itself.
    """

    request_id: str
    prompt: str | None = None
    prompt_token_ids: list[int] = field(default_factory=list)
    outputs: list[CompletionOutput] = field(default_factory=list)
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    num_cached_tokens: int = 0
    finished: bool = True
    error: RequestError | None = None
    metrics: RequestMetrics | None = None
    adapter: str | None = None


@dataclass(slots=True)
class BeamSearchSequence:
    """One hypothesis.

    Attributes:
        token_ids: the generated tokens.
        cumulative_logprob: sum of their log-probabilities.
        score: ``cumulative_logprob / len(token_ids) ** length_penalty``.
        finish_reason: ``"stop"`` or ``"length"``.
    """

    text: str
    token_ids: list[int]
    cumulative_logprob: float
    score: float
    finish_reason: str


@dataclass(slots=True)
class BeamSearchOutput:
    """The hypotheses of one prompt, best first."""

    request_id: str
    prompt_token_ids: list[int]
    sequences: list[BeamSearchSequence] = field(default_factory=list)
    error: RequestError | None = None


@dataclass(slots=True)
class ContinuationScore:
    """Log-likelihood of one continuation.

    Attributes:
        token_logprobs: natural log-probability of each token given everything before it.
        logprob: their sum.
    """

    text: str | None
    token_ids: list[int]
    token_logprobs: list[float]

    @property
    def logprob(self) -> float:
        return sum(self.token_logprobs)


@dataclass(slots=True)
class ScoreOutput:
    """Log-likelihoods of a prompt, or of candidate continuations of it.

    Attributes:
        token_logprobs: without continuations: one entry per prompt token, ``None`` for the first.
        continuations: with continuations: one score each, in the order given.
    """

    request_id: str
    prompt_token_ids: list[int]
    token_logprobs: list[float | None] | None = None
    continuations: list[ContinuationScore] = field(default_factory=list)
    num_cached_tokens: int = 0
    error: RequestError | None = None

    @property
    def best(self) -> int:
        """Index of the most probable continuation (by summed log-probability)."""
        return max(range(len(self.continuations)), key=lambda i: self.continuations[i].logprob)


@dataclass(slots=True)
class EmbeddingOutput:
    """The vector of one text.

    Attributes:
        embedding: (D) fp32, a numpy array.
        prompt_token_ids: what the model read, special tokens included.
    """

    embedding: Any
    prompt_token_ids: list[int]


@dataclass(slots=True)
class RankedDocument:
    """A document, and how well it answers a query.

    Attributes:
        index: its place among the documents.
        relevance_score: the higher the better: from 0 to 1 of a cross-encoder, a cosine of embeddings otherwise.
    """

    index: int
    relevance_score: float
    document: str
