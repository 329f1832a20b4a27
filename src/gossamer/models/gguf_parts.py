"""The files of a split GGUF file, found by their names."""

from __future__ import annotations

import re
from pathlib import Path

from gossamer.errors import CheckpointError

_PART = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})\.gguf", re.IGNORECASE | re.DOTALL)


def parts_of(path: Path) -> list[Path]:
    """All files that a GGUF file consists of, in order; the name of one part tells those of the others.

    Raises:
        CheckpointError: a part is missing.

    >>> parts_of(Path("model.gguf"))
    [PosixPath('model.gguf')]
    """
    named = _PART.fullmatch(path.name)
    if named is None or int(named["count"]) < 2:
        return [path]
    count = int(named["count"])
    parts = []
    for number in range(1, count + 1):
        part = path.with_name(f"{named['stem']}-{number:05d}-of-{named['count']}.gguf")
        if not part.is_file():
            raise CheckpointError(
                f"{path} is one of {count} parts of a split GGUF file, and the part {part.name} is not beside it. "
                "Put all parts into one directory."
            )
        parts.append(part)
    return parts
