"""An output that appears all at once or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gossamer.errors import ConfigurationError, OutputError
from gossamer.models.scratch import put_in_place, scratch_directory, writing_fails_as


def check_output(source: Path | None, target: Path, *, is_file: bool, overwrite: bool) -> None:
    """Refuses an output that could not be written, or that would destroy something, before any work is done.

    Args:
        source: what is read, if it is on disk.
        target: what will be written.
        is_file: whether that is one GGUF file, or a directory.
        overwrite: whether a checkpoint or GGUF file that is there may be replaced.

    Raises:
        ConfigurationError: says why.
    """
    if source and (target == source or target.is_relative_to(source) or source.is_relative_to(target)):
        raise ConfigurationError(f"the output {target} and the input {source} must not lie in one another")
    if is_file != (target.suffix.lower() == ".gguf"):
        wanted = "one file: its name has to end in .gguf" if is_file else "a directory: its name must not end in .gguf"
        raise ConfigurationError(f"{target}: the output in this format is {wanted}")
    if not target.parent.is_dir():
        raise ConfigurationError(f"{target.parent} does not exist; create it or choose another output")
    if not target.exists():
        return
    if not overwrite:
        raise ConfigurationError(f"{target} exists; add --overwrite to replace it, or choose another output")
    if target.is_dir() == is_file:
        kind = "a directory" if target.is_dir() else "a file"
        raise ConfigurationError(f"{target} is {kind}, which this format would not write; choose another output")
    if target.is_dir() and any(target.iterdir()) and not (target / "config.json").is_file():
        raise ConfigurationError(f"{target} holds something else than a checkpoint, and is not replaced")


@contextmanager
def all_or_nothing(target: Path) -> Iterator[Path]:
    """Gives a path to build at, and moves what was built to ``target`` if the body succeeds.

    Raises:
        OutputError: ``target`` cannot be written.
    """

    def refused(cause: OSError) -> OutputError:
        return OutputError(f"cannot write {target}: {cause.strerror or cause}; make room, and run it again")

    with writing_fails_as(refused), scratch_directory(target) as scratch:
        yield scratch / target.name
        put_in_place(scratch / target.name, target)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
