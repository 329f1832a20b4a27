"""Uploaded files and answers, in one directory. Names on disk are ids of our own; what clients call a file is data."""

from __future__ import annotations

import json
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import ConfigurationError
from gossamer.server.errors import HttpError, not_found

_ID = re.compile(r"file-[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What is known of a file, in OpenAI's form."""

    id: str
    filename: str
    purpose: str
    bytes: int
    created_at: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"object": "file", "status": "processed"}


class FileStore:
    """The files in a directory.

    Raises:
        ConfigurationError: the directory cannot be made.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        try:
            private_directory(directory)
            (directory / "writable").touch()
            (directory / "writable").unlink()
        except OSError as error:
            raise ConfigurationError(f"cannot keep files in {directory}: {error.strerror}") from None

    async def save(self, parts: AsyncIterator[bytes], filename: str, purpose: str) -> StoredFile:
        """Store an upload; it exists once all of it has arrived."""
        file_id = new_id("file")
        temporary = self.directory / f"{file_id}.part"
        size = 0
        try:
            with private_file(temporary).open("wb") as file:
                async for part in parts:
                    file.write(part)
                    size += len(part)
            return self.adopt(temporary, StoredFile(file_id, filename, purpose, size, int(time.time())))
        finally:
            temporary.unlink(missing_ok=True)

    def adopt(self, path: Path, stored: StoredFile) -> StoredFile:
        """Take over a file that is complete.

        If this ends in the middle, by an error or with the process, the same call can be made again.
        """
        with drafted(self.directory / f"{stored.id}.json", asdict(stored)):  # first what needs space
            if path.exists():
                path.chmod(0o600)
                os.replace(path, self.path(stored.id))
        return stored

    def remove_leftovers(self, wanted: set[str]) -> None:
        """Remove what a server that was killed had not finished: uploads, deletions, drafts.

        Args:
            wanted: ids of files that will be adopted, and may be there in part.
        """
        for path in self.directory.iterdir():
            unfinished = path.suffix in (".part", ".tmp")
            nameless = bool(_ID.fullmatch(path.name)) and not path.with_suffix(".json").exists()
            if unfinished or (nameless and path.name not in wanted):
                path.unlink(missing_ok=True)

    def path(self, file_id: str) -> Path:
        """Where a file's content is.

        Raises:
            HttpError: this is no id.
        """
        if not _ID.fullmatch(file_id):
            raise not_found(f"there is no file {file_id!r}", "file_id")
        return self.directory / file_id

    def get(self, file_id: str) -> StoredFile:
        """What is known of a file.

        Raises:
            HttpError: there is none of this id.
        """
        self.path(file_id)
        try:
            return StoredFile(**json.loads((self.directory / f"{file_id}.json").read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            raise not_found(f"there is no file {file_id!r}", "file_id") from None

    def all(self, *, oldest_first: bool = False) -> list[StoredFile]:
        """Every file, the newest first unless told otherwise."""
        files = []
        for path in self.directory.glob("file-*.json"):
            with suppress(HttpError):  # a damaged one does not hide the others
                files.append(self.get(path.stem))
        return sorted(files, key=lambda each: (each.created_at, each.id), reverse=not oldest_first)

    def delete(self, file_id: str) -> None:
        """Remove a file.

        Raises:
            HttpError: there is none of this id.
        """
        self.get(file_id)
        (self.directory / f"{file_id}.json").unlink(missing_ok=True)
        self.path(file_id).unlink(missing_ok=True)


def new_id(kind: str) -> str:
    """``kind-`` and 32 hexadecimal digits: the time, so that ids sort by it, and 64 bits that nobody can guess."""
    return f"{kind}-{time.time_ns():016x}{secrets.token_hex(8)}"


def private_directory(directory: Path) -> Path:
    """Make a directory that only its owner can look into; those above it that do not exist are made so, too.

    Raises:
        OSError: it cannot be made.
    """
    missing = [each for each in (directory, *directory.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(mode=0o700, exist_ok=True)
    directory.chmod(0o700)
    return directory


def private_file(path: Path) -> Path:
    """Make sure that a file exists, and that only its owner can read it, whatever the umask says.

    Raises:
        OSError: it cannot be made.
    """
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
    path.chmod(0o600)
    return path


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a small file in one step."""
    with drafted(path, value):
        pass


@contextmanager
def drafted(path: Path, value: dict[str, Any]) -> Iterator[None]:
    """A small file that is written before the body and appears after it, if the body succeeds."""
    draft = path.with_suffix(".tmp")
    try:
        private_file(draft).write_text(json.dumps(value, ensure_ascii=False), "utf-8")
        yield
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
