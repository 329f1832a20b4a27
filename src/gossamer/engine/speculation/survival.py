"""How likely a drafted token is to come: learnt from what follows, whether or not the draft was verified.

A draft continues a match of some length; ``h(source, m)`` is the share of the tokens behind matches of ``m`` tokens
that were right. The text tells it for every draft that was made, so nothing has to be tried out to learn. The match
grows with each right token, so the ``j``-th token of a draft survives with probability

    S_j = h(source, m) h(source, m + 1) ... h(source, m + j - 1).

Texts differ: one quotes, another does not. So each has a factor of its own on the share that is wrong.
"""

from __future__ import annotations

from enum import IntEnum

BUCKETS = 9  # of lengths
_MEMORY = 1 - 1 / 200  # of a share, per token
_OWN_MEMORY = 1 - 1 / 24  # of a text's factor
_PRIOR = 8.0  # tokens that the first guess counts for


class Source(IntEnum):
    """Where a draft stands already. The first are told from the others by what they are worth, not by their order."""

    PREDICTION = 0  # of the request
    GRAMMAR = 1  # nothing else can be spelled
    OWN = 2  # in the output, or in what of the prompt nobody shares
    PREFIX = 3  # in a shared part of the prompt
    SIBLING = 4  # in the text of another sequence below the same prefix
    FINISHED = 5  # in an answer that has ended

    @property
    def label(self) -> str:
        """For people and metrics."""
        return self.name.lower()


_GUESS = (0.3, 0.4, 0.3, 0.5, 0.6, 0.75, 0.85, 0.9, 0.95)
_GUESSES = {Source.PREDICTION: (0.8, 0.8, 0.85, 0.85, 0.9, 0.93, 0.95, 0.96, 0.97), Source.GRAMMAR: (0.9,) * BUCKETS}


def bucket(length: int) -> int:
    """Of a match of so many tokens; 0 is for a guess that no token has confirmed yet.

    >>> [bucket(length) for length in (0, 1, 2, 3, 4, 7, 64, 1000)]
    [0, 1, 2, 3, 4, 4, 8, 8]
    """
    return length if length < 4 else min(length.bit_length() + 1, BUCKETS - 1)


class Survival:
    """Shares of right tokens by source and length of the match."""

    def __init__(self) -> None:
        self._right = [[_PRIOR * share for share in _GUESSES.get(source, _GUESS)] for source in Source]
        self._all = [[_PRIOR] * BUCKETS for _ in Source]

    def chance(self, source: Source, length: int) -> float:
        """``h(source, length)``, less than 1."""
        place = bucket(length)
        return min(self._right[source][place] / self._all[source][place], 0.995)

    def learn(self, source: Source, length: int, right: bool) -> None:
        """A token behind a match of ``length`` tokens was right, or was not."""
        place = bucket(length)
        self._right[source][place] = self._right[source][place] * _MEMORY + right
        self._all[source][place] = self._all[source][place] * _MEMORY + 1


class Deviation:
    """How much more, or less, often than on average the drafts of one text are wrong: a factor, 1 at first."""

    def __init__(self) -> None:
        self._wrong = self._expected = 2.0

    def apply(self, chance: float) -> float:
        """The chance of a token of this text, given that of all."""
        return max(1 - (1 - chance) * self._wrong / self._expected, 0.0)

    def learn(self, chance: float, right: bool) -> None:
        """A token of which ``chance`` was said was right, or was not."""
        self._wrong = 2 + (self._wrong - 2) * _OWN_MEMORY + (not right)
        self._expected = 2 + (self._expected - 2) * _OWN_MEMORY + (1 - chance)
