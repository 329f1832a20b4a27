"""What an answer makes of the text that it follows, learnt from where it left the text and came back to it.

Answers that follow a text seldom copy it: they rename what it names, and make records of its sentences. Where one left
the text at a place and came back some tokens further on, the tokens between are a rewrite: ``skipped`` tokens of the
text became ``written`` ones. Where the text says the same again, the answer is likely to do the same again.

    text     Error 1, which C calls EPERM, means: Operation not permitted. Error 2, which C calls ENOENT, ...
    answer   {"number": 1, "name": "EPERM", "meaning": "Operation not permitted"}, {"number": 2, "name": "ENOENT", ...

A rewrite is found again by the text it replaces: its first two tokens, or the only one; if it replaces none, by the
token before it. In a tokenizer's vocabulary a word behind a blank is another token than the word alone, so one that
has lost its blank on the way is taken for the same.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

WINDOW = 32  # tokens of the text, and of the answer, in which an answer comes back
_MOST = 256  # rewrites of an answer
_CONFIRMED = 2  # tokens in a row that tell that it has come back

Key = tuple[int, ...]


class Words(Protocol):
    """What a tokenizer's vocabulary says of its tokens."""

    def unspaced(self, token: int) -> int:
        """The token of a word without the blank before it; ``token`` if it has none."""

    def is_word(self, token: int) -> bool:
        """Whether it has a letter or a digit."""


@dataclass(slots=True)
class Rewrite:
    """``skipped`` tokens become ``written``; the one behind them loses its blank, if it did, by ``unspaced``."""

    skipped: int
    written: Sequence[int]
    unspaced: Callable[[int], int] | None = None
    wrong: int = 0  # times more often than it was right


@dataclass(slots=True)
class Departure:
    """An answer left ``text[place:]``, and has said ``since`` then.

    Attributes:
        near: where each token of the text in the window stands, under its own number and without its blank.
    """

    text: Sequence[int]
    place: int
    since: list[int]
    near: dict[int, list[int]]


class Table(OrderedDict[Key, Rewrite]):
    """Rewrites by the text that they replace; the last learnt are kept."""

    def learn(self, key: Key, rewrite: Rewrite) -> None:
        """``rewrite`` has happened."""
        known = self.pop(key, None)
        if known is not None and (known.skipped, known.written) == (rewrite.skipped, rewrite.written):
            known.wrong = max(known.wrong - 1, -1)
            rewrite = known
        self[key] = rewrite
        if len(self) > _MOST:
            self.popitem(last=False)

    @property
    def nbytes(self) -> int:
        """Bytes of the rewrites, roughly."""
        return sum(256 + 8 * len(rewrite.written) for rewrite in self.values())


class Rewrites:
    """The rewrites of one answer.

    Args:
        words: what its tokens are.
        shared: those that other answers learn as well. Of several tokens: what becomes of a single one, as where
            something is renamed, is each answer's own.

    >>> from types import SimpleNamespace
    >>> words = SimpleNamespace(unspaced=lambda token: token, is_word=lambda token: True)
    >>> rewrites = Rewrites(words, Table())
    >>> text = [7, 1, 2, 8, 9, 7, 1, 2]  # becomes 7 5 8 9 7 ...
    >>> rewrites.leave(text, 1)
    >>> [rewrites.push(token) for token in (5, 8, 9)]
    [None, None, 5]
    >>> rewrites.at(text, 6)
    Rewrite(skipped=2, written=[5], unspaced=None, wrong=0)
    """

    def __init__(self, words: Words, shared: Table) -> None:
        self._words = words
        self._own, self._shared = Table(), shared
        self._left: Departure | None = None

    @property
    def waiting(self) -> bool:
        """Whether a text was left a moment ago."""
        return self._left is not None

    def leave(self, text: Sequence[int], place: int, since: Sequence[int] = ()) -> None:
        """What came was ``text[:place]`` and ``since``, and what comes next is not in ``text`` then."""
        near: dict[int, list[int]] = {}
        for at in range(place, min(place + WINDOW, len(text) - 1)):
            for token in {text[at], self._words.unspaced(text[at])}:
                near.setdefault(token, []).append(at)
        self._left = Departure(text, place, list(since), near)

    def push(self, token: int) -> int | None:
        """A token has come. Returns the place in the text from which the answer follows it again, if it does."""
        left = self._left
        if left is None:
            return None
        since = left.since
        since.append(token)
        if len(since) > WINDOW:
            self._left = None
        if len(since) < _CONFIRMED:
            return None
        first, text, words = since[-2], left.text, self._words
        for place in left.near.get(first, ()):
            same = text[place + 1] == token
            if same or (words.is_word(first) and not words.is_word(token) and not words.is_word(text[place + 1])):
                written = since[:-2]
                if written or place > left.place:
                    unspaced = None if text[place] == first else words.unspaced
                    self._learn(text, left.place, Rewrite(place - left.place, written, unspaced))
                if same:
                    self._left = None
                    return place + 2
                self.leave(text, place + 1, [token])
                return None
        return None

    def _learn(self, text: Sequence[int], place: int, rewrite: Rewrite) -> None:
        key = _key(text, place, rewrite.skipped)
        self._own.learn(key, rewrite)
        if rewrite.skipped > 1:
            self._shared.learn(key, replace(rewrite))

    def at(self, text: Sequence[int], place: int) -> Rewrite | None:
        """What is likely to become of the text at ``place``, if it was rewritten before."""
        pair = _key(text, place, 2)
        for found in (
            self._own.get(pair),
            self._own.get(_key(text, place, 1)),
            self._own.get(_key(text, place, 0)),
            self._shared.get(pair),
        ):
            if found is not None and found.wrong <= 0:
                return found
        return None

    def __bool__(self) -> bool:
        return bool(self._own) or bool(self._shared)

    @property
    def nbytes(self) -> int:
        """Bytes of this answer's own, roughly."""
        return self._own.nbytes


def _key(text: Sequence[int], place: int, skipped: int) -> Key:
    """Under which a rewrite at ``place`` is found: lengths differ, so no two kinds meet."""
    if skipped >= 2:
        return (2, *text[place : place + 2])
    return (skipped, text[place] if skipped else text[place - 1])
