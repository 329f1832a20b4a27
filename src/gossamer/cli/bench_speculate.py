"""``gossamer bench speculate``: several tokens per step."""

from __future__ import annotations

import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.bench_format import names, numbers, optional
from gossamer.cli.engine_options import AsJson, Threads, load_llm, takes_options
from gossamer.cli.terminal import stderr

_TASKS = "quotes,summary,edit,predicted-edit,json,chat,harbour"


@takes_options()
def speculate(
    model: Annotated[str, typer.Option(help="As for `gossamer serve`; made for conversations.")] = "smollm2-135m",
    tasks: Annotated[str, typer.Option(help="Some of these.")] = _TASKS,
    batch: Annotated[str, typer.Option(help="Requests at once; several: 1,8.")] = "1,8",
    mode: Annotated[
        str,
        typer.Option(help="forced (every token is that of a reference answer), free (what the model says), or both."),
    ] = "forced,free",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    requests: Annotated[int, typer.Option(min=1, help="Requests of a task where they come one at a time.")] = 4,
    context: Annotated[int, typer.Option(min=1, help="Tokens of a prompt and its answer at most.")] = 2048,
    new: Annotated[int, typer.Option(min=16, help="Tokens of an answer at most.")] = 384,
    harbour: Annotated[Path, typer.Option(help="The directory of the harbour example.")] = Path("examples/harbour"),
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    peers: Annotated[
        str, typer.Option(help="Other projects that draft, in free mode: llama.cpp, xllamacpp, vllm, or all.")
    ] = "",
    peer_modes: Annotated[
        str,
        typer.Option(
            help="Their ways of drafting: ngram-simple, ngram-map-k, ngram-map-k4v, ngram-mod, ngram-cache, "
            "ngram; all of them by default."
        ),
    ] = "",
    peers_in: Annotated[Path, typer.Option(help="The directory with their environments.")] = Path(".venv-bench"),
    peer_timeout: Annotated[float, typer.Option(min=1, help="Seconds a peer may take to start, or to answer.")] = 600,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Answer the same requests with drafts and without, in turn, and see what drafts gain.

    Only decoding is timed: prompts are computed before. **tok/step** is what a sequence got in a step, **over off** the
    speed over that without drafts, **same** the share of answers with the same tokens in both. **ours over** compares
    our speed with a peer's, with drafts on both sides.
    """
    from gossamer.bench.peers.speculation import PeerOptions, peer_names
    from gossamer.bench.speculate import SpeculateOptions, bench_speculate

    asked = SpeculateOptions(
        tasks=names(tasks),
        batches=tuple(numbers(batch, "batch")),
        modes=names(mode),
        rounds=rounds,
        requests=requests,
        context=context,
        new=new,
        harbour=harbour,
        peers=PeerOptions(peer_names(peers), names(peer_modes), peers_in, peer_timeout),
    )
    # so that no server is left behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with load_llm(model, options, threads) as llm, stderr.status("starting") as status:
        told = partial(stderr.print, soft_wrap=True, highlight=False)
        report = bench_speculate(llm, asked, progress=status.update, told=told)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    console = Console()
    console.width = max(console.width, 132)  # a narrow terminal may wrap the table; columns cut short help nobody
    console.print(f"{machine['cpu']}, {machine['threads']} threads; {report['model']}, weights {report['weights']}")
    console.print(f"prompts and answers of up to {report['context']} tokens, answers of up to {report['new']}")
    for name, about in report["peers"].items():
        if about:
            console.print(f"{name}: {about['version']}; weights {about['weights']}", soft_wrap=True, markup=False)
    table = Table()
    for name in (
        "task",
        "batch",
        "mode",
        "",
        "tok/step",
        "accepted",
        "tok/s",
        "off",
        "over\noff",
        "ours\nover",
        "same",
    ):
        table.add_column(name, justify="left" if name in ("task", "mode", "") else "right", no_wrap=True)
    table.add_column("accepted of drafted, by source", overflow="fold")
    for row in report["results"]:
        if row["error"] is None:
            table.add_row(*_cells(row))
    console.print(table)
    for row in report["results"]:
        if row["error"] is not None:
            place = f"{row['task']}, batch {row['batch']}, {row['mode']}, {row['contestant']}"
            console.print(f"{place}: {row['error']}", soft_wrap=True, markup=False)


def _cells(row: dict[str, Any]) -> list[str]:
    sources = row["by_source"].items()
    return [
        row["task"],
        str(row["batch"]),
        row["mode"],
        row["contestant"],
        optional(row["tokens_per_step"], "{:.2f}"),
        f"{row['accepted'] / row['drafted']:.0%}" if row["drafted"] else "",
        f"{row['tokens_per_s']:,.1f}",
        optional(row["tokens_per_s_off"], "{:,.1f}"),
        optional(row["ratio"], "{:.2f}x"),
        optional(row["over_peer"], "{:.2f}x"),
        optional(row["same"], "{:.0%}"),
        ", ".join(f"{name} {each['accepted_tokens']}/{each['draft_tokens']}" for name, each in sources),
    ]
