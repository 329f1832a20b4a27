"""``gossamer bench``: figures, with the command that prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.bench_attention import attention
from gossamer.cli.bench_deploy import deploy
from gossamer.cli.bench_embed import embed
from gossamer.cli.bench_fisher import fisher
from gossamer.cli.bench_format import Isa, names, numbers, optional
from gossamer.cli.bench_kernel import kernel
from gossamer.cli.bench_linear import linear
from gossamer.cli.bench_peers import peer_lines
from gossamer.cli.bench_restart import restart
from gossamer.cli.bench_serve import serve
from gossamer.cli.bench_speculate import speculate
from gossamer.cli.bench_tools import tools
from gossamer.cli.engine_options import AsJson, Threads, combinations, takes_options
from gossamer.cli.terminal import stderr
from gossamer.options import ModelOptions, Options, RunnerOptions

bench_app = typer.Typer(
    help="Measure on this machine: our figure, what it is compared with, and the machine's own limit.",
    no_args_is_help=True,
)


@bench_app.command()
@takes_options(ModelOptions, RunnerOptions, compare=True)
def decode(
    model: Annotated[str, typer.Option(help="As for `gossamer batch`.")] = "smollm2-135m",
    batch: Annotated[str, typer.Option(help="Sequences that decode together; several: 8,64.")] = "64",
    prefix: Annotated[str, typer.Option(help="Tokens that all sequences share; several: 128,2048.")] = "2048",
    suffix: Annotated[int, typer.Option(min=1, help="Prompt tokens that each sequence has of its own.")] = 32,
    new: Annotated[int, typer.Option(min=5, help="Tokens each sequence generates; the first steps warm up.")] = 32,
    sharing: Annotated[
        str,
        typer.Option(
            help="attention (one product for all), storage (one copy, every sequence attends on its own), off; "
            "no-attention leaves attention out and shows what no way of sharing can exceed (for transformers)."
        ),
    ] = "attention,storage,off,no-attention",
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    isa: Isa = "",
    memory: Annotated[str, typer.Option(help="Budget for keys and values of each contestant.")] = "16GB",
    peers: Annotated[
        str,
        typer.Option(
            help="Other projects to decode the same prompts beside it: llama.cpp, openvino, vllm, ctranslate2, "
            "transformers, or all. `make bench-peers` installs them."
        ),
    ] = "",
    peers_in: Annotated[Path, typer.Option(help="The directory with their environments.")] = Path(".venv-bench"),
    peer_timeout: Annotated[float, typer.Option(min=1, help="Seconds a peer may take for one turn or prefill.")] = 600,
    busy: Annotated[
        int,
        typer.Option(min=0, help="Other processes that use a core each meanwhile: how it behaves on a busy machine."),
    ] = 0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Decode many sequences over one shared prefix, with each way of sharing it.

    The contestants take their steps in turn, on real text, with the same weights. Medians are shown, and the floor:
    the time in which this machine, at its measured ceilings, could do the same arithmetic and memory traffic. The
    ceilings are measured in turn with the steps, and the best of each combination counts.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.decode import bench_decode
    from gossamer.bench.peers.contest import PeerOptions, peer_names
    from gossamer.sizes import parse_bytes

    choices = [Options.of(each) for each in combinations(options)]
    with stderr.status("starting") as status:
        report = bench_decode(
            model,
            batches=numbers(batch, "batch"),
            prefixes=numbers(prefix, "prefix"),
            suffix=suffix,
            new=new,
            sharing=tuple(mode.strip() for mode in sharing.split(",")),
            options=choices[0].model,
            runners=[choice.runner for choice in choices],
            isas=names(isa),
            memory=parse_bytes(memory),
            busy_processes=busy,
            peers=PeerOptions(peer_names(peers), peers_in, peer_timeout) if peers else None,
            progress=status.update,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(report)


bench_app.command()(linear)
bench_app.command()(attention)
bench_app.command()(fisher)
bench_app.command()(kernel)
bench_app.command()(serve)
bench_app.command()(restart)
bench_app.command()(deploy)
bench_app.command()(embed)
bench_app.command()(tools)
bench_app.command()(speculate)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    console = Console()
    # a narrow terminal may wrap the table; columns cut short help nobody
    console.width = max(console.width, 140)
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    if machine["busy_processes"]:
        console.print(f"{machine['busy_processes']} other processes use a core each")
    console.print(f"matrix product {machine['gemm_gflops']:,.0f} GFLOP/s, memory {machine['read_gb_per_s']:,.0f} GB/s")
    for line in peer_lines(report.get("peers", {})):
        console.print(line, soft_wrap=True, markup=False)
    table = Table()
    for name in (
        "batch",
        "prefix",
        "sharing",
        "tok/s",
        "over\noff",
        "ms/\nstep",
        "floor\nms",
        "of\nfloor",
        "engine\nms",
        "sample\nms",
        "K/V\nMB",
        "prompt tokens\ncomputed",
    ):
        table.add_column(name, justify="left" if name == "sharing" else "right", no_wrap=True)
    if states := any(row["states"] is not None for row in report["results"]):
        table.add_column("states\nkept", justify="right", no_wrap=True)
    if "peers" in report:
        table.add_column("prefix\ntok/s", justify="right", no_wrap=True)
    several = len({row["isa"] for row in report["results"]} - {None}) > 1
    if several:
        table.add_column("isa", no_wrap=True)
    ways = {row["sparse_weights"] for row in report["results"]} - {None}
    if len(ways) > 1:
        for name in ("sparse\nweights", "weights\nMB", "over\ndense"):
            table.add_column(name, justify="right", no_wrap=True)
    tolerances = any(row["prefix_tolerance"] for row in report["results"])
    if tolerances:
        for name in ("prefix\neps", "keys\nused", "error", "over\nexact"):
            table.add_column(name, justify="right", no_wrap=True)
    invariant = any(row["batch_invariant"] for row in report["results"])
    if invariant:
        for name in ("batch\ninvariant", "over\nvariant"):
            table.add_column(name, justify="right", no_wrap=True)
    for row in report["results"]:
        contestant = row["runner"] if row["sharing"] == "peer" else row["sharing"]
        cells = [str(row["batch"]), str(row["prefix"]), contestant]
        if row["error"]:
            console.print(f"{' x '.join(cells[:2])} tokens, {cells[2]}: {row['error']}", soft_wrap=True, markup=False)
            continue
        table.add_row(
            *cells,
            f"{row['decode_tokens_per_s']:,.0f}",
            optional(row["speedup"], "{:.2f}x"),
            f"{row['step_ms']:,.1f}",
            optional(row["floor_ms"], "{:,.0f}"),
            optional(row["floor_share"], "{:.0%}"),
            optional(row["engine_ms"], "{:.2f}"),
            optional(row["sampling_ms"], "{:.2f}"),
            optional(row["kv_bytes"] and row["kv_bytes"] / 1e6, "{:,.0f}"),
            "" if row["computed_tokens"] is None else f"{row['computed_tokens']:,} of {row['prompt_tokens']:,}",
            *([optional(row["states"], "{}")] if states else []),
            *([optional(row["prefix_tokens_per_s"], "{:,.0f}")] if "peers" in report else []),
            *([row["isa"] or ""] if several else []),
            *(_way_cells(row) if len(ways) > 1 else []),
            *(_tolerance_cells(row) if tolerances else []),
            *(["yes" if row["batch_invariant"] else "", optional(row["over_variant"], "{:.2f}x")] if invariant else []),
        )
    console.print(table)


def _tolerance_cells(row: dict[str, Any]) -> list[str]:
    found = row["prefix_tolerance"] or {"computed": None, "error": None, "eps": 0.0}
    cells = [optional(found["computed"], "{:.0%}"), optional(found["error"], "{:.3f}")]
    return [f"{found['eps']:g}", *cells, optional(row["over_exact"], "{:.2f}x")]


def _way_cells(row: dict[str, Any]) -> list[str]:
    megabytes = row["weight_bytes"] and row["weight_bytes"] / 1e6
    return [row["sparse_weights"] or "", optional(megabytes, "{:,.1f}"), optional(row["over_dense"], "{:.2f}x")]
