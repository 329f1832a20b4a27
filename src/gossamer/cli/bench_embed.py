"""``gossamer bench embed``: embeddings beside another project's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.bench_format import names, optional
from gossamer.cli.engine_options import AsJson, Threads
from gossamer.cli.terminal import stderr
from gossamer.errors import ConfigurationError


def embed(
    model: Annotated[str, typer.Option(help="A model of embeddings, as for `gossamer serve`.")] = "all-minilm-l6-v2",
    file: Annotated[
        Path | None, typer.Option(help="One text per line; sentences of Python's help topics by default.")
    ] = None,
    texts: Annotated[int, typer.Option(min=1, help="How many of them.")] = 2000,
    weights: Annotated[
        str, typer.Option(help="What ours computes with, in turn: float32, bfloat16, int8.")
    ] = "float32,int8",
    peers: Annotated[str, typer.Option(help="sentence-transformers; `make bench-embed` installs it.")] = "",
    peers_in: Annotated[Path, typer.Option(help="The directory with the peers' environments.")] = Path(".venv-bench"),
    peer_timeout: Annotated[float, typer.Option(min=1, help="Seconds a peer may take for all texts.")] = 600,
    batch: Annotated[int, typer.Option(min=1, help="Texts that a peer pads together.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count; everybody embeds all texts in each.")] = 3,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Embed a file of texts, and see how fast it was and how far the vectors are from the peer's.

    The contestants take turns with the same threads, from strings to normalized vectors. Medians are shown; cosines are
    of each text's vector and the first contestant's.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer.bench.embed import bench_embed, peer_names, sentences
    from gossamer.options import ModelOptions

    forms = names(weights)
    unknown = [each for each in forms if each not in ("float32", "bfloat16", "int8")]
    if unknown or not forms:
        raise ConfigurationError(
            f"--weights takes float32, bfloat16 and int8, got {unknown[0] if forms else weights!r}"
        )
    chosen = [ModelOptions(quantization="int8") if each == "int8" else ModelOptions(dtype=each) for each in forms]
    with stderr.status("starting") as status:
        report = bench_embed(
            model,
            texts=sentences(file, texts),
            options=chosen,
            peers=peer_names(peers) if peers else (),
            environments=peers_in,
            batch=batch,
            rounds=rounds,
            timeout=peer_timeout,
            progress=status.update,
        )
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_table(report)


def _print_table(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    machine = report["machine"]
    console = Console()
    console.width = max(console.width, 80)  # a narrow terminal may wrap the table; columns cut short help nobody
    console.print(f"{machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}")
    console.print(f"{report['model']}: {report['texts']:,} texts of {report['characters']:,} characters")
    for name, peer in report["peers"].items():
        versions = ", ".join(f"{package} {version}" for package, version in peer["versions"].items())
        console.print(f"{name}: {versions}; {peer['weights']}, {peer['batch']} texts at a time", soft_wrap=True)
    table = Table()
    for column in ("", "texts/s", "over\npeer", "cosine\nmean", "cosine\nmin"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in report["results"]:
        if row["error"]:
            console.print(f"{row['contestant']}: {row['error']}", soft_wrap=True, markup=False)
            continue
        table.add_row(
            row["contestant"],
            f"{row['texts_per_s']:,.1f}",
            optional(row["over_peer"], "{:.2f}x"),
            f"{row['cosine_mean']:.5f}",
            f"{row['cosine_min']:.5f}",
        )
    console.print(table)
