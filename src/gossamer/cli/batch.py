"""``gossamer batch``: answer a file of requests."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, NoReturn, Self

import typer

from gossamer.cli.engine_options import AsJson, Lora, Model, Threads, adapters_of, load_llm, take_part, takes_options
from gossamer.cli.terminal import notice, stderr
from gossamer.errors import ConfigurationError
from gossamer.options import Options

if TYPE_CHECKING:
    from gossamer.batch import BatchSummary

# Enough prompts ahead of the ones being computed that the engine sees which of them share a prefix.
_PROMPTS_PER_SEQUENCE = 4
_RAY = "Over several processes and machines"


class RayFlags(NamedTuple):
    """What was said about a batch on a Ray cluster."""

    input: Path
    output: Path
    address: str
    actors: int | None
    threads: int | None
    format: str | None
    resume: bool
    overwrite: bool
    max_tokens: int | None
    insecure: bool


@takes_options(parallel=True)
def batch(
    model: Model,
    input: Annotated[
        Path,
        typer.Argument(
            help="Requests in OpenAI's batch format, one per line; with --ray also Parquet, or a directory of files.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Where answers go, one per line; with --ray a directory, too.", show_default=False
        ),
    ],
    resume: Annotated[bool, typer.Option("--resume", help="Keep the answers in the output, do the rest.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Start again without the existing output.")] = False,
    lora: Lora = None,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Limit for requests that give none; 16 for completions and the context for chat by default."
        ),
    ] = None,
    threads: Threads = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Answer on a Ray cluster: local (processes of this machine), auto (the cluster this machine belongs "
            "to) or HOST:PORT.",
            metavar="ADDRESS",
            show_default=False,
            rich_help_panel=_RAY,
        ),
    ] = None,
    actors: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Processes that load the model, each with --threads and --memory of its own; by default as many as "
            "there is room for, one on each machine if --threads is not given.",
            rich_help_panel=_RAY,
        ),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="Of the output: jsonl or parquet; by default as its name says, or as the input is.",
            show_default=False,
            rich_help_panel=_RAY,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Use a cluster that asks for no token, where whoever reaches its ports can run code.",
            rich_help_panel=_RAY,
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Prefixes that requests share are found by themselves and computed once. A line that cannot be answered gets an
    error line and the rest goes on. Answers are written as they finish: after Ctrl-C or a crash, --resume continues.
    A "model" in a request may name an adapter of --lora; any other is accepted, and the answer names MODEL. Exit
    status: 0 all answered, 1 some lines failed, 2 the batch could not run, 130 stopped by Ctrl-C.

    With --ray, requests are sorted so that those with a common prefix meet, cut into parts, and answered by many
    processes, on many machines if they see the output at the same path. Answers stand in OUTPUT.parts, and in OUTPUT,
    in the order of the input, once all have finished. Whatever is killed on the way, --resume computes no finished
    request again. A request that kills its process, again and again, gets an error and the rest goes on. With --ray, a
    request without a seed draws the same tokens whenever and wherever it is answered. Try it:

        gossamer batch MODEL in.jsonl -o out/ --ray local --actors 2
    """
    from gossamer.batch import BatchRunner

    adapters = adapters_of(lora, model)
    progress = _BatchProgress()
    if ray is not None:
        over_ray = RayFlags(input, output, ray, actors, threads, format, resume, overwrite, max_tokens, insecure)
        _answer_on_ray(over_ray, model, options, adapters, progress, as_json=as_json)
    for name, given in (("--actors", actors), ("--format", format), ("--insecure", insecure)):
        if given:
            raise ConfigurationError(f"{name} goes with --ray; add --ray local for a cluster of this machine")
    ranks = take_part(options)
    # First what can be wrong with the files: that should not take a loaded model to find out.
    work = BatchRunner(
        input,
        output if ranks is None or ranks.leads else None,
        resume=resume,
        overwrite=overwrite,
        default_max_tokens=max_tokens,
        max_in_flight=_PROMPTS_PER_SEQUENCE * Options.of(options).engine.max_num_seqs,
        progress=progress.update,
    )
    if ranks is not None:
        with ranks.together():
            work.answered.update(ranks.first(sorted(work.answered)))
    with load_llm(model, options, threads, adapters) as llm:
        interrupted = False
        try:
            with progress:
                work.run(llm)
        except KeyboardInterrupt:
            interrupted = True
        engine = llm.stats().to_dict() if llm.generates else None
        _tell(work.summary, interrupted, as_json, {"engine": engine})
    _end(work.summary, interrupted, output, output)


def _answer_on_ray(
    flags: RayFlags,
    model: str,
    options: dict[str, Any],
    adapters: dict[str, str],
    progress: _BatchProgress,
    *,
    as_json: bool,
) -> NoReturn:
    from gossamer.distributed.batch.job import RayBatch

    if "tensor_parallel" in options:
        raise ConfigurationError("--ray and --tensor-parallel exclude each other: an actor is one process")
    job = RayBatch(
        model,
        flags.input,
        flags.output,
        flags.address,
        lora=adapters,
        options=options,
        actors=flags.actors,
        threads=flags.threads,
        format=flags.format,
        resume=flags.resume,
        overwrite=flags.overwrite,
        default_max_tokens=flags.max_tokens,
        insecure=flags.insecure,
    )
    notice(f"Ray: {'starting a cluster of this machine' if flags.address == 'local' else flags.address}", "dim")
    interrupted = False
    try:
        with progress:
            job.run(progress.update)
    except KeyboardInterrupt:
        interrupted = True
    _tell(progress.summary, interrupted, as_json, {"output": str(job.output_file)})
    _end(progress.summary, interrupted, job.directory.path, job.output_file)


def _tell(summary: BatchSummary, interrupted: bool, as_json: bool, more: dict[str, Any]) -> None:
    if as_json:
        typer.echo(json.dumps(asdict(summary) | {"interrupted": interrupted} | more))
    else:
        typer.echo(_describe(summary))


def _end(summary: BatchSummary, interrupted: bool, kept: Path, output: Path) -> NoReturn:
    """Tell what failed, and end with the status that says so; answers that were interrupted are in ``kept``."""
    for failure in summary.first_failures:
        notice(failure, "yellow")
    if summary.failed > len(summary.first_failures):
        notice(f"... and {summary.failed - len(summary.first_failures)} more failures in {output}")
    if interrupted:
        notice(f"Stopped. The answers so far are in {kept}; the same command with --resume continues.")
        raise typer.Exit(130)
    raise typer.Exit(1 if summary.failed else 0)


class _BatchProgress:
    """A bar for answers, with the rates that tell whether sharing pays."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        from gossamer.batch import BatchSummary

        self._bar = Progress(
            TextColumn("answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=stderr,
        )
        self._task = self._bar.add_task("answers", total=None, rates="")
        self.summary = BatchSummary()

    def update(self, summary: BatchSummary) -> None:
        self.summary = summary
        self._bar.update(self._task, total=summary.total, completed=summary.done, rates=_rates(summary))

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()


def _rates(summary: BatchSummary) -> str:
    per_second = summary.completion_tokens / summary.seconds if summary.seconds else 0.0
    return f"{per_second:.1f} tokens/s, {summary.tokens_saved} prompt tokens saved"


def _describe(summary: BatchSummary) -> str:
    return (
        f"{summary.completed} answered, {summary.failed} failed, {summary.skipped} had an answer already "
        f"({summary.total} requests, {summary.seconds:.1f} s)\n"
        f"{summary.prompt_tokens} prompt tokens, of which {summary.tokens_saved} were not computed again; "
        f"{summary.completion_tokens} tokens generated"
    )
