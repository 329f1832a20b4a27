"""Log-probabilities on their way from the engine's outputs to JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.outputs import Logprob, RequestOutput

Candidates = dict[int, Logprob]
# Characters that a tokenizer's normalisation may have changed or dropped between two tokens of a prompt.
_SKIPPED = 16


@dataclass(frozen=True, slots=True)
class Step:
    """A token at its place.

    Attributes:
        text: what it completes of the text; the spelling of one that is no part of it.
        offset: characters of the text before it.
        shown: whether it is part of the text.
        candidates: what might have stood here; ``None`` for the first token of a prompt, which nothing predicts.
    """

    token: int
    text: str
    offset: int
    shown: bool
    candidates: Candidates | None

    @property
    def end(self) -> int:
        """Characters of the text up to here."""
        return self.offset + len(self.text) * self.shown

    @property
    def whole(self) -> bool:
        """Whether no character is left incomplete behind it: what it completes ends with what it adds."""
        added = None if self.candidates is None else self.candidates[self.token].token_bytes
        return added is None or self.text.encode().endswith(added)


def steps_of(token_ids: Sequence[int], logprobs: Sequence[Candidates] | None, offset: int = 0) -> list[Step]:
    """The tokens of a completion whose text begins at ``offset``; none if no log-probabilities were asked for."""
    steps: list[Step] = []
    for token, candidates in zip(token_ids, logprobs, strict=True) if logprobs is not None else ():
        chosen = candidates[token]
        step = Step(token, token_text(chosen), offset, _adds_text(token, candidates), candidates)
        steps.append(step)
        offset = step.end
    return steps


def settled(steps: Sequence[Step], length: int) -> int:
    """How many of the steps are done when ``length`` characters of an unfinished text are settled."""
    count, whole = 0, True
    for place, step in enumerate(steps, 1):
        if step.end > length:
            break
        whole = step.whole if step.shown else whole
        count = place if whole else count
    return count


def within(steps: Sequence[Step], length: int) -> list[Step]:
    """The tokens that the first ``length`` characters are made of: not the one that ended the text, for example."""
    return [step for step in steps if step.shown and step.offset < length]


def prompt_steps(output: RequestOutput, text: str, spell_first: str) -> list[Step]:
    """The tokens of an echoed prompt, each at its place in ``text``.

    A token that the text does not hold, such as one that the tokenizer puts first by itself, stands where it would be.

    Args:
        spell_first: the first token, of which no log-probability tells the text.
    """
    if output.prompt_logprobs is None:
        return []
    steps: list[Step] = []
    offset = 0
    for token, candidates in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
        spelled = spell_first if candidates is None else token_text(candidates[token])
        if candidates is None and "\ufffd" in spelled and not text.startswith(spelled):
            spelled = ""  # it ends inside a character
        place = text.find(spelled, offset, offset + len(spelled) + (_SKIPPED if _adds_text(token, candidates) else 0))
        steps.append(Step(token, spelled, max(place, offset), place >= 0, candidates))
        offset = steps[-1].end
    return steps


def _adds_text(token: int, candidates: Candidates | None) -> bool:
    return candidates is not None and candidates[token].token_bytes != b""


def most_probable(step: Step, count: int) -> list[tuple[int, Logprob]]:
    """The ``count`` most probable candidates, the best first, and the chosen token wherever it ranks."""
    ranked = sorted((step.candidates or {}).items(), key=lambda item: item[1].rank)
    return ranked[:count] + [item for item in ranked[count:] if item[0] == step.token]


def token_text(logprob: Logprob) -> str:
    """The text of the token."""
    return logprob.decoded_token or ""


def token_id_text(token: int) -> str:
    """vLLM's name of a token by its id."""
    return f"token_id:{token}"


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
