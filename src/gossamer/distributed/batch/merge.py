"""The output: the lines of all parts in the order of the input, complete or not there."""

from __future__ import annotations

import json
import os
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from gossamer.distributed.batch.job_directory import JobDirectory
from gossamer.distributed.batch.plan import Plan, refusals, row_places
from gossamer.distributed.batch.tables import write_parquet
from gossamer.errors import OutputError

_OPEN_FILES = 128


def merge(directory: JobDirectory, plan: Plan, output: Path, format: str) -> None:
    """Write the output from what the parts have. Whoever reads ``output`` sees the old one, or all of this.

    It holds the place of each line, 20 bytes, and a line at a time.

    Raises:
        OutputError: a row has no line yet; or the disk is full or gone, and what was there before is there still.
    """
    draft = output.with_name(f".{output.name}.draft")
    try:
        if format == "parquet":
            write_parquet(draft, records(directory, plan))
            _sync(draft)
        else:
            with draft.open("wb") as file:
                for record in records(directory, plan):
                    # A half of a surrogate pair is an escape again, as OutputFile writes it.
                    text = json.dumps(record, ensure_ascii=False)
                    file.write(text.encode("utf-8", "backslashreplace") + b"\n")
                file.flush()
                os.fsync(file.fileno())
        os.replace(draft, output)
    except BaseException as error:
        with suppress(OSError):
            draft.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise OutputError(
            f"cannot write {output}: {error.strerror or error}; all answers are in {directory.path}, and the same "
            "command with --resume writes the output"
        ) from error


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def records(directory: JobDirectory, plan: Plan) -> Iterator[dict[str, Any]]:
    """Lines of the output in the order of the input, each once.

    Raises:
        OutputError: a row has none.
    """
    files: list[Path] = []
    numbers, sources, starts = [], [], []
    refused = {record.pop("line"): record for record in refusals(directory)}
    for part in range(len(plan.parts)):
        rows = row_places(directory.rows(part))
        for path in directory.answer_files(part)[-1:]:
            position = 0
            with path.open("rb") as file:
                for line in file:
                    number = rows.pop(json.loads(line)["custom_id"], None) if line.endswith(b"\n") else None
                    if number is not None:
                        numbers.append(number)
                        sources.append(len(files))
                        starts.append(position)
                    position += len(line)
            files.append(path)
        if rows:
            raise OutputError(
                f"{directory.path}: {len(rows)} rows of part {part} have no line, such as {next(iter(rows))!r}; "
                "the same command with --resume answers them"
            )
    numbers += refused.keys()
    sources += [-1] * len(refused)
    starts += [0] * len(refused)
    order = np.argsort(np.asarray(numbers, dtype=np.int64), kind="stable")
    with _Readers(files) as readers:
        for place in order:
            if sources[place] < 0:
                yield refused[numbers[place]]
                continue
            record = json.loads(readers.line(sources[place], starts[place]))
            record.pop("run", None)
            yield record


class _Readers:
    """Files that are read here and there, not too many of them open at a time."""

    def __init__(self, files: list[Path]) -> None:
        self._files = files
        self._open: OrderedDict[int, BinaryIO] = OrderedDict()

    def line(self, file: int, start: int) -> bytes:
        reader = self._open.pop(file, None) or self._files[file].open("rb")
        self._open[file] = reader
        if len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)[1].close()
        reader.seek(start)
        return reader.readline()

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *exception: object) -> None:
        for reader in self._open.values():
            reader.close()
