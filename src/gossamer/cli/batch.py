"""``gossamer batch``: answer a file of requests."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Self

import typer

from gossamer.cli.engine_options import AsJson, Lora, Model, Threads, adapters_of, load_llm, take_part, takes_options
from gossamer.cli.terminal import notice, stderr
from gossamer.options import Options

if TYPE_CHECKING:
    from gossamer.batch import BatchSummary

# Enough prompts ahead of the ones being computed that the engine sees which of them share a prefix.
_PROMPTS_PER_SEQUENCE = 4


@takes_options(parallel=True)
def batch(
    model: Model,
    input: Annotated[Path, typer.Argument(help="Requests in OpenAI's batch format, one per line.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where answers go, one per line.", show_default=False)],
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
    as_json: AsJson = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format.

    Prefixes that requests share are found by themselves and computed once. A line that cannot be answered gets an
    error line and the rest goes on. Answers are written as they finish: after Ctrl-C or a crash, --resume continues.
    A "model" in a request may name an adapter of --lora; any other is accepted, and the answer names MODEL. Exit
    status: 0 all answered, 1 some lines failed, 2 the batch could not run, 130 stopped by Ctrl-C.
    """
    from gossamer.batch import BatchRunner

    adapters = adapters_of(lora, model)
    ranks = take_part(options)
    progress = _BatchProgress()
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
        work.answered.update(ranks.first(sorted(work.answered)))
    with load_llm(model, options, threads, adapters) as llm:
        interrupted = False
        try:
            with progress:
                work.run(llm)
        except KeyboardInterrupt:
            interrupted = True
        summary = work.summary
        if as_json:
            typer.echo(
                json.dumps(
                    asdict(summary)
                    | {"interrupted": interrupted, "engine": llm.stats().to_dict() if llm.generates else None}
                )
            )
        else:
            typer.echo(_describe(summary))
    for failure in summary.first_failures:
        notice(failure, "yellow")
    if summary.failed > len(summary.first_failures):
        notice(f"... and {summary.failed - len(summary.first_failures)} more failures in {output}")
    if interrupted:
        notice(f"Stopped. The answers so far are in {output}; the same command with --resume continues.")
        raise typer.Exit(130)
    raise typer.Exit(1 if summary.failed else 0)


class _BatchProgress:
    """A bar for answers, with the rates that tell whether sharing pays."""

    def __init__(self) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("answers"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            console=stderr,
        )
        self._task = self._bar.add_task("answers", total=None, rates="")

    def update(self, summary: BatchSummary) -> None:
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
