"""JSON that somebody else wrote: a regular file, of bounded size and depth, that holds an object."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError

_MOST_BYTES = 1 << 28  # the index of 100,000 tensors has 10 MB
_DEEPEST = 64  # configurations of several models in one nest four deep
_INT64 = range(-(1 << 63), 1 << 63)


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: it is missing, no regular file, too large, damaged, nested too deep, holds something else than
            an object, or a number that is not finite or has more than 64 bits; names the field.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     file = Path(directory) / "config.json"
    ...     _ = file.write_text('{"text_config": {"vocab_size": 1e999}}')
    ...     read_object(file)
    Traceback (most recent call last):
    gossamer.errors.CheckpointError: ...config.json: text_config.vocab_size is inf; it has to be a finite number
    """
    check_regular(file)
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{file} is damaged: it has more than {_MOST_BYTES >> 20} MB")
        found = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        what = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{file} is damaged: {what}. Copy or download it again.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged: it holds a {type(found).__name__}, not an object with fields")
    _check_values(found, file, "")
    return found


def check_regular(file: Path) -> None:
    """Refuses what would not be read like a file: a directory, a device, or a pipe, which a reader waits for.

    Raises:
        CheckpointError: names the file.
    """
    if not file.exists():  # a link that leads nowhere, too
        raise CheckpointError(f"{file} is missing")
    if not file.is_file():
        raise CheckpointError(f"{file} is no regular file; put the file itself there")


def _check_values(found: Any, file: Path, path: str, depth: int = 0) -> None:
    if depth > _DEEPEST:
        raise CheckpointError(f"{file}: {path[:80]} is nested more than {_DEEPEST} deep; the file is damaged")
    if isinstance(found, dict):
        for name, value in found.items():
            _check_values(value, file, f"{path}.{name}" if path else name, depth + 1)
    elif isinstance(found, list):
        for place, value in enumerate(found):
            _check_values(value, file, f"{path}[{place}]", depth + 1)
    elif isinstance(found, int) and found not in _INT64:
        raise CheckpointError(f"{file}: {path} is a number of {found.bit_length()} bits; 64 are the most")
    elif isinstance(found, float) and (math.isnan(found) or (math.isinf(found) and not path.endswith("]"))):
        # ranges of state-space models end in infinity
        raise CheckpointError(f"{file}: {path} is {found}; it has to be a finite number")
