"""A digest of a model's weights and configuration, as they are stored."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gossamer.models.gguf_parts import parts_of

_SUFFIXES = (".json", ".safetensors", ".gguf", ".py")
_BLOCK = 8 << 20  # bytes that one thread reads at a time


def weights_digest(path: Path) -> str:
    """SHA-256 over the files of a checkpoint directory that a model is made of, or over a GGUF file and its parts.

    Every byte counts: whoever edits one row of a matrix in place has another model, and a file that is downloaded again
    or moved to another machine, with another time of change, is the same. Blocks are hashed by all processors at once;
    the weights have just been read, so that what it takes is about a second for each 1.3 GB and processor.

    Raises:
        OSError: a file cannot be read.

    >>> import tempfile
    >>> directory = Path(tempfile.mkdtemp())
    >>> _ = (directory / "config.json").write_text("{}")
    >>> before = weights_digest(directory)
    >>> _ = (directory / "README.md").write_text("not a part of it")
    >>> weights_digest(directory) == before
    True
    """
    files = sorted(each for each in path.iterdir() if each.suffix in _SUFFIXES) if path.is_dir() else parts_of(path)
    blocks = [(file, start) for file in files for start in range(0, max(file.stat().st_size, 1), _BLOCK)]
    with ThreadPoolExecutor() as pool:
        digests = pool.map(_digest_block, blocks)
        whole = hashlib.sha256()
        for (file, start), digest in zip(blocks, digests, strict=True):
            # The name of a GGUF file is no part of it; that of a file in a directory says what it is for.
            name = file.name if path.is_dir() else ""
            whole.update(f"{name}\0{start}\0".encode() + digest)
    return whole.hexdigest()


def _digest_block(block: tuple[Path, int]) -> bytes:
    file, start = block
    with file.open("rb") as opened:
        opened.seek(start)
        return hashlib.sha256(opened.read(_BLOCK)).digest()
