"""The output file of a batch: whole lines only, and what an interrupted run has left in it."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gossamer.errors import ConfigurationError, GossamerError

# Every line we write begins so; it tells a torn line of ours from the end of somebody else's file.
_LINE_START = b'{"id": "batch_req_'


class OutputFile:
    """Appends records as complete lines.

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
        ConfigurationError: the file exists and neither flag says what to do with it, or it is no batch output.
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
        self.answered = self._read_answers()

    def _check(self) -> None:
        if self.path.is_dir():
            raise ConfigurationError(f"{self.path} is a directory; the output must be a file")
        if not self.path.parent.is_dir():
            raise ConfigurationError(f"{self.path.parent} does not exist; create it or choose another output")
        if self.path.exists() and not (self._resume or self._overwrite):
            raise ConfigurationError(
                f"{self.path} exists; add --resume to go on from it, or --overwrite to start again without it"
            )

    def _read_answers(self) -> set[str]:
        if not (self._resume and self.path.exists()):
            return set()
        return {custom_id for _, custom_id in _classify(self.path) if custom_id is not None}

    def __enter__(self) -> Self:
        try:
            if self._resume and self.path.exists():
                _keep_answers_only(self.path)
            mode = "ab" if self._resume else "wb" if self._overwrite else "xb"
            self._file = self.path.open(mode)
        except OSError as error:
            raise ConfigurationError(f"cannot write {self.path}: {error.strerror}") from None
        return self

    def append(self, record: dict[str, Any]) -> None:
        """Write one line and hand it to the operating system.

        Raises:
            GossamerError: the disk is full or gone; the file ends with the last complete line.
        """
        text = json.dumps(record, ensure_ascii=False) + "\n"
        # JSON can hold half of a surrogate pair, which UTF-8 cannot; as an escape ("\ud800") it is JSON again.
        line = text.encode("utf-8", errors="backslashreplace")
        end = os.fstat(self._file.fileno()).st_size  # where to cut if the line does not get there whole
        try:
            self._write_all(line)
        except OSError as error:
            os.truncate(self.path, end)
            raise GossamerError(
                f"cannot write {self.path}: {error.strerror}; complete lines are kept, go on later with --resume"
            ) from error
        except BaseException:
            os.truncate(self.path, end)
            raise

    def _write_all(self, line: bytes) -> None:
        # Past Python's buffer: what is left in a buffer after an error would be written again at close.
        written = 0
        while written < len(line):
            written += os.write(self._file.fileno(), line[written:])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._file.close()


def _classify(path: Path) -> Iterator[tuple[bytes, str | None]]:
    """Each line, without its end, with the custom id it answers, or ``None`` for a failed, blank or torn line."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            content = line.strip()
            try:
                yield content, _answered_id(content)
            except ValueError:
                torn = not line.endswith(b"\n") and (content.startswith(_LINE_START) or _LINE_START.startswith(content))
                if not torn:
                    raise ConfigurationError(
                        f"{path}, line {number}, is no line of a batch output: nothing was changed; "
                        "choose another output, repair the line, or start again with --overwrite"
                    ) from None
                yield content, None


def _answered_id(line: bytes) -> str | None:
    """The custom id if the line is an answer, ``None`` if it is an error or blank.

    Raises:
        ValueError: it is neither.
    """
    if not line:
        return None
    record = json.loads(line)
    if not isinstance(record, dict) or not record.keys() >= {"custom_id", "response", "error"}:
        raise ValueError
    response = record["response"]
    answered = record["error"] is None and isinstance(response, dict) and response.get("status_code") == 200
    return record["custom_id"] if answered else None


def _keep_answers_only(path: Path) -> None:
    """Drop failed and torn lines. The file is replaced in one step: a crash leaves the one or the other."""
    answers = (line + b"\n" for line, custom_id in _classify(path) if custom_id is not None)
    if sum(map(len, answers)) == path.stat().st_size:
        return
    handle, kept = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "wb") as file:
            file.writelines(line + b"\n" for line, custom_id in _classify(path) if custom_id is not None)
            file.flush()
            os.fsync(file.fileno())
        shutil.copymode(path, kept)
        os.replace(kept, path)
    except BaseException:
        os.unlink(kept)
        raise
