"""``gossamer.json``: where a checkpoint came from, and the size and digest of every file in it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gossamer
from gossamer.errors import CheckpointError
from gossamer.models.json_file import read_object

MANIFEST = "gossamer.json"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(directory: Path, source: dict[str, Any]) -> None:
    """Describes all files of ``directory`` in its ``gossamer.json``.

    Args:
        directory: a finished checkpoint.
        source: where it came from: package, version, digest and so on.
    """
    files = {
        path.relative_to(directory).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(directory.rglob("*"))
        if path.name != MANIFEST and path.is_file()
    }
    manifest = {"gossamer_version": gossamer.__version__, "source": source, "files": files}
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def kept_sampling(file: Path) -> dict[str, Any]:
    """What a manifest says about sampling with a GGUF file that is kept beside it; empty if there is none.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = file.parent / MANIFEST
    if not manifest.is_file():
        return {}
    source = read_object(manifest).get("source")
    if not isinstance(source, dict) or source.get("kept") != file.name:
        return {}  # of a checkpoint in the same directory
    sampling = source.get("sampling")
    return sampling if isinstance(sampling, dict) else {}


def verify(directory: str | Path, *, full: bool = False, conversion: int | None = None) -> list[str]:
    """Compares a directory with its manifest.

    Args:
        directory: a checkpoint that Gossamer wrote.
        full: read every file and compare digests; otherwise only sizes, which takes microseconds.
        conversion: number of the way in which the checkpoint has to be converted from another format, if it was.

    Returns:
        One sentence per fault; an empty list when the directory is intact.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as name:
    ...     verify(name)
    ['gossamer.json is missing']
    """
    directory = Path(directory)
    try:
        if not (directory / MANIFEST).exists():
            return [f"{MANIFEST} is missing"]
        manifest = read_object(directory / MANIFEST)
        if conversion is not None and manifest["source"].get("conversion") != conversion:
            return ["it was converted by another version of Gossamer"]
        files = manifest["files"].items()
        return [fault for name, expected in files if (fault := _fault(directory / name, expected, full))]
    except CheckpointError as error:
        return [str(error)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"it cannot be checked against its {MANIFEST}: {error!r}"]


def _fault(path: Path, expected: dict[str, Any], full: bool) -> str:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size != expected["size"]:
        return f"{path.name} has {path.stat().st_size} bytes instead of {expected['size']}"
    if full and (found := sha256_of(path)) != expected["sha256"]:
        return f"{path.name} has sha256 {found} instead of {expected['sha256']}"
    return ""
