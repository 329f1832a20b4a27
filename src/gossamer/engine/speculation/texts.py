"""The texts that drafts are taken from, and where a sequence stands in one of them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from gossamer.engine.speculation.matches import LEAST, Chains
from gossamer.engine.speculation.rewrites import Rewrite, Rewrites, Table
from gossamer.engine.speculation.survival import Deviation, Source, Survival
from gossamer.engine.tree import TreeSalt

FINISHED_TOKENS = 1 << 21  # of answers that have ended, at 16 bytes each
MOST_SALTS = 1024


class Text:
    """Tokens with their chains, 16 bytes each."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self.tokens = array("i", tokens)
        self.chains = Chains()
        self.chains.note(self.tokens, len(self.tokens))

    def extend(self, tokens: Sequence[int]) -> None:
        """Go on with ``tokens``."""
        self.tokens.extend(tokens)
        self.chains.note(self.tokens, len(self.tokens))

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens and the chains."""
        return self.tokens.itemsize * len(self.tokens) + self.chains.nbytes


@dataclass(slots=True)
class Continuation:
    """``text[place:]`` is likely to come next: ``length`` tokens before it are those that came last.

    With ``rewrites``, what is likely to come is what the answer would make of the text.
    """

    source: Source
    text: Sequence[int]
    place: int
    length: int
    rewrites: Rewrites | None = None
    followed: int = 0  # tokens that came as it said
    rewrite: Rewrite | None = None  # that the last token was written by
    origin: int = 0  # the place of what it rewrites
    written: list[int] = field(default_factory=list)  # what is left of it, before text[place]
    gone: list[int] = field(default_factory=list)  # what came of it

    def take(self, count: int) -> list[int]:
        """The next ``count`` tokens at most. A text that repeats its own end goes on to do so."""
        if self.rewrites:
            ahead = replace(self, written=list(self.written), gone=[])
            return [token for token in (ahead.pop() for _ in range(count)) if token is not None]
        taken = list(self.text[self.place : self.place + count])
        period = len(self.text) - self.place
        while self.source is Source.OWN and 0 < period <= len(taken) < count:
            taken.append(taken[-period])
        return taken

    def pop(self) -> int | None:
        """The next token, if the text has one; what is next afterwards is what comes behind it."""
        known, was_written = len(self.text), self.rewrite is not None and not self.written
        if self.written:
            self.gone.append(self.written.pop(0))
            return self.gone[-1]
        self.rewrite = found = None
        if self.rewrites and not was_written and 0 < self.place < known:
            found = self.rewrites.at(self.text, self.place)
        if found is not None:
            self.rewrite, self.origin = found, self.place
            self.place = min(self.place + found.skipped, known)
            self.written, self.gone = list(found.written), []
            if found.unspaced is not None and self.place < known:
                self.written.append(found.unspaced(self.text[self.place]))
                self.place += 1
            if self.written:
                return self.pop()
        if self.place >= known:
            return None
        self.place += 1
        return self.text[self.place - 1]

    def right(self) -> None:
        """The token that :meth:`pop` gave has come."""
        self.length += 1
        self.followed += 1
        if self.rewrite is not None and not self.written:
            self.rewrite.wrong = max(self.rewrite.wrong - 1, -2)


class Tenant:
    """What those of one salt may use of each other: how likely drafts are right, and answers that have ended."""

    def __init__(self) -> None:
        self.survival = Survival()
        self.rewrites = Table()
        self.recent = Text()
        self.earlier: Text | None = None

    def finished(self) -> Iterator[Text]:
        """The answers that have ended, the newest first."""
        yield self.recent
        if self.earlier is not None:
            yield self.earlier


@dataclass(slots=True, eq=False)
class Position:
    """Where a sequence stands.

    Attributes:
        own: the chains of its own tokens: its output, and what of the prompt nobody shares.
        tenant: whoever may use of each other what they say.
        number: tells sequences apart that are not looked up for in the same step.
        answer: the place among its tokens at which the answer begins.
        rewrites: what the answer makes of what it follows.
        left: what it left, and has not come back to.
        prediction: what its request predicts, and the place in it where the next token is ``expected``.
        next: what may come next, if that stands anywhere.
        accepted, rejected: tokens of the prediction that were verified, and right or not.
    """

    own: Chains
    tenant: Tenant
    number: int
    answer: int
    rewrites: Rewrites
    left: Continuation | None = None
    prediction: Text | None = None
    expected: int = 0
    next: Continuation | None = None
    deviation: Deviation = field(default_factory=Deviation)
    accepted: int = 0
    rejected: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of what it is looked up in for its own."""
        return self.own.nbytes + self.rewrites.nbytes + (self.prediction.nbytes if self.prediction else 0)

    def continuation(self, source: Source, text: Sequence[int], place: int, length: int) -> Continuation:
        """``text[place:]``, or what the answer makes of it if it is no answer itself."""
        given = source in (Source.PREDICTION, Source.PREFIX) or (source is Source.OWN and place < self.answer)
        return Continuation(source, text, place, length, self.rewrites if given else None)

    def leave(self, found: Continuation, token: int) -> Continuation | None:
        """``token`` has come instead of what ``found`` gave; what may come next nevertheless."""
        if found.rewrite is not None:
            found.rewrite.wrong += 1
            if found.text[found.origin] == token and len(found.gone) <= 1:  # it is as it was in the text, this time
                return self.continuation(found.source, found.text, found.origin + 1, 0)
            self.left = found
            self.rewrites.leave(found.text, found.origin, found.gone[:-1])
            return None
        found.place -= 1
        if found.rewrites is not None and found.followed >= (LEAST if self.rewrites.waiting else 0):
            self.left = found
            self.rewrites.leave(found.text, found.place)
        return None

    def come_back(self, token: int) -> None:
        """``token`` has come: it may show what became of the text that was left."""
        place = self.rewrites.push(token)
        if place is not None and self.left is not None and (self.next is None or self.next.rewrites is None):
            self.next = self.continuation(self.left.source, self.left.text, place, LEAST)


class Tenants:
    """By salt. Bounded: the salt not used for longest goes first, and of all answers the older half."""

    def __init__(self, tokens: int = FINISHED_TOKENS) -> None:
        self._tenants: OrderedDict[TreeSalt, Tenant] = OrderedDict()
        self._most, self._recent = tokens // 2, 0

    def of(self, salt: TreeSalt) -> Tenant:
        """Those of ``salt``, who were used last now."""
        tenant = self._tenants.get(salt)
        if tenant is None:
            tenant = self._tenants[salt] = Tenant()
            if len(self._tenants) > MOST_SALTS:
                self._tenants.popitem(last=False)
        self._tenants.move_to_end(salt)
        return tenant

    def keep(self, salt: TreeSalt, answer: Sequence[int]) -> None:
        """An answer has ended."""
        answer = answer[-self._most :]
        if self._recent + len(answer) > self._most:
            for tenant in self._tenants.values():
                tenant.earlier, tenant.recent = tenant.recent, Text()
            self._recent = 0
        self.of(salt).recent.extend(answer)
        self._recent += len(answer)

    @property
    def nbytes(self) -> int:
        """Bytes of the answers, and of what they made of other texts."""
        tenants = self._tenants.values()
        return sum(sum(text.nbytes for text in tenant.finished()) + tenant.rewrites.nbytes for tenant in tenants)
