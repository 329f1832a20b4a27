"""``gossamer bench kernel``: products with Gaussian kernel matrices."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from gossamer.cli.engine_options import AsJson, Threads
from gossamer.cli.terminal import stderr


def kernel(
    family: Annotated[
        list[str] | None, typer.Option(help="clustered, manifold, gaussian or dense; again for more of them.")
    ] = None,
    n: Annotated[
        str, typer.Option("--n", help="Numbers of points, with commas; 131072 takes minutes.")
    ] = "8192,16384,32768",
    d: Annotated[int, typer.Option("--d", min=1, help="Dimensions.")] = 64,
    eps: Annotated[float, typer.Option(help="Allowed error, in units of |x|.")] = 0.1,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds that count, each with fresh points.")] = 3,
    keops: Annotated[bool, typer.Option(help="Measure KeOps beside ours, if pykeops is installed.")] = True,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Multiply Gaussian kernel matrices with signed vectors: within eps, exactly, and with KeOps.

    "first" builds the index of the points for one product; "again" has it. Where approximating does not pay, the
    product is exact and the table says so. The growth is fitted over all --n of a family.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.kernel import bench_kernel
    from gossamer.errors import ConfigurationError

    try:
        sizes = [int(size) for size in n.split(",")]
    except ValueError:
        raise ConfigurationError(f"--n is a list of whole numbers with commas between them, got {n!r}") from None
    families = family or ["clustered", "manifold"]
    with stderr.status("starting") as status:
        report = bench_kernel(
            families=families, sizes=sizes, d=d, eps=eps, repeats=repeats, keops=keops, progress=status.update
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    console = Console()
    console.width = max(console.width, 118)
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; seconds; eps = {eps:g}")
    table = Table()
    for name in ("points", "n", "exact", "KeOps", "floor", "first", "again", "exact /\nfirst", "exact /\nagain"):
        table.add_column(name, justify="left" if name == "points" else "right", no_wrap=True)
    for name in ("error", "of K", "how"):
        table.add_column(name, justify="left" if name == "how" else "right", no_wrap=True)
    for row in report["results"]:
        table.add_row(
            row["family"],
            f"{row['n']:,}",
            f"{row['exact']:.3f}",
            "-" if row["keops"] is None else f"{row['keops']:.3f}",
            f"{row['floor']:.3f}",
            f"{row['first']:.3f}",
            f"{row['sampled']:.3f}",
            f"{row['speedup_first']:.2f}",
            f"{row['speedup']:.2f}",
            f"{row['error']:.3f}",
            f"{row['report']['entries']:.3f}",
            row["report"]["mode"],
        )
    console.print(table)
    for name, growth in report["growth"].items():
        if growth["exact"] is not None:
            fitted = ", ".join(f"{what} n^{growth[what]:.2f}" for what in ("exact", "first", "sampled"))
            console.print(f"{name}: {fitted} (published bound n^{growth['published']:.2f})")
