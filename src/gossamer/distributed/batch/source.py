"""The input of a job: a file or a directory of files, as numbered requests."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from gossamer.batch.input_file import MAX_LINE_BYTES, BatchLine, InvalidLine, parse_line, raw_lines
from gossamer.distributed.batch.tables import parquet_lines
from gossamer.errors import ConfigurationError

_BLOCK = 1 << 22


class Source:
    """Requests in OpenAI's batch format: lines of JSONL, or rows of Parquet.

    The files of a directory count in the order of their names, and lines are numbered through all of them. A
    ``custom_id`` may be used once in all of them.

    Args:
        path: a file, or a directory of files that end in ``.jsonl`` or in ``.parquet``.

    Attributes:
        files: in order.
        format: ``jsonl`` or ``parquet``.

    Raises:
        ConfigurationError: it cannot be read, or holds nothing of the kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.is_dir():
            self.files = sorted(each for each in path.iterdir() if _format(each) and not each.name.startswith("."))
            if not self.files:
                raise ConfigurationError(f"{path} has no files that end in .jsonl or .parquet")
        elif path.exists() and not path.is_file():
            raise ConfigurationError(f"{path} is not a regular file; a batch reads its input twice")
        else:
            self.files = [path]
        formats = {_format(each) or "jsonl" for each in self.files}
        if len(formats) > 1:
            raise ConfigurationError(f"{path} has files of JSONL and of Parquet; keep them in two directories")
        self.format = formats.pop()
        for file in self.files:
            if not os.access(file, os.R_OK):
                raise ConfigurationError(f"cannot read {file}: " + ("no permission" if file.exists() else "not there"))

    def digest(self) -> str:
        """SHA-256 over the names and the bytes of all files.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        whole = hashlib.sha256()
        for path in self.files:
            try:
                with path.open("rb") as file:
                    whole.update(f"{path.name}\0{os.fstat(file.fileno()).st_size}\0".encode())
                    while block := file.read(_BLOCK):
                        whole.update(block)
            except OSError as error:
                raise ConfigurationError(f"cannot read {path}: {error.strerror}") from None
        return whole.hexdigest()

    def lines(self) -> Iterator[BatchLine | InvalidLine]:
        """Every line that is not blank, in order. Holds one line, and the ids seen so far.

        Raises:
            ConfigurationError: a file cannot be read.
        """
        first_seen: dict[str, int] = {}
        before = 0  # lines of the files before
        for path in self.files:
            number = 0
            for number, raw in self._raw(path):
                yield parse_line(before + number, raw, first_seen)
            before += number

    def _raw(self, path: Path) -> Iterator[tuple[int, bytes | None]]:
        if self.format == "parquet":
            for number, line in enumerate(parquet_lines(path), start=1):
                yield number, line if len(line) <= MAX_LINE_BYTES else None
            return
        with path.open("rb") as file:
            yield from raw_lines(file)


def _format(path: Path) -> str | None:
    suffix = path.suffix.lower()
    return suffix[1:] if suffix in (".jsonl", ".parquet") else None
