"""The output file of a batch: whole lines only, and what an interrupted run has left in it."""

from __future__ import annotations

import json
import os
import shutil
import stat
import weakref
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gossamer.errors import ConfigurationError, OutputError
from gossamer.locks import is_at, try_lock

# Every line we write begins so; it tells a torn line of ours from the end of somebody else's file.
_LINE_START = b'{"id": "batch_req_'
_BINARY = getattr(os, "O_BINARY", 0)  # Windows would change line ends


class OutputFile:
    """Appends records as complete lines; one process at a time.

    Each line reaches the operating system in the moment it is written, so it survives the death of the process. A line
    that could not be written completely (Ctrl-C, full disk) is cut off again; one torn by ``kill -9`` is cut off when
    the next run resumes.

    Args:
        path: where to write.
        resume: keep the answers that are there, drop failed and torn lines.
        overwrite: drop everything that is there.

    Attributes:
        answered: custom ids that have an answer already.

    Raises:
        ConfigurationError: the file exists and neither flag says what to do with it, it is no batch output, or another
            process is writing it.
    """

    def __init__(self, path: Path, *, resume: bool = False, overwrite: bool = False) -> None:
        if resume and overwrite:
            raise ConfigurationError(
                "--resume keeps the answers in the output, --overwrite drops them: give one of them"
            )
        # A replaced file must be the one a link points to, not the link.
        self.path = path.resolve()
        self._resume = resume
        self._overwrite = overwrite
        self._check()
        self._file: int | None = None
        self.answered: set[str] = set()
        if self.path.exists():
            try:
                self._open(0)
            except OSError as error:
                raise ConfigurationError(f"cannot write {self.path}: {error.strerror}") from None
            if resume:
                self.answered = {custom_id for _, custom_id in _classify(self.path) if custom_id is not None}

    def _check(self) -> None:
        if self.path.is_dir():
            raise ConfigurationError(f"{self.path} is a directory; the output must be a file")
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"{self.path.parent} does not exist; create it or choose another output")
        if self.path.exists() and not (self._resume or self._overwrite):
            raise ConfigurationError(
                f"{self.path} exists; add --resume to go on from it, or --overwrite to start again without it"
            )

    def _open(self, flags: int, path: Path | None = None) -> None:
        """Open the file, and hold it against other processes; what was open before is let go."""
        file = os.open(path or self.path, os.O_RDWR | os.O_APPEND | _BINARY | flags, 0o666)
        if not try_lock(file) or not is_at(file, path or self.path):
            os.close(file)
            raise ConfigurationError(f"{self.path} is being written by another process; wait for it to end")
        self._close()
        self._file, self._closer = file, weakref.finalize(self, os.close, file)

    def _close(self) -> None:
        if self._file is not None:
            self._closer()
            self._file = None

    def __enter__(self) -> Self:
        try:
            if self._file is None:
                self._open(os.O_CREAT | os.O_EXCL)
            elif self._resume:
                self._keep_answers_only()
            elif stat.S_ISREG(os.fstat(self._file).st_mode):
                os.ftruncate(self._file, 0)
        except BaseException as error:
            self._close()
            if not isinstance(error, OSError):
                raise
            raise OutputError(f"cannot write {self.path}: {error.strerror}") from error
        return self

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system.

        Raises:
            OutputError: the disk is full or gone; the file ends with the last complete line.
            ValueError: JSON cannot hold the record.
        """
        text = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
        # JSON can hold half of a surrogate pair, which UTF-8 cannot; as an escape ("\ud800") it is JSON again.
        line = text.encode("utf-8", errors="backslashreplace")
        assert self._file is not None
        end = os.fstat(self._file).st_size  # where to cut if the line does not get there whole
        try:
            self._write_all(line)
        except BaseException as error:
            with suppress(OSError):  # then the next run that resumes cuts
                os.ftruncate(self._file, end)
            if not isinstance(error, OSError):
                raise
            raise OutputError(
                f"cannot write {self.path}: {error.strerror}; complete lines are kept, go on later with --resume"
            ) from error

    def _write_all(self, line: bytes) -> None:
        # Past Python's buffer: what is left in a buffer after an error would be written again at close.
        assert self._file is not None
        written = 0
        while written < len(line):
            written += os.write(self._file, line[written:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._close()

    def _keep_answers_only(self) -> None:
        """Drop failed and torn lines. A crash leaves the file as it was, or as it is to be."""
        draft = self.path.with_name(f".{self.path.name}.resumed")
        draft.unlink(missing_ok=True)  # what a crash has left; nobody else writes one while we hold the file
        assert self._file is not None
        kept, more = _leading_answers(self.path)
        if not more:  # needs no space, which a disk that was full may still not have
            os.ftruncate(self._file, kept)
            return
        try:
            with draft.open("xb") as file:
                lines = (line.strip() + b"\n" for line, custom_id in _classify(self.path) if custom_id is not None)
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
            shutil.copymode(self.path, draft)
            held = self._file, self._closer
            self._file = None  # both are held until the one has the other's place
            self._open(0, draft)
            os.replace(draft, self.path)
            held[1]()
        except BaseException:
            draft.unlink(missing_ok=True)
            raise


class NoOutput:
    """In place of an output file where another process writes the same answers.

    Attributes:
        answered: as in :class:`OutputFile`; to be filled with that process's.
    """

    def __init__(self) -> None:
        self.answered: set[str] = set()

    def __enter__(self) -> Self:
        return self

    def append(self, record: dict[str, Any]) -> None:
        """Forget it."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass


def cut_torn_line(path: Path) -> int:
    """Cut off a last line that is not complete. Returns the number of lines.

    Raises:
        OSError: the file cannot be read or written.
    """
    lines = end = 0
    with path.open("r+b") as file:
        for line in file:
            if line.endswith(b"\n"):
                lines, end = lines + 1, end + len(line)
        file.truncate(end)
    return lines


def _leading_answers(path: Path) -> tuple[int, bool]:
    """Bytes of the answers that the file begins with, and whether there are more, or some to be written anew."""
    kept, leading = 0, True
    for line, custom_id in _classify(path):
        if custom_id is None:
            leading = False
        elif not leading or line != line.strip() + b"\n":
            return kept, True
        else:
            kept += len(line)
    return kept, False


def _classify(path: Path) -> Iterator[tuple[bytes, str | None]]:
    """Each line with the custom id it answers, or ``None`` for a failed, blank or torn line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.strip()
            try:
                yield line, _answered_id(content)
            except (ValueError, RecursionError):
                torn = not line.endswith(b"\n") and (content.startswith(_LINE_START) or _LINE_START.startswith(content))
                if not torn:
                    raise ConfigurationError(
                        f"{path}, line {number}, is no line of a batch output: nothing was changed; "
                        "choose another output, repair the line, or start again with --overwrite"
                    ) from None
                yield line, None


def _answered_id(line: bytes) -> str | None:
    """The custom id if the line is an answer, ``None`` if it is an error or blank.

    Raises:
        ValueError, RecursionError: it is neither.
    """
    if not line:
        return None
    record = json.loads(line)
    if not isinstance(record, dict) or not record.keys() >= {"custom_id", "response", "error"}:
        raise ValueError
    response = record["response"]
    custom_id = record["custom_id"]
    answered = record["error"] is None and isinstance(response, dict) and response.get("status_code") == 200
    if answered and not isinstance(custom_id, str):
        raise ValueError
    return custom_id if answered else None
