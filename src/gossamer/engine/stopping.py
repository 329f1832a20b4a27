"""When a sequence ends.

The rules are vLLM's. A token may end the sequence: end-of-sequence (unless ``ignore_eos``) or one of
``stop_token_ids``, once ``min_tokens`` tokens were generated. So may a stop string that is completed by text after the
first ``min_tokens`` tokens; among several, the one that is complete first. Last, the length: ``max_tokens``, or the
end of the context. A step that ends a sequence by a token or by its length may also complete a stop string; the stop
string then decides, because it cuts the text.

Tokens are checked apart from text, so that sequences without stop strings need no text until they end.
"""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Stop:
    """Why a sequence ends.

    Attributes:
        finish_reason: ``"stop"`` or ``"length"``.
        stop_reason: the stop string or stop token id, ``None`` for end-of-sequence and length.
        hides_token: the last token ended the sequence and is not part of the text. It stays among the token ids.
        text: the text, cut at the stop string; ``None`` if no stop string ended it.
    """

    finish_reason: str
    stop_reason: str | int | None = None
    hides_token: bool = False
    text: str | None = None


class StopChecker:
    """Decides after each token whether one sequence ends.

    Args:
        eos_token_ids: the model's end-of-sequence tokens.
        max_new_tokens: how many tokens may be generated: ``max_tokens``, or less if the context ends before.

    >>> checker = StopChecker(SamplingParams(stop="\\n", stop_token_ids=[7]), frozenset({2}), max_new_tokens=16)
    >>> checker.check_token(7, num_generated=3).stop_reason
    7
    >>> checker.check_text("one", num_generated=1) is None
    True
    >>> checker.check_text("one\\ntwo", num_generated=2).text
    'one'
    """

    def __init__(self, params: SamplingParams, eos_token_ids: frozenset[int], max_new_tokens: int) -> None:
        self._eos_token_ids = frozenset() if params.ignore_eos else eos_token_ids
        self._stop_token_ids = self._eos_token_ids | frozenset(params.stop_token_ids or ())
        self._stop_strings = tuple(params.stop or ())
        self._include = params.include_stop_str_in_output
        self._min_tokens = params.min_tokens
        self._max_new_tokens = max_new_tokens
        self._searched = 0  # characters of the text in which no stop string ends

    @property
    def needs_text(self) -> bool:
        """Whether :meth:`check_text` is to be called at all."""
        return bool(self._stop_strings)

    def check_token(self, token: int, num_generated: int) -> Stop | None:
        """Check the token that was appended as number ``num_generated`` (from 1)."""
        if token in self._stop_token_ids and num_generated >= self._min_tokens:
            reason = None if token in self._eos_token_ids else token
            return Stop("stop", reason, hides_token=not self._include)
        if num_generated >= self._max_new_tokens:
            return Stop("length")
        return None

    def check_text(self, text: str, num_generated: int) -> Stop | None:
        """Search the text of ``num_generated`` tokens, as far as it is longer than at the last call."""
        searched, self._searched = self._searched, len(text)
        if num_generated <= self._min_tokens:
            return None
        matches = []
        for string in self._stop_strings:
            # The match must end in the new text; it may begin before.
            start = text.find(string, max(0, searched - len(string) + 1))
            if start >= 0:
                matches.append((start + len(string), start, string))
        if not matches:
            return None
        # The first to be complete, so that the result does not depend on how many characters come at once; if two
        # are completed by the same character, the longer one.
        end, start, string = min(matches)
        return Stop("stop", string, text=text[: end if self._include else start])
