"""The texts that drafts are taken from, and where a sequence stands in one of them."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from gossamer.engine.speculation.matches import Chains
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
    """``text[place:]`` is likely to come next: ``length`` tokens before it are those that came last."""

    source: Source
    text: Sequence[int]
    place: int
    length: int

    def take(self, count: int) -> list[int]:
        """The next ``count`` tokens at most. A text that repeats its own end goes on to do so."""
        taken = list(self.text[self.place : self.place + count])
        period = len(self.text) - self.place
        while self.source is Source.OWN and 0 < period <= len(taken) < count:
            taken.append(taken[-period])
        return taken


class Tenant:
    """What those of one salt may use of each other: how likely drafts are right, and answers that have ended."""

    def __init__(self) -> None:
        self.survival = Survival()
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
        prediction: what its request predicts, and the place in it where the next token is ``expected``.
        next: what may come next, if that stands anywhere.
        accepted, rejected: tokens of the prediction that were verified, and right or not.
    """

    own: Chains
    tenant: Tenant
    number: int
    prediction: Text | None = None
    expected: int = 0
    next: Continuation | None = None
    deviation: Deviation = field(default_factory=Deviation)
    accepted: int = 0
    rejected: int = 0


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
        """Bytes of the answers."""
        return sum(text.nbytes for tenant in self._tenants.values() for text in tenant.finished())
