"""Rows that were begun, so that one that kills its process is found and the others get their answers.

Ray starts an actor again whatever it died of, and gives it the same part again. A row is therefore noted before the
engine gets it. Rows that were begun and have neither answer nor error when the next actor takes the part were in the
process when it died: *suspects*. From the second time on they are tried in groups, each an eighth of the one that died
(halves would take three times as many restarts), those with fewest deaths first, and each group alone in the process.
A row that has died alone :data:`MOST_ALONE` times gets an error, and is left out.

A death that had another cause, such as a machine that was switched off, costs its rows some company, no answer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import OutputError

#: Deaths of a row from which on it is tried in a group, and deaths alone after which it is not tried again.
SUSPECT, MOST_ALONE = 2, 3
_DIVISION = 8


@dataclass
class Record:
    """What is known of a row that was begun and never finished.

    Attributes:
        deaths: of processes that it was in.
        group: rows that were in the last of them.
        alone: deaths in which it was the only one.
        alone_now: those of the present run of the command.
    """

    deaths: int = 0
    group: int = 0
    alone: int = 0
    alone_now: int = 0

    @property
    def next_group(self) -> int | None:
        """Rows to try it with; ``None``: with all that come."""
        return None if self.deaths < SUSPECT else max(self.group // _DIVISION, 1)

    @property
    def given_up(self) -> bool:
        """Whether it is left out. A later run tries it once more: the cause may be gone."""
        return self.alone >= MOST_ALONE and self.alone_now > 0


class Attempts:
    """Notes the rows that a process begins.

    Args:
        path: of this process and part alone.
        run: number of the run of the command.

    Raises:
        OutputError: the disk is full or gone.
    """

    def __init__(self, path: Path, run: int) -> None:
        self._path = path
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
        self._write({"run": run})

    def _write(self, value: object) -> None:
        line = json.dumps(value).encode() + b"\n"
        try:
            if os.write(self._file, line) < len(line):
                raise OSError(28, "No space left on device")
        except OSError as error:
            raise OutputError(f"cannot write {self._path}: {error.strerror}; go on later with --resume") from error

    def begin(self, row: int) -> None:
        """A row goes into the engine."""
        self._write(row)

    def close(self, *, ended: bool) -> None:
        """The process is through with the part, or stops for a reason that is no fault of the rows.

        Args:
            ended: note that; nothing could be written to a disk that is full.
        """
        if ended:
            self._write("end")
        os.close(self._file)


def histories(files: Iterable[Path], open_rows: set[int], run: int) -> dict[int, Record]:
    """What is known of the rows that are open.

    The process of the last file of each earlier run is not held against its rows: it died with the command.

    Args:
        files: of :class:`Attempts`, oldest first.
        open_rows: those without an answer or an error.
        run: the present one.
    """
    read = [_read(path) for path in files]
    records: dict[int, Record] = {}
    for place, (of_run, rows, ended) in enumerate(read):
        following = read[place + 1][0] if place + 1 < len(read) else run
        suspects = rows & open_rows
        if ended or of_run != following:
            continue
        for row in suspects:
            record = records.setdefault(row, Record())
            record.deaths += 1
            record.group = len(suspects)
            record.alone += len(suspects) == 1
            record.alone_now += len(suspects) == 1 and of_run == run
    return records


def _read(path: Path) -> tuple[int, set[int], bool]:
    """The run, the rows, and whether the process came to an end of its own."""
    run, rows, ended = 0, set(), False
    for line in path.read_bytes().splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # torn
            continue
        if isinstance(value, dict):
            run = value["run"]
        elif value == "end":
            ended = True
        else:
            rows.add(value)
    return run, rows, ended


def groups(rows: Iterable[int], records: dict[int, Record]) -> list[list[int]]:
    """Rows in the order in which they are tried; each group is finished before the next is begun.

    >>> groups([1, 2, 3, 4], {2: Record(2, 8, 0), 3: Record(1, 8, 0), 4: Record(3, 1, 1)})
    [[1, 3], [2], [4]]
    """
    free: list[int] = []
    suspects: list[tuple[int, int, int]] = []
    for row in rows:
        record = records.get(row, Record())
        if record.given_up:
            continue
        if record.next_group is None:
            free.append(row)
        else:
            suspects.append((record.deaths, -record.next_group, row))
    made = [free] if free else []
    made_of: list[tuple[int, int]] = []  # deaths and size of each group of suspects
    for deaths, size, row in sorted(suspects, key=lambda each: each[:2]):  # the order of rows is kept
        if made_of and made_of[-1] == (deaths, size) and len(made[-1]) < -size:
            made[-1].append(row)
        else:
            made.append([row])
            made_of.append((deaths, size))
    return made
