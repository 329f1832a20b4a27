"""A name that the user typed as MODEL becomes a checkpoint directory on this machine."""

from __future__ import annotations

import os
from pathlib import Path

from gossamer.errors import CheckpointError, ModelNotFoundError
from gossamer.models.catalog import find_model, suggest
from gossamer.models.checkpoint import check_directory
from gossamer.models.pull import import_gguf, pull_model


def resolve_model(model: str | Path, *, as_file: bool = False) -> Path:
    """Finds a model, fetching or converting it on first use.

    Tried in this order: a checkpoint directory; a GGUF file, converted once into the cache; a name of the catalog, in
    any case; a Hugging Face id.

    Args:
        model: a path or a name.
        as_file: a GGUF file is not converted, since its weights will be used as they are stored or quantized as they
            are read: its own path is returned.

    Returns:
        A directory with ``config.json``, safetensors weights and a tokenizer; or, if asked for, a GGUF file.

    Raises:
        ModelNotFoundError: nothing of that name can be found; the message says where was looked and what works.
        CheckpointError: the directory or file is damaged or incomplete, or has only pickled weights.
        UnsupportedModelError: a GGUF file of an unknown architecture.
        DownloadError: the model exists but could not be fetched or stored.

    Example:
        >>> resolve_model("./no/such/model")
        Traceback (most recent call last):
        gossamer.errors.ModelNotFoundError: cannot find the model './no/such/model'. There is no such path on this ...
    """
    name = str(model)
    path = local_path(model)
    if path is not None and path.is_dir():
        check_directory(path)
        return path
    if path is not None:
        return path if as_file else import_gguf(path).path
    if entry := find_model(name):
        pulled = pull_model(entry).path
        return pulled if as_file or not entry.kept else import_gguf(pulled, entry).path
    # Imported here: the hub's client takes a while, and most calls end above.
    from gossamer.models.hub import snapshot

    return snapshot(name)


def local_path(model: str | Path) -> Path | None:
    """The directory or GGUF file ``model`` points to, or ``None`` when it is a name to look up elsewhere.

    Raises:
        ModelNotFoundError: ``model`` is written like a path, and there is nothing there.
        CheckpointError: it is a file of another kind than GGUF.
    """
    name = str(model)
    path = Path(name).expanduser()
    # os.path answers False for names the file system refuses; Path methods would raise.
    if name and os.path.isdir(path):
        return path
    if name and os.path.isfile(path):
        if path.suffix.lower() != ".gguf":
            raise CheckpointError(f"{path} is a file; give its directory, or a file that ends in .gguf")
        return path
    if isinstance(model, Path) or not name or _written_like_a_path(name):
        raise ModelNotFoundError(
            f"cannot find the model {name!r}. There is no such path on this machine. {suggest(name)}"
        )
    return None


def _written_like_a_path(name: str) -> bool:
    # A Hugging Face id is `name` or `organisation/name`.
    return name.startswith((".", "~", os.sep)) or name.count("/") > 1 or name.endswith((os.sep, ".gguf"))
