"""``gossamer bench kernel``: products with Gaussian kernel matrices."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gossamer.cli.bench_format import optional
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

    "first" builds the index of the points for one product, "again" has it, and "x first" and "x again" are how many
    times faster than our exact product that is. Where approximating does not pay, the product is exact, and "how" says
    so. The growth is fitted over all --n of a family.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.kernel import KernelResult, bench_kernel
    from gossamer.errors import ConfigurationError

    try:
        sizes = [int(size) for size in n.split(",")]
    except ValueError:
        raise ConfigurationError(f"--n is a list of whole numbers with commas between them, got {n!r}") from None
    families = family or ["clustered", "manifold"]
    if not as_json:
        typer.echo(f"{'points':10}{'n':>9}" + "".join(f"{name:>9}" for name in _COLUMNS) + "  how")
    with stderr.status("starting") as status:

        def show(result: KernelResult) -> None:
            if not as_json:
                status.stop()  # while it turns, what goes to stdout would come out on stderr
                typer.echo(_line(result.to_dict()))
                status.start()

        report = bench_kernel(
            families=families,
            sizes=sizes,
            d=d,
            eps=eps,
            repeats=repeats,
            keops=keops,
            progress=status.update,
            on_result=show,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    machine = report["machine"]
    typer.echo(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}; seconds; eps = {eps:g}")
    for name, growth in report["growth"].items():
        if growth["exact"] is not None:
            fitted = ", ".join(f"{what} n^{growth[what]:.2f}" for what in ("exact", "first", "sampled"))
            typer.echo(f"{name}: {fitted} (published bound n^{growth['published']:.2f})")


_COLUMNS = ("exact", "KeOps", "floor", "first", "again", "x first", "x again", "error", "of K")


def _line(row: dict[str, Any]) -> str:
    """A result under the heading; "x first" is how many times faster than exact the first product is."""
    figures = [optional(row[name], "{:.3f}") for name in ("exact", "keops", "floor", "first", "sampled")]
    figures += [f"{row[name]:.2f}" for name in ("speedup_first", "speedup")]
    figures += [f"{each:.3f}" for each in (row["error"], row["report"]["entries"])]
    columns = "".join(f"{each:>9}" for each in figures)
    return f"{row['family']:10}{row['n']:>9,}{columns}  {row['report']['mode']}"
