"""Prefixes on disk that may go on from each other: those of prompts without a salt, or those of one salt."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from gossamer.engine.prefix_store.format import PrefixFormat
from gossamer.engine.prefix_store.index import PrefixIndex
from gossamer.engine.tree import TreeSalt


@dataclass
class Partition:
    """Files that belong together. The files of each partition have a header of their own, and so have their names.

    Attributes:
        format: of the files.
        index: the files.
        pins: tokens of pinned prefixes that are not on their way to the disk yet.
    """

    format: PrefixFormat
    index: PrefixIndex = field(default_factory=PrefixIndex)
    pins: list[list[int]] = field(default_factory=list)


class Partitions:
    """The partitions of a directory, by salt.

    A salt stands in no file. What stands there in place of the model's digest is a digest of that and of the salt's, so
    that to whoever does not know the salt's digest, its files are those of some other model.

    Args:
        format: of prefixes without a salt.
        digests: SHA-256 of the salts whose prefixes may be written, in lower-case hexadecimal digits.
    """

    def __init__(self, format: PrefixFormat, digests: Collection[str]) -> None:
        self._open = Partition(format)
        self._salted = {each: Partition(replace(format, model=_model_of(format.model, each))) for each in digests}

    def of(self, salt: TreeSalt) -> Partition | None:
        """Where the prefixes of a salt belong; ``None`` for those that stay in memory, as those of adapters do."""
        if salt is None:
            return self._open
        if not self._salted or not isinstance(salt, str):
            return None
        return self._salted.get(hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest())

    def __iter__(self) -> Iterator[Partition]:
        yield self._open
        yield from self._salted.values()

    def discard(self, names: Iterable[str]) -> None:
        """Forget files, whichever partition they are in."""
        names = list(names)
        for each in self:
            each.index.discard(names)


def _model_of(model: str, salt_digest: str) -> str:
    return hashlib.sha256(f"{model} {salt_digest}".encode()).hexdigest()
