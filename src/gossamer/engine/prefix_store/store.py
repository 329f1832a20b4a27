"""Takes prefixes from the tree to the disk and back.

Written is what is pinned, and what :data:`HOT_USES` requests have begun with, once one of them has ended well: so
nothing is written twice, nothing of a failed request is written, and what was written is there however the process
ends. Keys and values of a complete node never change, so the writer gets the tensors themselves, and nothing is copied.

Read is what a prompt can use, before the prompt enters the tree. Reading is so much faster than computing that the
step waits for it.

Prompts with an adapter are left out, and so are those with a salt, unless its digest is named: what was computed for
them never leaves memory.
"""

from __future__ import annotations

import logging
import math
import time
import weakref
from collections.abc import Collection, Sequence
from pathlib import Path

from gossamer.engine.prefix_store.directory import PrefixDirectory
from gossamer.engine.prefix_store.format import ForeignFileError, Piece, PrefixFormat, pack
from gossamer.engine.prefix_store.index import LEAST_TOKENS, Entry
from gossamer.engine.prefix_store.partition import Partition, Partitions
from gossamer.engine.prefix_store.writer import Job, PrefixWriter, StoreStats
from gossamer.engine.tree import Node, PrefixTree, TreeSalt
from gossamer.errors import CheckpointError

logger = logging.getLogger("gossamer.prefixes")
HOT_USES = 2  # requests that begin with a prefix, from which on it is written
CLOSE_SECONDS = 5.0  # to write what waits, at the end
_TOUCH_SECONDS = 60.0  # between two notes to the file system that a file is used
_MOST_IDLE = 16  # tokens that are read for each that is used; so many are read in the time of computing one


