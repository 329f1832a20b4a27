"""A directory of prefix files, of bounded size: the least recently used ones are removed for others.

Several processes, of one model or of several, may have the same directory. None holds a lock on it: a file appears
whole, by being renamed; has a name that follows from what it holds; is never changed; and may be gone at any time.
"""

from __future__ import annotations

import io
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from gossamer.errors import ConfigurationError
from gossamer.locks import try_lock

_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.safetensors")
_UNFINISHED = re.compile(r"\.prefix-\w+\.unfinished")


class PrefixDirectory:
    """See the module's documentation. What does not have the name of a prefix file is left alone.

    Args:
        path: made, for its owner alone, if it is missing.
        max_bytes: of all prefix files together.

    Raises:
        ConfigurationError: it cannot be made or listed.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove_unfinished()
        except OSError as error:
            raise ConfigurationError(f"cannot keep prefixes in {path}: {error.strerror}") from None

    def names(self) -> Iterator[str]:
        """Of the prefix files that are there."""
        return (each.name for each in self._files(_NAME))

    def open(self, name: str) -> io.FileIO:
        """A file, for reading.

        Raises:
            OSError: it is gone, or cannot be read.
        """
        return io.FileIO(self.path / name)

    def touch(self, name: str) -> None:
        """Note that a file is used, by a clock finer than a file system's, whose ticks uses may share."""
        with suppress(OSError):  # it is gone, or another user's: then it is as old as it is
            os.utime(self.path / name, ns=(now := time.time_ns(), now))

    def create(self, name: str, size: int, write: Callable[[io.FileIO], None]) -> list[str]:
        """Write a file, whole or not at all. Returns the names of those that were removed for it.

        It need not reach the disk before it has its name: a power failure may leave a damaged file, as anything may,
        and readers find that by its checksum.

        Raises:
            OSError: the disk is full or gone, or may not be written.
        """
        removed = self._make_room(size)
        number, unfinished = tempfile.mkstemp(prefix=".prefix-", suffix=".unfinished", dir=self.path)
        with io.FileIO(number, "w") as file:
            try:
                try_lock(number)  # says that it is being written, to whoever finds it
                write(file)
                os.replace(unfinished, self.path / name)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished)
                raise
        self.touch(name)
        return removed

    def _make_room(self, size: int) -> list[str]:
        """Remove what was not used for longest until ``size`` bytes more would fit."""
        there: list[tuple[int, int, str]] = []
        for each in self._files(_NAME):
            with suppress(OSError):  # another process has removed it
                about = each.stat()
                there.append((about.st_mtime_ns, about.st_size, each.name))
        total = sum(bytes for _, bytes, _ in there) + size
        removed = []
        for _, bytes, name in sorted(there):
            if total <= self.max_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(self.path / name)
            removed.append(name)
            total -= bytes
        return removed

    def _remove_unfinished(self) -> None:
        """Files that a process had begun when it was ended. One that is being written is locked."""
        for each in list(self._files(_UNFINISHED)):
            with suppress(OSError), open(each.path, "rb") as file:
                if try_lock(file.fileno(), otherwise=False):
                    os.unlink(each.path)

    def _files(self, name: re.Pattern[str]) -> Iterator[os.DirEntry[str]]:
        with os.scandir(self.path) as entries:
            yield from (each for each in entries if name.fullmatch(each.name) and each.is_file(follow_symlinks=False))
