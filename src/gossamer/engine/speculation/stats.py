"""What drafts brought."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from gossamer.engine.speculation.survival import Source


@dataclass
class SpeculationStats:
    """Counters since the engine was made, or since they were reset.

    Attributes:
        drafts: rows of a sequence's next token that had a draft behind them.
        draft_tokens, accepted_tokens: verified, and found right; by source.
        per_position: accepted tokens by their place in the draft.
        lookup_seconds: time spent on finding drafts and choosing among them.
        index_bytes: of all that drafts are looked up in, when it was last counted.
    """

    drafts: int = 0
    draft_tokens: Counter[Source] = field(default_factory=Counter)
    accepted_tokens: Counter[Source] = field(default_factory=Counter)
    per_position: list[int] = field(default_factory=list)
    lookup_seconds: float = 0.0
    index_bytes: int = 0

    def count(self, source: Source, drafted: int, accepted: int) -> None:
        """A draft was verified."""
        self.drafts += 1
        self.draft_tokens[source] += drafted
        self.accepted_tokens[source] += accepted
        self.per_position += [0] * (accepted - len(self.per_position))
        for place in range(accepted):
            self.per_position[place] += 1

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and dictionaries, for JSON."""
        return {
            "drafts": self.drafts,
            "draft_tokens": self.draft_tokens.total(),
            "accepted_tokens": self.accepted_tokens.total(),
            "by_source": {
                source.label: {
                    "draft_tokens": self.draft_tokens[source],
                    "accepted_tokens": self.accepted_tokens[source],
                }
                for source in Source
                if self.draft_tokens[source]
            },
            "per_position": list(self.per_position),
            "index_bytes": self.index_bytes,
            "lookup_seconds": self.lookup_seconds,
        }
