"""Log-probabilities on their way from the engine's outputs to JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gossamer.outputs import Logprob, RequestOutput

Step = tuple[int, dict[int, Logprob] | None]


def pair_steps(token_ids: list[int], logprobs: Sequence[dict[int, Logprob] | None] | None) -> list[Step]:
    """Pair each chosen token with the log-probabilities at its position (None for the first token of a prompt)."""
    return list(zip(token_ids, logprobs, strict=True)) if logprobs is not None else []


def most_probable(candidates: dict[int, Logprob], count: int) -> Iterable[Logprob]:
    """The ``count`` most probable candidates, the best first."""
    # The chosen token is among the candidates even when its rank is beyond ``count``.
    return sorted((c for c in candidates.values() if c.rank <= count), key=lambda c: c.rank)


def token_text(logprob: Logprob) -> str:
    """The text of the token."""
    return logprob.decoded_token or ""


def finite(logprob: float) -> float:
    """A number that JSON can hold."""
    # JSON has no -inf; OpenAI writes the log-probability of an impossible token so.
    return max(-9999.0, logprob)


def prompt_logprobs(output: RequestOutput) -> list[dict[str, Any] | None]:
    """vLLM's ``prompt_logprobs``: an object per token of the prompt, by token id."""
    return [
        None
        if candidates is None
        else {
            str(token): {"logprob": finite(c.logprob), "rank": c.rank, "decoded_token": c.decoded_token}
            for token, c in candidates.items()
        }
        for candidates in output.prompt_logprobs or []
    ]
