"""``gossamer bench fisher``: inverse Fisher matrices beside what they are measured against."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gossamer.cli.engine_options import AsJson, Threads
from gossamer.cli.terminal import stderr


def fisher(
    m: Annotated[int, typer.Option("--m", min=1, help="Gradients of the static matrix.")] = 256,
    d: Annotated[int, typer.Option("--d", min=1, help="Numbers of each of them.")] = 100_000,
    window: Annotated[int, typer.Option(min=1, help="Gradients of the sliding window, and of the optimizer.")] = 32,
    parameters: Annotated[int, typer.Option(min=1, help="Numbers of each of these.")] = 4_000_000,
    largest: Annotated[
        int, typer.Option(min=1, help="Numbers of a gradient up to which growth is shown; 1e8 writes 6.4 GB to a file.")
    ] = 10_000_000,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count.")] = 5,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Build inverse Fisher matrices (M-FAC), take elements of them, make steps with a window and with the optimizer.

    Beside each figure stands another one of the same run: the recursion as it was published, as many fp64 products or
    bytes at the speed that this machine reaches, other optimizers. Ratios say how far apart they are.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.fisher import bench_fisher

    with stderr.status("starting") as status:
        report = bench_fisher(
            m=m,
            d=d,
            window=window,
            parameters=parameters,
            largest=largest,
            repeats=repeats,
            progress=status.update,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    console = Console()
    console.width = max(console.width, 108)
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    table = Table()
    for name in ("", "with", "ms", "beside", "its ms", "ours /\nits"):
        table.add_column(name, justify="left" if name in ("", "with", "beside") else "right", no_wrap=True)
    for row in report["results"]:
        figures = f"{row['ms']:,.3f}", row["against"], f"{row['against_ms']:,.3f}", f"{row['ratio']:.2f}"
        table.add_row(row["measure"], row["setting"], *figures)
    console.print(table)
