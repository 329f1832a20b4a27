"""Locks on open files and directories, which end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

try:
    import fcntl
except ImportError:  # Windows has another mechanism; there, whoever starts two processes over one file is not stopped
    fcntl = None  # type: ignore[assignment]  # a module that is not there

_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


def try_lock(file: int, *, otherwise: bool = True) -> bool:
    """Lock an open file against other processes until it is closed.

    Args:
        file: its descriptor.
        otherwise: what to return where the system or the file system knows no locks.

    Returns:
        Whether it is ours now.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as one, open(one.name) as two:
    ...     try_lock(one.fileno()), try_lock(two.fileno())
    (True, False)
    """
    if fcntl is None:
        return otherwise
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return False if error.errno in _TAKEN else otherwise
    return True


@contextmanager
def held(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Hold a directory for the body, once nobody else holds it; without effect where there are no locks."""
    file = None
    with suppress(OSError):  # Windows opens no directories; network file systems may lock none
        file = os.open(directory, os.O_RDONLY)
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if file is not None:
            os.close(file)


def is_at(file: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file is still the one at ``path``: another may have been moved there since."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
