"""Who may write: of several processes on several machines, the one that came last.

A lock on a file is not enough: it ends with the process on one machine, and on others nobody may see it. A machine that
was taken for lost may also be alive, and its actor (a zombie) go on beside its successor. So ownership is a sequence of
files ``NAME.1``, ``NAME.2`` ..., each made exclusively (``O_EXCL``, which holds over NFS too). Who made the last one
owns; everybody else finds the next file there before it writes another line, and stops. A line that slips through
between the look and the write goes into the file of the zombie's own number, which nobody reads any more.

Whether an owner is dead is asked only where two commands may meet by mistake, for :class:`Run`.
"""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Self

from gossamer.errors import ConfigurationError, OutputError
from gossamer.locks import try_lock

#: Seconds between two signs of life of a run, and after how many without one it counts as dead.
BEAT, EXPIRY = 3.0, 15.0


class OwnershipLost(OutputError):
    """Another process has taken over what this one was writing."""


class Claim:
    """The right to write something.

    Args:
        directory: where the files are.
        name: of what is owned.
        above: a claim on the whole that this is a part of: who has lost that has lost this.

    Attributes:
        number: counts owners, from 1.
        owner: who this is, for people.

    Raises:
        OwnershipLost: ``above`` was lost.
        OutputError: the file cannot be made.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> first = Claim(directory, "part")
    >>> first.check()
    >>> second = Claim(directory, "part")
    >>> first.check()
    Traceback (most recent call last):
    gossamer.distributed.batch.ownership.OwnershipLost: ... part was taken over by another process (number 2); ...
    """

    def __init__(self, directory: Path, name: str, *, above: Claim | SeenClaim | None = None) -> None:
        self._path, self._name, self._above = directory, name, above
        self.owner = {"host": socket.gethostname(), "pid": os.getpid(), "run": above.number if above else None}
        if above is not None:
            above.check()
        self.number: int = latest(directory, name)
        while True:
            self.number += 1
            try:
                self._file = os.open(self._at(self.number), os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
                break
            except FileExistsError:
                continue
            except OSError as error:
                raise OutputError(f"cannot write {self._at(self.number)}: {error.strerror}") from error
        self._say(self.owner)

    def _at(self, number: int) -> Path:
        return self._path / f"{self._name}.{number}"

    def _say(self, what: dict[str, object]) -> None:
        try:
            os.pwrite(self._file, json.dumps(what).encode().ljust(200), 0)
        except OSError as error:
            raise OutputError(f"cannot write {self._at(self.number)}: {error.strerror}") from error

    def check(self) -> None:
        """Raises: OwnershipLost: there is another owner now."""
        if self._above is not None:
            self._above.check()
        if os.path.exists(self._at(self.number + 1)) or not os.path.exists(self._at(self.number)):
            raise OwnershipLost(
                f"{self._path}: {self._name} was taken over by another process (number {self.number + 1}); this one, "
                f"number {self.number}, writes no more"
            )

    def close(self) -> None:
        """End it; the file stays, for those who count."""
        os.close(self._file)


class SeenClaim:
    """A claim of another process, which can be checked from here."""

    def __init__(self, directory: Path, name: str, number: int) -> None:
        self.number = number
        self._next, self._own = directory / f"{name}.{number + 1}", directory / f"{name}.{number}"

    def check(self) -> None:
        """Raises: OwnershipLost: that process does not own it any more."""
        if os.path.exists(self._next) or not os.path.exists(self._own):
            raise OwnershipLost(f"run {self.number} of this job has ended: another one has begun ({self._next})")


def latest(directory: Path, name: str) -> int:
    """The number of the last owner; 0 if there was none."""
    number = 0
    while os.path.exists(directory / f"{name}.{number + 1}"):
        number += 1
    return number


class Run(Claim):
    """The right to lead a job: one command at a time.

    The owner holds a lock on its file, and writes to it every :data:`BEAT` seconds (:meth:`beat`). Where the lock is
    seen, a second command is refused, or follows a dead one, at once; from another machine it watches the file for
    :data:`EXPIRY` seconds, so that no two clocks are compared.

    Raises:
        ConfigurationError: another command leads the job.
    """

    def __init__(self, directory: Path) -> None:
        last = latest(directory, "run")
        if last:
            _check_ended(directory / f"run.{last}")
        super().__init__(directory, "run")
        try_lock(self._file)

    def beat(self) -> None:
        """Show that this process lives.

        Raises:
            OwnershipLost, OutputError
        """
        self.check()
        self._say(self.owner | {"beat": time.time()})

    def close(self) -> None:
        self._say(self.owner | {"ended": True})
        super().close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            self.close()
        except OutputError:  # a full disk: the next command waits for the expiry instead
            super().close()


def _check_ended(path: Path) -> None:
    file = os.open(path, os.O_RDWR)
    try:
        before = os.pread(file, 400, 0)
        owner = _read(before)
        if owner.get("ended"):
            return
        here = owner.get("host") == socket.gethostname()
        if not try_lock(file):
            raise _busy(path, owner)
        if here:
            return  # its process has ended, and the lock with it
        deadline = time.monotonic() + EXPIRY
        while time.monotonic() < deadline:
            time.sleep(BEAT / 3)
            with path.open("rb") as again:  # opened anew, which NFS takes as a reason to ask the server
                if again.read(400) != before:
                    raise _busy(path, owner)
    finally:
        os.close(file)


def _read(content: bytes) -> dict[str, object]:
    try:
        return dict(json.loads(content))
    except ValueError:  # its process died while it wrote
        return {}


def _busy(path: Path, owner: dict[str, object]) -> ConfigurationError:
    return ConfigurationError(
        f"{path.parent} is being worked on by another command, on {owner.get('host')} with process id "
        f"{owner.get('pid')}; wait for it to end, or stop it"
    )