class PrefixStore:
    """The files of one tree's prefixes. Its methods are called between steps, like those of the tree.

    Args:
        path: the directory.
        max_bytes: of its prefix files.
        tree: where keys and values are.
        model: a digest of all that decides about keys and values.
        vocab_size: token ids are below it.
        salts: digests of those whose prefixes are kept, see :class:`Partitions`.

    Attributes:
        stats: what it did.

    Raises:
        ConfigurationError: the directory cannot be made or listed.
    """

    def __init__(
        self,
        path: Path,
        max_bytes: int,
        tree: PrefixTree,
        *,
        model: str,
        vocab_size: int,
        salts: Collection[str] = (),
    ) -> None:
        self.stats = StoreStats()
        self._tree = tree
        self._directory = PrefixDirectory(path, max_bytes)
        self._partitions = Partitions(PrefixFormat(tree.layout, model, vocab_size), salts)
        self._writer = PrefixWriter(self._directory, self._partitions, self.stats)
        self.close = weakref.finalize(self, self._writer.close, CLOSE_SECONDS)  # also at the end of the process
        self._find_files()

    def __len__(self) -> int:
        """Files of this model."""
        return sum(len(each.index) for each in self._partitions)

    def wait(self, timeout: float) -> bool:
        """Until all is written. False if that takes longer than ``timeout`` seconds."""
        return self._writer.wait(timeout)

    def _find_files(self) -> None:
        foreign = 0
        for name in self._directory.names():
            partition = next((each for each in self._partitions if each.format.owns(name)), None)
            try:
                if partition is None:
                    raise ForeignFileError("it is of another model")
                with self._directory.open(name) as file:
                    start, tokens = partition.format.read_tokens(file)
                if name != partition.format.name(start, tokens):
                    raise CheckpointError("its name is that of other tokens")
            except ForeignFileError:
                foreign += 1
            except (CheckpointError, OSError) as error:
                self._ignore(name, error)
            else:
                partition.index.add(Entry(name, start, tokens, touched=-math.inf))
        if foreign:
            self.stats.unusable_files += foreign
            logger.info("%d prefix files of other models in %s are not used", foreign, self._directory.path)

    def _ignore(self, name: str, error: Exception) -> None:
        self._partitions.discard([name])
        if not isinstance(error, FileNotFoundError):  # another process has removed it for others
            self.stats.unusable_files += 1
            logger.warning("the prefix file %s is not used: %s", self._directory.path / name, error)

    # --- from disk ---------------------------------------------------------------------------------------------

    def restore(self, tokens: Sequence[int], salt: TreeSalt) -> None:
        """Read what the disk has of a prompt's beginning and the tree has not, if there is memory for it."""
        partition = self._partitions.of(salt)
        if partition is None or not len(partition.index):
            return
        matched, prompt = self._tree.match(tokens, salt), pack(tokens)
        chain = partition.index.chain(prompt, matched, written=True)
        while chain and _idle(*chain[-1], chain[-2][1] if len(chain) > 1 else matched):
            chain.pop()
        if not chain or chain[-1][1] - matched < LEAST_TOKENS:
            return
        for entry, end in chain:
            if not self._restore(partition.format, entry, tokens[:end], salt):
                return

    def _restore(self, format: PrefixFormat, entry: Entry, tokens: Sequence[int], salt: TreeSalt) -> bool:
        """Fill the nodes of ``tokens`` that are missing from a file. False, and nothing changed, if that cannot be."""
        tree = self._tree
        leaf = tree.insert(tokens, salt)
        tree.lock(leaf)
        missing = [node for node in leaf.path() if not node.complete]
        # What others compute right now is left to them.
        idle = all(node.keys is None and node.refs == 1 for node in missing)
        done = idle and all(tree.allocate(node) for node in missing) and self._read(format, entry, missing)
        if done:
            for node in missing:
                node.computed = len(node)
            self.stats.read_files += 1
            self.stats.restored_tokens += sum(map(len, missing))
            self._touch(entry)
        tree.unlock(leaf)  # drops what is not computed
        return done

    def _read(self, format: PrefixFormat, entry: Entry, nodes: list[Node]) -> bool:
        pieces = [_piece(node, 0, len(node)) for node in nodes]
        try:
            with self._directory.open(entry.name) as file:
                format.read(file, entry.start, entry.tokens, nodes[0].start, pieces)
        except (CheckpointError, OSError) as error:
            self._ignore(entry.name, error)
            return False
        return True

    # --- to disk -----------------------------------------------------------------------------------------------

    def pin(self, tokens: list[int], salt: TreeSalt) -> None:
        """Write these once they are computed, however often they are used."""
        partition = self._partitions.of(salt)
        if partition is not None:
            partition.pins.append(tokens)

    def unpin(self, tokens: list[int], salt: TreeSalt) -> None:
        """They need not be written any more. What is written stays, like any other file."""
        partition = self._partitions.of(salt)
        if partition is not None and tokens in partition.pins:
            partition.pins.remove(tokens)

    def keep(self, tokens: list[int], salt: TreeSalt) -> None:
        """A request with this prompt has ended well: write what is worth it of what it shares with others."""
        partition = self._partitions.of(salt)
        if partition is None:
            return
        hot = 0
        for node in self._tree.computed_path(tokens, salt):
            node.uses += 1
            hot = node.end if node.uses >= HOT_USES else hot
        self._write(partition, tokens[:hot], salt, pinned=False)
        partition.pins = [each for each in partition.pins if not self._write(partition, each, salt, pinned=True)]

    def _write(self, partition: Partition, tokens: list[int], salt: TreeSalt, *, pinned: bool) -> bool:
        """Queue what no file has of ``tokens``. False if it should be tried again."""
        prompt = pack(tokens)
        chain = partition.index.chain(prompt)
        for entry, _ in chain:
            if time.monotonic() > entry.touched + _TOUCH_SECONDS:
                self._touch(entry)
        start = chain[-1][1] if chain else 0
        if len(tokens) - start < LEAST_TOKENS:
            return True
        path = self._tree.computed_path(tokens, salt)
        if not path or path[-1].end < len(tokens):
            return False
        size = partition.format.size(start, len(tokens))
        if size > self._directory.max_bytes:
            if pinned:
                logger.warning("a pinned prefix of %d tokens is not written: %d bytes", len(tokens), size)
            return True
        pieces = [_piece(node, max(start - node.start, 0), len(node)) for node in path if node.end > start]
        entry = Entry(partition.format.name(start, prompt), start, prompt, written=False)
        return self._writer.put(Job(partition, entry, size, pieces), pinned=pinned)

    def _touch(self, entry: Entry) -> None:
        entry.touched = time.monotonic()
        self._directory.touch(entry.name)


def _piece(node: Node, first: int, last: int) -> Piece:
    assert node.keys is not None and node.values is not None
    # The tree replaces tensors in the lists of a node that is split or joined; the tensors stay as they are.
    return Piece(list(node.keys), list(node.values), slice(first, last))


def _idle(entry: Entry, end: int, start: int) -> bool:
    """Whether too little of a file would be used, from ``start`` to ``end``, for all that has to be read of it."""
    return (end - start) * _MOST_IDLE < entry.end - entry.start
