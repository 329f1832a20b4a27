"""``gossamer compress``: a smaller checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Dtype, Model, Threads, takes_options
from gossamer.cli.terminal import notice, stderr
from gossamer.errors import ConfigurationError
from gossamer.options import Options

if TYPE_CHECKING:
    from rich.progress import Progress

    from gossamer.models.int8_quantizer import GossamerInt8Config


@takes_options(only=("int8_threshold", "int8_criterion", "int8_outliers"))
def compress(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="The directory to write.", show_default=False)],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Prune: the share of the linear layers' weights that become zero.", show_default=False),
    ] = None,
    pattern: Annotated[
        str,
        typer.Option(help="With --sparsity: unstructured, N:M (2:4 keeps two of every four) or blockN (N together)."),
    ] = "unstructured",
    curvature: Annotated[
        str,
        typer.Option(
            help="With --sparsity: what a weight is worth. gram (error of the layer's output), magnitude, wanda, or, "
            "from gradients: diagonal-fisher, block-fisher, mfac."
        ),
    ] = "gram",
    update: Annotated[
        str,
        typer.Option(help="With --sparsity: how the kept weights make up for the others: joint, independent or none."),
    ] = "joint",
    reconstruction: Annotated[
        int,
        typer.Option(
            min=0,
            help="With --sparsity: times that each block is trained over the calibration text afterwards, to give what "
            "it gave before; 0 is fastest.",
        ),
    ] = 1,
    text: Annotated[
        Path | None,
        typer.Option(
            help="With --sparsity: a UTF-8 file to calibrate on, of the kind that the model will see; Python's "
            "language reference by default.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="With --sparsity: calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="With --sparsity: tokens of each.")] = 512,
    memory: Annotated[
        str | None,
        typer.Option(
            help="With --sparsity: what the process may take, such as 8GB; most of what is free by default. Statistics "
            "that do not fit are taken in several rounds.",
            show_default=False,
        ),
    ] = None,
    int8: Annotated[bool, typer.Option("--int8", help="Make the linear layers int8 (LLM.int8()).")] = False,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
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

    --sparsity makes weights zero, where it hurts least on a text; what is left makes up for them. This costs quality,
    and minutes. Without --int8 the result is a checkpoint with zeros in it, of the same size, that anything reads, and
    the masks in masks.safetensors; with --int8 the zeros are not stored.

        gossamer compress smollm2-135m -o smollm2-half --sparsity 0.5 --int8 --text mine.txt

    The output appears when it is complete, or not at all. Pruning that was interrupted goes on where it stopped when
    the same command is given again.
    """
    if not int8 and sparsity is None:
        raise ConfigurationError(
            "say how to compress: --int8 makes the linear layers int8, --sparsity 0.5 makes half of their weights zero"
        )
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    config = None
    skipped = ["lm_head"] if skip is None else [name for name in skip if name]
    if int8:
        # Imported here: PyTorch and transformers take seconds.
        from gossamer.models.int8_quantizer import GossamerInt8Config

        own = Options.of(options).model
        config = GossamerInt8Config(own.int8_threshold, own.int8_criterion, own.int8_outliers, outlier_store, skipped)
    if sparsity is None:
        if text is not None or memory is not None or pattern != "unstructured":
            raise ConfigurationError("--text, --memory and --pattern are for pruning: say how much with --sparsity")
        assert config is not None
        _quantize(model, output, config, dtype, overwrite, as_json)
        return
    recipe = {
        "sparsity": sparsity,
        "pattern": pattern,
        "curvature": curvature,
        "update": update,
        "reconstruction": reconstruction,
        "sequences": sequences,
        "length": length,
        "skip": tuple(skipped),
    }
    _prune(model, output, recipe, text, config, dtype, memory, overwrite, as_json)


def _quantize(model: str, output: Path, config: GossamerInt8Config, dtype: str, overwrite: bool, as_json: bool) -> None:
    from gossamer.compress.int8 import compress_int8

    bar = _bar()
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


def _prune(
    model: str,
    output: Path,
    settings: dict[str, Any],
    text: Path | None,
    config: GossamerInt8Config | None,
    dtype: str,
    memory: str | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    from gossamer.cli.measured_text import describe_text, read
    from gossamer.compress.sparse import SparsityRecipe, compress_sparse
    from gossamer.sizes import parse_bytes

    recipe = SparsityRecipe(**settings)
    content = read(text)
    notice(f"Calibrating on {describe_text(text)}", "dim")
    bar = _bar()
    tasks: dict[str, Any] = {}

    def advance(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            tasks[phase] = bar.add_task(phase, total=total)
        bar.update(tasks[phase], completed=done, total=total)

    with bar:
        report = compress_sparse(
            model,
            output,
            recipe,
            content,
            int8=config,
            dtype=dtype,
            memory=None if memory is None else parse_bytes(memory),
            overwrite=overwrite,
            on_progress=advance,
            on_bytes=lambda done, total: advance("writing MB", done // 10**6, total // 10**6),
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    if report.resumed:
        notice(f"Went on after {report.resumed} parts that an interrupted run had finished.", "dim")
    typer.echo(report.pruning)
    if report.quantization is not None:
        typer.echo(report.quantization)
    typer.echo(f"{report.path}: {report.bytes / 1e6:,.1f} MB, from {report.source_bytes / 1e6:,.1f} MB")
    if config is None:
        notice("The zeros are stored as zeros; --int8 stores what is left of them only.", "dim")


def _bar() -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )
