"""The files of a job, beside its output: which there are, and what they are called.

::

    OUT.parts/
      plan.json               what is to be done
      run.<r>                 the r-th run of the command: host and process
      refused.jsonl           lines of the input that are no requests
      part-00000.rows.jsonl   requests of a part
      part-00000.owner.<k>    the k-th actor that took it
      part-00000.answers.<k>  what it wrote, behind what it took over
      part-00000.attempts.<k> rows that it began
      part-00000.done         when all have an answer or an error: how many of each
      running/part-00000      how far it is
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gossamer.errors import OutputError


class JobDirectory:
    """Paths in a job's directory.

    >>> JobDirectory("out/answers.jsonl.parts").rows(3).name
    'part-00003.rows.jsonl'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.plan = self.path / "plan.json"
        self.refused = self.path / "refused.jsonl"
        self.running = self.path / "running"
        self.loads = self.path / "loads"

    def rows(self, part: int) -> Path:
        return self.path / f"{self.name(part)}.rows.jsonl"

    def answers(self, part: int, epoch: int) -> Path:
        return self.path / f"{self.name(part)}.answers.{epoch}"

    def attempts(self, part: int, epoch: int) -> Path:
        return self.path / f"{self.name(part)}.attempts.{epoch}"

    def done(self, part: int) -> Path:
        return self.path / f"{self.name(part)}.done"

    def progress(self, part: int) -> Path:
        return self.running / self.name(part)

    @staticmethod
    def name(part: int) -> str:
        return f"part-{part:05d}"

    def answer_files(self, part: int) -> list[Path]:
        """Those that are there, oldest first."""
        prefix = f"{self.name(part)}.answers."
        found = [each for each in self.path.glob(f"{prefix}*") if each.name.removeprefix(prefix).isdigit()]
        return sorted(found, key=lambda path: int(path.name.removeprefix(prefix)))


def write_json(path: Path, value: Any) -> None:
    """Write a file as a whole: whoever reads it sees what was there before, or all of this.

    Raises:
        OutputError: the disk is full or gone.
    """
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            json.dump(value, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OutputError(f"cannot write {path}: {error.strerror}; go on later with --resume") from error


def read_json(path: Path) -> Any:
    """What :func:`write_json` wrote; ``None`` if there is no such file."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None


def complete_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file up to the last complete one; a process may have died within a line."""
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield line
