"""``gossamer compress``: a smaller checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli.engine_options import AsJson, Dtype, Int8Criterion, Int8Outliers, Int8Threshold, Model, Threads
from gossamer.cli.terminal import notice, stderr
from gossamer.errors import ConfigurationError


def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", show_default=False)],
    int8: Annotated[bool, typer.Option("--int8", help="Make the linear layers int8 (LLM.int8()).")] = False,
    int8_threshold: Int8Threshold = 6.0,
    int8_criterion: Int8Criterion = "relative",
    int8_outliers: Int8Outliers = "token",
    outlier_store: Annotated[
        float,
        typer.Option(help="Share of each layer's input columns whose weights are kept in 16 bit as well, 0 to 1."),
    ] = 0.015,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            help="Modules to leave: a path, its first or last parts, or a regular expression; may be repeated. "
            "lm_head by default; an empty text for none.",
            show_default=False,
        ),
    ] = None,
    dtype: Dtype = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an output that is there.")] = False,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Make a smaller checkpoint that every other command, and transformers with Gossamer, can read.

    --int8 halves the linear layers of a 16-bit model. Outliers among the activations are multiplied in floating point,
    so that quality does not suffer; `gossamer eval` measures it. --dtype says what the rest is stored as.

        gossamer compress smollm2-135m -o smollm2-int8 --int8 --dtype bfloat16

        gossamer eval smollm2-int8 --reference smollm2-135m

    Memory holds little more than the result. The output appears when it is complete, or not at all.
    """
    if not int8:
        raise ConfigurationError("say how to compress: --int8 makes the linear layers int8")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    # Imported here: PyTorch and transformers take seconds.
    from gossamer.compress.int8 import compress_int8
    from gossamer.models.int8_quantizer import GossamerInt8Config

    config = GossamerInt8Config(
        int8_threshold,
        int8_criterion,  # type: ignore[arg-type]  # checked by the configuration
        None if int8_outliers == "none" else int8_outliers,  # type: ignore[arg-type]
        outlier_store,
        ["lm_head"] if skip is None else [name for name in skip if name],
    )
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
    layers = bar.add_task("quantizing layers", total=None)
    megabytes = bar.add_task("writing MB", total=None, start=False)
    with bar:
        report = compress_int8(
            model,
            output,
            config,
            dtype=dtype,
            overwrite=overwrite,
            on_layer=lambda name: bar.advance(layers),
            on_bytes=lambda done, total: bar.update(megabytes, completed=done // 10**6, total=total // 10**6),
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    typer.echo(report.quantization)
    rest_dtype, rest = report.rest
    typer.echo(f"{report.path}: {report.bytes / 1e6:,.1f} MB, from {report.source_bytes / 1e6:,.1f} MB")
    if rest_dtype == "float32" and dtype == "auto":
        notice(f"The rest, {rest / 1e6:,.1f} MB, is float32; --dtype bfloat16 would halve it.", "dim")
