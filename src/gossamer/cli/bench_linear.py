"""``gossamer bench linear``: int8 linear layers beside each other, in one run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gossamer.cli.bench_format import Isa, names, numbers, optional, print_grouped
from gossamer.cli.engine_options import AsJson, Threads
from gossamer.cli.terminal import stderr


def linear(
    dims: Annotated[
        str, typer.Option(help="Inner dimensions of the layer dim -> 4 dim.")
    ] = "768,1024,1536,2048,2560,4096,5120",
    rows: Annotated[str, typer.Option(help="Rows of activations (tokens) multiplied at once.")] = "1,8,64,512",
    peers: Annotated[
        str, typer.Option(help="What to compare with; those that are not installed are named and left out.")
    ] = "torch-fp32,torch-bf16,torch-int-mm,bitsandbytes,torchao",
    isa: Isa = "",
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds that count; every contestant computes once in each.")
    ] = 15,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Multiply with an int8 weight: our op, PyTorch in fp32 and bf16, and other int8 implementations.

    The shapes are those of the paper (a feed-forward block's first layer). The contestants compute in turn, with
    weights that come from memory and activations that have outliers. Medians are shown, and the floor: the time in
    which this machine, at its measured ceilings, could multiply the codes or read them.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.linear import bench_linear

    with stderr.status("starting") as status:
        report = bench_linear(
            dims=tuple(numbers(dims, "dims")),
            rows=tuple(numbers(rows, "rows")),
            peers=names(peers),
            isas=names(isa),
            repeats=repeats,
            progress=status.update,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(report)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console

    machine = report["machine"]
    console = Console()
    console.width = max(console.width, 96)  # a narrow terminal may wrap the table; columns cut short help nobody
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    console.print(
        f"int8 product {optional(machine['int8_gops'], '{:,.0f}') or 'no'} GOP/s, "
        f"memory {machine['read_gb_per_s']:,.0f} GB/s"
    )
    for name, version in report["peers"].items():
        console.print(f"{name} {version}" if version else f"{name} is not installed")
    columns = ("ms", "GOP/s", "over\nfp32", "over\nbf16", "floor\nms", "of\nfloor", "error")
    print_grouped(console, report["results"], ("dim", "rows"), columns, _cells)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        optional(row["ms"], "{:,.3f}"),
        optional(row["gops"], "{:,.0f}"),
        optional(row["over_fp32"], "{:.2f}x"),
        optional(row["over_bf16"], "{:.2f}x"),
        optional(row["floor_ms"], "{:,.3f}"),
        optional(row["floor_share"], "{:.0%}"),
        optional(row["relative_error"], "{:.1%}"),
    ]
