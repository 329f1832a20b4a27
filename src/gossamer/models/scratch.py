"""Files and directories that are built aside and appear when they are complete, whatever interrupts that.

A build has a hidden directory beside its target, ``.NAME.*.tmp``, and holds it by a lock. A process that is killed lets
go of its lock, so the next build of the same target knows what nobody works on any more, and removes it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from gossamer.errors import GossamerError
from gossamer.locks import held, try_lock

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # <fcntl.h> and <linux/fs.h>
_RUST_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextmanager
def scratch_directory(target: Path) -> Iterator[Path]:
    """An empty directory on the file system of ``target``, for the body; what killed builds of it left is removed.

    Raises:
        OSError: it cannot be made.
    """
    with held(target.parent):  # so that a directory is not taken for a leftover before it is held
        _sweep(target)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
        hold = _open_directory(scratch)
        if hold is not None:
            try_lock(hold)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if hold is not None:
            os.close(hold)


def remove_leftovers(target: Path) -> None:
    """Remove the scratch directories of builds of ``target`` that have ended without doing so."""
    if any(_scratches(target)):
        with held(target.parent):
            _sweep(target)


def put_in_place(built: Path, target: Path) -> None:
    """Move what was built to ``target``; what was there is at ``built`` then, and never is there nothing.

    On file systems that cannot exchange two directories, there is for a moment.

    Raises:
        OSError: it cannot be moved; then ``target`` is what it was.
    """
    if not target.is_dir():
        os.replace(built, target)
    elif not _exchange(built, target):
        aside = built.with_name(f"{built.name}.replaced")
        target.rename(aside)
        try:
            built.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        aside.rename(built)


def os_error_in(error: Exception) -> OSError | None:
    """The error of the system that ``error`` is, or that a library written in Rust tells of in its message.

    >>> os_error_in(Exception("No space left on device (os error 28)"))
    OSError(28, 'No space left on device')
    """
    if isinstance(error, OSError):
        return error
    found = _RUST_OS_ERROR.search(str(error))
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


@contextmanager
def writing_fails_as(describe: Callable[[OSError], GossamerError]) -> Iterator[None]:
    """Errors of the system in the body, such as a full disk, become what ``describe`` makes of them.

    A full disk is an exception of its own kind in each library that writes; see :func:`os_error_in`.

    >>> with writing_fails_as(lambda error: GossamerError(f"cannot write: {error.strerror}")):
    ...     raise ValueError("I/O error: File too large (os error 27)")
    Traceback (most recent call last):
    ...
    gossamer.errors.GossamerError: cannot write: File too large
    """
    try:
        yield
    except GossamerError:  # some are OSErrors as well
        raise
    except Exception as error:  # whatever the library has for it; what is no error of the system goes on as it is
        cause = os_error_in(error)
        if cause is None:
            raise
        raise describe(cause) from error


def _scratches(target: Path) -> Iterator[Path]:
    return target.parent.glob(f".{escape(target.name)}.*.tmp")


def _sweep(target: Path) -> None:
    for leftover in _scratches(target):
        hold = _open_directory(leftover)
        if hold is not None:
            if try_lock(hold, otherwise=False):
                shutil.rmtree(leftover, ignore_errors=True)
            os.close(hold)


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two paths in one step, where Linux and the file system can."""
    if sys.platform != "linux":
        return False
    with suppress(AttributeError):  # a C library without it
        function = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(function(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)
    return False


def _open_directory(path: Path) -> int | None:
    with suppress(OSError):  # gone already; or Windows, which opens no directories
        return os.open(path, os.O_RDONLY)
    return None
