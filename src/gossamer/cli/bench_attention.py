"""``gossamer bench attention``: attention to a shared prefix, natively and on PyTorch, in one run."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gossamer.cli.bench_format import numbers, optional, print_grouped
from gossamer.cli.engine_options import AsJson, Threads
from gossamer.cli.terminal import stderr


def attention(
    rows: Annotated[
        str, typer.Option(help="Rows per key/value head: sequences times --group. Several: 3,192.")
    ] = "3,24,192",
    keys: Annotated[str, typer.Option(help="Tokens of the prefix; several: 128,2048.")] = "2048",
    dim: Annotated[int, typer.Option(min=2, help="Entries of a head.")] = 64,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 3,
    group: Annotated[int, typer.Option(min=1, help="Query heads per key/value head.")] = 3,
    repeats: Annotated[
        int, typer.Option(min=1, help="Rounds that count; every contestant walks through all layers once in each.")
    ] = 9,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Attend to a shared prefix in bf16: our kernels, our reference on PyTorch, and PyTorch's own attention.

    One layer's figures are shown, with keys and values that come from memory, as in decoding. The contestants compute
    in turn, and beside their medians stand shares of what this machine reached in the same rounds, multiplying and
    reading.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.attention import bench_attention

    with stderr.status("starting") as status:
        report = bench_attention(
            rows=tuple(numbers(rows, "rows")),
            keys=tuple(numbers(keys, "keys")),
            dim=dim,
            kv_heads=kv_heads,
            group=group,
            repeats=repeats,
            progress=status.update,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(report)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console

    machine, first = report["machine"], report["results"][0]
    console = Console()
    console.width = max(console.width, 96)  # a narrow terminal may wrap the table; columns cut short help nobody
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    console.print(
        f"matrix product in bf16 {machine['gemm_gflops']:,.0f} GFLOP/s, memory {machine['read_gb_per_s']:,.0f} GB/s"
    )
    console.print(
        f"{first['kv_heads']} key/value heads of {first['dim']}, {first['group']} query heads for each of them"
    )
    columns = ("ms", "GFLOP/s", "of\nproduct", "GB/s", "of\nmemory", "error")
    print_grouped(console, report["results"], ("rows", "keys"), columns, _cells)


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        optional(row["ms"], "{:,.3f}"),
        optional(row["gflops"], "{:,.0f}"),
        optional(row["gemm_share"], "{:.0%}"),
        optional(row["gb_per_s"], "{:,.1f}"),
        optional(row["read_share"], "{:.0%}"),
        optional(row["relative_error"], "{:.2%}"),
    ]
