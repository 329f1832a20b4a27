"""Locks on open files, which end with the process that holds them, however it ends."""

from __future__ import annotations

import errno
import os

try:
    import fcntl
except ImportError:  # Windows has another mechanism; there, whoever starts two processes over one file is not stopped
    fcntl = None  # type: ignore[assignment]  # a module that is not there

_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


def try_lock(file: int) -> bool:
    """Lock an open file against other processes until it is closed.

    Args:
        file: its descriptor.

    Returns:
        Whether it is ours now. ``True`` as well where the file system knows no locks.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as one, open(one.name) as two:
    ...     try_lock(one.fileno()), try_lock(two.fileno())
    (True, False)
    """
    if fcntl is None:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in _TAKEN
    return True


def is_at(file: int, path: str | os.PathLike[str]) -> bool:
    """Whether an open file is still the one at ``path``: another may have been moved there since."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False
