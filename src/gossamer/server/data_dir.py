"""The directory of files and batches: one server at a time has it."""

from __future__ import annotations

import asyncio
import logging
import os
import weakref
from pathlib import Path

from gossamer.errors import ConfigurationError
from gossamer.locks import try_lock
from gossamer.server.files import private_directory

logger = logging.getLogger("gossamer.server")
WAIT_SECONDS = 0.2  # until a server that is ending is looked at again
_SIZE = 64  # bytes of what the holder says of itself


class DataDirectory:
    """A directory, held by this process from :meth:`acquire` until it ends, or :meth:`release`.

    Args:
        path: made if it is missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None

    async def acquire(self) -> None:
        """Hold the directory; behind a server that is draining, once it has ended.

        Raises:
            ConfigurationError: another server has it, or it cannot be made or written.
        """
        try:
            if not self.path.is_dir():  # the mode of one that is there is its owner's choice
                private_directory(self.path)
            file = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigurationError(f"cannot keep files in {self.path}: {error.strerror}") from None
        closer = weakref.finalize(self, os.close, file)
        told = False
        while not try_lock(file):
            holder = os.pread(file, _SIZE, 0).decode(errors="replace").strip()
            if not holder.endswith("draining"):
                closer()
                raise ConfigurationError(
                    f"{self.path} is in use by another server ({holder or 'which has just started'}); stop that one, "
                    "or give this one a --data-dir of its own"
                )
            if not told:
                logger.info("waiting for the server before this one to end: %s, in %s", holder, self.path)
                told = True
            await asyncio.sleep(WAIT_SECONDS)
        self._file, self._closer = file, closer
        self._say("serving")

    def drain(self) -> None:
        """Tell a server that is started on this directory that it will be free soon."""
        if self._file is not None:
            self._say("draining")

    def release(self) -> None:
        """Let another server have it."""
        if self._file is not None:
            self._closer()
            self._file = None

    def _say(self, what: str) -> None:
        assert self._file is not None
        os.pwrite(self._file, f"process {os.getpid()}, {what}".ljust(_SIZE).encode(), 0)
