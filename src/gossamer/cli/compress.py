"""``gossamer compress``: a smaller checkpoint."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from gossamer.cli.engine_options import AsJson, Dtype, Model, Threads, takes_options
from gossamer.cli.terminal import notice, stderr
from gossamer.errors import ConfigurationError
from gossamer.options import Options

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

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
            help="With --sparsity or --int4: a UTF-8 file to calibrate on, of the kind that the model will see; "
            "Python's language reference by default.",
        ),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="With --sparsity or --int4: calibration sequences.")] = 64,
    length: Annotated[int, typer.Option(min=2, help="With --sparsity or --int4: tokens of each.")] = 512,
    memory: Annotated[
        str | None,
        typer.Option(
            help="With --sparsity: what the process may take, such as 8GB; most of what is free by default. Statistics "
            "that do not fit are taken in several rounds.",
            show_default=False,
        ),
    ] = None,
    int4: Annotated[
        bool, typer.Option("--int4", help="Round the linear layers to 4 bits, by second order on the text.")
    ] = False,
    type: Annotated[
        str | None,
        typer.Option(
            help="With --int4: q4_k_m (default) or q4_0 for an output that ends in .gguf; w4a16 for a directory "
            "(compressed-tensors).",
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

    --int4 rounds to 4 bits, such that the layers' outputs on the text change least, and takes minutes. A GGUF file is
    what llama.cpp and Gossamer run; a directory is in the format of compressed-tensors, for transformers and vLLM.

        gossamer compress smollm2-135m -o smollm2.gguf --int4 --text mine.txt

    Several processes, on one machine or more, share the work if torchrun starts them; the first one writes.

        torchrun --nproc-per-node 2 -m gossamer.cli compress smollm2-135m -o smollm2-half --sparsity 0.5

    The output appears when it is complete, or not at all. Pruning or rounding that was interrupted goes on where it
    stopped when the same command is given again.
    """
    if sparsity is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError("several processes (torchrun) prune together, with --sparsity; run this in one")
    if not (int8 or int4) and sparsity is None:
        raise ConfigurationError(
            "say how to compress: --int8 makes the linear layers int8, --int4 rounds them to 4 bits, --sparsity 0.5 "
            "makes half of their weights zero"
        )
    if int4 and (int8 or sparsity is not None):
        raise ConfigurationError(
            "--int4 goes alone: prune with --sparsity first, and give the result to a second command with --int4"
        )
    if type is not None and not int4:
        raise ConfigurationError("--type is of 4-bit weights: say --int4 as well")
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
        given = {"--pattern": pattern, "--curvature": curvature, "--update": update, "--reconstruction": reconstruction}
        usual = {"--pattern": "unstructured", "--curvature": "gram", "--update": "joint", "--reconstruction": 1}
        wrong = [name for name in given if given[name] != usual[name]] + ["--memory"] * (memory is not None)
        if wrong:
            raise ConfigurationError(f"such options are for pruning: {', '.join(wrong)}; say how much with --sparsity")
    if int4:
        kind = type or ("q4_k_m" if output.suffix.lower() == ".gguf" else "w4a16")
        settings = {"type": kind, "sequences": sequences, "length": length}
        settings["skip"] = None if skip is None else tuple(skipped)
        _round(model, output, settings, text, dtype, overwrite, as_json)
        return
    if sparsity is None:
        if text is not None:
            raise ConfigurationError("--text is for pruning and 4-bit weights: give --sparsity or --int4 with it")
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


def _round(
    model: str, output: Path, settings: dict[str, Any], text: Path | None, dtype: str, overwrite: bool, as_json: bool
) -> None:
    from gossamer.cli.measured_text import describe_text, read
    from gossamer.compress.int4 import Int4Recipe, compress_int4

    recipe = Int4Recipe(**settings)
    content = read(text)
    notice(f"Calibrating on {describe_text(text)}", "dim")
    with _Phases() as phases:
        report = compress_int4(
            model,
            output,
            recipe,
            content,
            dtype=dtype,
            overwrite=overwrite,
            on_progress=phases.advance,
            on_bytes=phases.advance_bytes,
        )
    for warning in report.warnings:
        notice(f"warning: {warning}", "yellow")
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
        return
    if report.resumed:
        notice(f"Went on after {report.resumed} blocks that an interrupted run had finished.", "dim")
    typer.echo(report)
    typer.echo(f"{report.path}: {report.bytes / 1e6:,.1f} MB, from {report.source_bytes / 1e6:,.1f} MB")


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
    from gossamer.distributed.statistics import launched
    from gossamer.operators.ranks import together
    from gossamer.sizes import parse_bytes

    with launched() as ranks, _Phases(shown=ranks.rank == 0) as phases:
        with together(ranks, "reading the text"):
            recipe = SparsityRecipe(**settings)
            content = read(text)
        if ranks.rank == 0:
            notice(f"Calibrating on {describe_text(text)}", "dim")
        report = compress_sparse(
            model,
            output,
            recipe,
            content,
            int8=config,
            dtype=dtype,
            memory=None if memory is None else parse_bytes(memory),
            overwrite=overwrite,
            on_progress=phases.advance,
            on_bytes=phases.advance_bytes,
            ranks=ranks,
        )
    if ranks.rank:
        return
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


class _Phases:
    """A bar for each phase of a run, which begin when they are first heard of."""

    def __init__(self, shown: bool = True) -> None:
        self._bar = _bar(shown)
        self._tasks: dict[str, TaskID] = {}

    def advance(self, phase: str, done: int, total: int) -> None:
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=total)
        self._bar.update(self._tasks[phase], completed=done, total=total)

    def advance_bytes(self, done: int, total: int) -> None:
        self.advance("writing MB", done // 10**6, total // 10**6)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def _bar(shown: bool = True) -> Progress:
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
        disable=not (shown and stderr.is_terminal),
    )
