"""``gossamer bench restart``: the first token over a long prefix, after a restart."""

from __future__ import annotations

import json
import signal
import sys
from typing import Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Threads
from gossamer.cli.terminal import stderr


def restart(
    model: Annotated[str, typer.Option(help="As for `gossamer serve`.")] = "smollm2-135m",
    prefix: Annotated[int, typer.Option(min=64, help="Tokens of the prefix.")] = 4000,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens of the question behind it.")] = 32,
    quantization: Annotated[str, typer.Option(help="int8, or none for the checkpoint as it is.")] = "int8",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 3,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that an answer, or the start of a server, may take.")
    ] = 600.0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure what `gossamer serve --prefix-dir` saves the first request after a restart.

    A server pins a prefix and is killed. Then servers are started in turn, without its prefix files and with them, and
    each is asked once: **TTFT** is the time to the first token. The files come from the disk, not from the system's
    memory, where the system can be told to forget them.
    """
    import torch

    from gossamer.bench.restart import bench_restart

    # so that no server is left behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with stderr.status("starting") as status:
        report = bench_restart(
            model,
            prefix=prefix,
            suffix=suffix,
            quantization=None if quantization == "none" else quantization,
            repeats=repeats,
            threads=threads or torch.get_num_threads(),
            timeout=timeout,
            progress=status.update,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    console = Console()
    console.print(f"{machine['cpu']}, {machine['threads']} threads; {report['model']}, weights {report['weights']}")
    console.print(
        f"a prefix of {report['prefix']} tokens, {report['suffix']} behind it; {report['file_bytes'] / 1e6:,.1f} MB of "
        "prefix files"
    )
    table = Table()
    for name in ("prefix", "TTFT ms", "cached\ntokens", "rounds"):
        table.add_column(name, justify="left" if name == "prefix" else "right", no_wrap=True)
    for row in report["results"]:
        rounds = ", ".join(f"{each:,.0f}" for each in row["rounds"])
        table.add_row(row["start"], f"{row['ttft_ms']:,.0f}", str(row["cached_tokens"]), rounds)
    console.print(table)
    console.print(f"{report['speedup']:.1f}x shorter")
