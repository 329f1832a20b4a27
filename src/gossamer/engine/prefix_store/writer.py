"""The thread that writes prefix files, so that no step waits for a disk."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass

from gossamer.engine.prefix_store.directory import PrefixDirectory
from gossamer.engine.prefix_store.format import Piece
from gossamer.engine.prefix_store.index import Entry
from gossamer.engine.prefix_store.partition import Partition, Partitions

logger = logging.getLogger("gossamer.prefixes")
QUEUED_BYTES = 256 << 20  # that may wait to be written; keys and values of evicted nodes stay in memory so long
PAUSE = 60.0  # seconds without writing, after the disk has refused
_NICENESS = 19  # the engine's threads go first


@dataclass
class StoreStats:
    """Counters since the store was made.

    Attributes:
        restored_tokens: whose keys and values were read instead of computed.
        read_files, written_files: how many.
        written_bytes: of those files.
        write_failures: files that could not be written.
        skipped_files: not written, because too much was waiting already.
        unusable_files: damaged ones, and those of other models.
    """

    restored_tokens: int = 0
    read_files: int = 0
    written_files: int = 0
    written_bytes: int = 0
    write_failures: int = 0
    skipped_files: int = 0
    unusable_files: int = 0

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Job:
    """A file to write: its entry, which is in the partition's index already, its size in bytes, and what is in it."""

    partition: Partition
    entry: Entry
    size: int
    pieces: Sequence[Piece]


class PrefixWriter:
    """Writes one file after the other. The thread starts with the first, and ends with :meth:`close`."""

    def __init__(self, directory: PrefixDirectory, partitions: Partitions, stats: StoreStats) -> None:
        self._directory, self._partitions, self._stats = directory, partitions, stats
        self._jobs: deque[Job] = deque()
        self._bytes = 0  # of the jobs that wait or are being written
        self._changed = threading.Condition()
        self._closing = False
        self._refused_at: float | None = None
        self._thread: threading.Thread | None = None

    def put(self, job: Job, *, pinned: bool) -> bool:
        """Queue a file, unless too much waits already; what is pinned is in memory in any case, and is always taken."""
        with self._changed:
            full = not pinned and bool(self._bytes) and self._bytes + job.size > QUEUED_BYTES
            paused = self._refused_at is not None and time.monotonic() < self._refused_at + PAUSE
            if self._closing or paused or full:
                self._stats.skipped_files += full
                return False
            job.partition.index.add(job.entry)
            self._jobs.append(job)
            self._bytes += job.size
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prefixes", daemon=True)
                self._thread.start()
        return True

    def wait(self, timeout: float) -> bool:
        """Until all is written. False if that takes longer than ``timeout`` seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._bytes, timeout)

    def close(self, timeout: float) -> None:
        """Take nothing more, and give what waits ``timeout`` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if not self.wait(timeout):
            with self._changed:
                self._jobs.clear()

    def _run(self) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own
            with suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
            self._write(job)
            with self._changed:
                self._bytes -= job.size
                self._changed.notify_all()

    def _write(self, job: Job) -> None:
        entry, format = job.entry, job.partition.format
        try:
            removed = self._directory.create(
                entry.name, job.size, lambda file: format.write(file, entry.start, entry.tokens, job.pieces)
            )
        except OSError as error:
            job.partition.index.discard([entry.name])
            self._stats.write_failures += 1
            self._refused_at = time.monotonic()
            where = self._directory.path
            logger.warning("cannot write a prefix into %s: %s; the next try is in %g s", where, error.strerror, PAUSE)
            return
        self._partitions.discard(removed)
        entry.written = True
        self._stats.written_files += 1
        self._stats.written_bytes += job.size
