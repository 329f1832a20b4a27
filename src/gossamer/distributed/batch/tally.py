"""What was answered, and what it took: counted from lines of an output, whoever wrote them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

_FAILURES_KEPT = 5


@dataclass
class Tally:
    """Counts of lines of an output.

    Attributes:
        answered, failed: lines.
        prompt_tokens, completion_tokens, tokens_saved: of the answers, as their ``usage`` says.
        failures: the first few errors, as pairs of a line number and a message.
    """

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    tokens_saved: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)

    def add(self, record: dict[str, Any]) -> None:
        """Count one line."""
        response = record["response"]
        error = record["error"] or response["body"].get("error")
        if error is not None:
            self.failed += 1
            if len(self.failures) < _FAILURES_KEPT:
                self.failures.append((int(error.get("line") or 0), str(error["message"])))
            return
        self.answered += 1
        usage = response["body"].get("usage") or {}
        saved = _details(usage).get("cached_tokens", usage.get("cache_read_input_tokens", 0))
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", 0))
        if "cache_read_input_tokens" in usage:  # in Anthropic's answers, beside the others
            prompt += usage["cache_read_input_tokens"]
        self.prompt_tokens += prompt
        self.completion_tokens += usage.get("completion_tokens", usage.get("output_tokens", 0))
        self.tokens_saved += saved

    def plus(self, other: Tally, sign: int = 1) -> Tally:
        """Both together, or with ``sign=-1`` what this one has more.

        >>> Tally(answered=3).plus(Tally(answered=1), -1).answered
        2
        """
        return Tally(
            self.answered + sign * other.answered,
            self.failed + sign * other.failed,
            self.prompt_tokens + sign * other.prompt_tokens,
            self.completion_tokens + sign * other.completion_tokens,
            self.tokens_saved + sign * other.tokens_saved,
            [*self.failures, *other.failures][:_FAILURES_KEPT] if sign > 0 else self.failures,
        )


def _details(usage: dict[str, Any]) -> dict[str, Any]:
    return usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
