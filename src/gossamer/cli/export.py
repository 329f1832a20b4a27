"""``gossamer export``: a checkpoint in the format of another project."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.engine_options import AsJson
from gossamer.cli.terminal import notice, stderr


def export(
    model: Annotated[
        str,
        typer.Argument(
            help="A checkpoint that `gossamer compress --int8` made; for gguf also one in floating point.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str, typer.Option("--format", "-f", help="bitsandbytes, compressed-tensors or gguf.", show_default=False)
    ],
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="The directory to write; for gguf a file (.gguf).", show_default=False),
    ],
    type: Annotated[
        str | None,
        typer.Option(help="With gguf: q8_0, q4_k_m, q4_0 or f32.", show_default="q8_0"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint in the format of another project.

    bitsandbytes for transformers, with the decomposition of outliers; compressed-tensors (W8A8) for vLLM; gguf for
    llama.cpp. How results will differ is said in warnings. The output appears when it is complete, or not at all.

        gossamer export small-int8 --format gguf -o small.gguf

    A GGUF file of 4 bits is rounded weight by weight here; `gossamer compress --int4` does it better, on a text.

        gossamer export smollm2-135m --format gguf --type q4_k_m -o small.gguf
    """
    # Imported here: PyTorch and transformers take seconds.
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    from gossamer.compress.export import export as export_checkpoint

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
    task = bar.add_task(f"writing {format}", total=None)
    with bar:
        report = export_checkpoint(
            model,
            output,
            format,
            type=type,
            overwrite=overwrite,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    for warning in report.warnings:
        notice(f"warning: {warning}", "yellow")
    if as_json:
        typer.echo(json.dumps(asdict(report) | {"path": str(report.path)}))
        return
    typer.echo(f"{report.path}: {_size(report.bytes)} in the format {format}, from {_size(report.source_bytes)}")


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
