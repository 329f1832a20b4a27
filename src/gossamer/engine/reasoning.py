"""The thoughts at the beginning of a completion: how many tokens they have, and their end where that is bounded."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence

from gossamer.sampling_params import ReasoningParams


class Reasoning:
    """Follows the thoughts of one completion, token by token.

    Args:
        params: what begins and ends them, and how many tokens they may have.
        closing: the tokens of ``params.closing``.

    Attributes:
        count: tokens so far, those of the markers included.

    >>> thoughts = Reasoning(ReasoningParams(max_tokens=2, begun=True), closing=[7, 8])
    >>> thoughts.push(1, "Hm", whole=True)
    >>> thoughts.push(2, "Hm, well", whole=True)
    >>> thoughts.forced  # the bound is reached
    7
    >>> thoughts.push(7, "Hm, well\\n</think>", whole=True)
    >>> thoughts.push(8, "Hm, well\\n</think>\\n\\n", whole=True)
    >>> thoughts.count, thoughts.forced
    (3, None)
    """

    def __init__(self, params: ReasoningParams, closing: Sequence[int]) -> None:
        self.count = 0
        self._params = params
        self._closing = deque(closing)
        self._begun = params.begun
        self._ended = False
        self._inside = 0  # tokens behind the marker
        self._searched = 0  # characters of the text in which the end does not begin
        self._closes = False
        self._bound(whole=True)

    @property
    def forced(self) -> int | None:
        """The token that has to come next, if one has to."""
        return self._closing[0] if self._closes and self._closing else None

    @property
    def free(self) -> int:
        """How many tokens can come before one has to, at least."""
        most = self._params.max_tokens
        if self._closes:
            return 0 if self._closing else sys.maxsize
        return sys.maxsize if self._ended or most is None else most - self._inside - 1

    def push(self, token: int, text: str, *, whole: bool) -> None:
        """The completion has gone on with ``token``.

        Args:
            text: all of it.
            whole: it does not end within a character.
        """
        if token == self.forced:
            self._closing.popleft()
        if self._ended:
            return
        self.count += 1
        if not self._begun:
            start = text.lstrip()
            self._begun = start.startswith(self._params.begin)
            if self._begun:
                self._searched = text.index(self._params.begin) + len(self._params.begin)
            elif start and not self._params.begin.startswith(start):
                self._ended, self.count = True, 0
            if not self._begun:
                return
        else:
            self._inside += 1
        self._ended = text.find(self._params.end, self._searched) >= 0
        self._searched = max(self._searched, len(text) - len(self._params.end) + 1)
        if not self._ended:
            self._bound(whole=whole)

    def _bound(self, *, whole: bool) -> None:
        most = self._params.max_tokens
        self._closes = self._closes or (self._begun and most is not None and self._inside >= most and whole)
