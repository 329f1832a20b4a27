"""The directory of converted models, and how an entry gets into it all at once or not at all.

An entry is built in a hidden sibling directory under a lock and renamed when it is finished. Whatever interrupts the
build, no half entry is ever seen under the final name; the next build of an entry removes what a killed one left.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gossamer.errors import DownloadError
from gossamer.models.manifest import verify
from gossamer.models.progress import console, say
from gossamer.models.scratch import put_in_place, remove_leftovers, scratch_directory, writing_fails_as


@dataclass(frozen=True)
class CacheEntry:
    """A model in the cache.

    Attributes:
        path: its directory.
        outcome: ``present`` if it was there, ``built`` if it was made now, ``repaired`` if it replaced another.
    """

    path: Path
    outcome: Literal["present", "built", "repaired"]


def cache_directory() -> Path:
    """``$GOSSAMER_CACHE``, or ``gossamer`` in the user's cache directory (``$XDG_CACHE_HOME``, else ``~/.cache``)."""
    if chosen := os.environ.get("GOSSAMER_CACHE"):
        return Path(chosen).expanduser().absolute()
    # The XDG specification says to ignore a relative path.
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "gossamer"


def entry_path(key: str) -> Path:
    """Where the entry ``key`` is or would be."""
    return cache_directory() / "models" / key


def get_or_build(
    key: str,
    build: Callable[[Path], Path],
    *,
    space: int = 0,
    full: bool = False,
    force: bool = False,
    conversion: int | None = None,
) -> CacheEntry:
    """Returns the entry ``key``, building it when it is missing or damaged.

    Args:
        key: name of the entry.
        build: gets an empty scratch directory; returns the finished checkpoint directory inside it, manifest included.
        space: bytes of disk the build needs; refused beforehand when they are not free.
        full: compare digests, not only sizes, with the manifest.
        force: build again even if the entry is intact.
        conversion: what the entry has to be made with, see :func:`gossamer.models.manifest.verify`.

    Raises:
        DownloadError: the cache cannot be written, or the disk is too full.
        GossamerError: whatever ``build`` raises on purpose.
    """
    target = entry_path(key)
    if not force and not verify(target, full=full, conversion=conversion):
        remove_leftovers(target)
        return CacheEntry(target, "present")

    def refused(cause: OSError) -> DownloadError:
        return DownloadError(
            f"cannot write {key} to the model cache {target.parent}: {cause}. Make room there, or set GOSSAMER_CACHE "
            "to a directory on another disk."
        )

    with writing_fails_as(refused):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _lock(key):
            existed = target.exists()
            # Another process may have finished the very same build while we waited for the lock.
            if not force:
                faults = verify(target, full=full, conversion=conversion)
                if not faults:
                    return CacheEntry(target, "present")
                if existed:
                    say(f"The cached copy of {key} is damaged ({faults[0]}); fetching it again.")
            with scratch_directory(target) as scratch:
                _check_space(target.parent, key, space)  # without what a killed build had left
                put_in_place(build(scratch), target)  # processes that read the old one keep their open files
    return CacheEntry(target, "repaired" if existed else "built")


@contextmanager
def _lock(key: str) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(entry_path(f".{key}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with console.status(f"another process is fetching {key}; waiting for it"):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _check_space(directory: Path, key: str, space: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < space:
        raise DownloadError(
            f"{key} needs {space / 1e9:.1f} GB in {directory}, where {free / 1e9:.1f} GB are free. Make room there, or "
            "set GOSSAMER_CACHE to a directory on another disk."
        )
