"""``gossamer inspect --attention``: how sparse every head's attention is on a text."""

from __future__ import annotations

import json
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gossamer.cli.measured_text import describe_text, read
from gossamer.cli.terminal import notice
from gossamer.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from gossamer.report.attention_sparsity import AttentionReport


def inspect_attention(
    model: str, text: Path | None, length: int, html: Path | None, dtype: str, threads: int | None, as_json: bool
) -> None:
    """Runs the model on the first ``length`` tokens of the text and shows the report; the arguments are inspect's."""
    content = read(text)
    network, tokenizer, encoder = _load(model, dtype, threads)
    # Imported here: PyTorch takes seconds, and what is wrong with the arguments should show before.
    from gossamer.report.attention_sparsity import measure_attention, text_tokens

    ids = text_tokens(tokenizer, content, length, encoder=encoder)
    config = network.config.get_text_config(decoder=not encoder)
    with Progress(config.num_hidden_layers * config.num_attention_heads) as progress:
        report = measure_attention(network, ids, progress=lambda _: progress.advance())
    source = describe_text(text)
    if html is not None:
        from gossamer.report.attention_page import render
        from gossamer.report.html import write

        write(html, render(report, model=model, text=source))
        notice(f"The report is in {html}", "dim")
    if as_json:
        typer.echo(json.dumps({"model": model, "text": text and str(text)} | report.to_dict()))
    else:
        _print(report, f"{model} on {source}")


def _load(model: str, dtype: str, threads: int | None) -> tuple[Any, Any, bool]:
    """A decoder or an encoder, its tokenizer, and whether it is the latter."""
    notice(f"Loading {model}", "dim")
    import torch

    from gossamer.models import resolve_model
    from gossamer.models.encoder import is_encoder, load_encoder
    from gossamer.models.load import load_config, load_model

    if threads is not None:
        torch.set_num_threads(threads)
    path = resolve_model(model)
    encoder = is_encoder(load_config(path))
    return (*(load_encoder(path, dtype) if encoder else load_model(path, dtype)), encoder)


def _print(report: AttentionReport, title: str) -> None:
    from rich.console import Console

    from gossamer.report.attention_page import summary

    console = Console(highlight=False)
    console.width = max(console.width, 100)  # a narrow terminal may wrap the table; columns cut short help nobody
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"{title}: {report.tokens:,} tokens, {len(report.heads)} heads")
    console.print(_heads(report))
    for line in summary(report):
        say(line)


def _heads(report: AttentionReport) -> Table:
    from rich.table import Table

    from gossamer.report.attention_page import COLUMNS, cells

    table = Table(title="Attention as a Gaussian kernel matrix", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for _, layer in groupby(report.heads, key=lambda each: each.layer):
        for each in layer:
            table.add_row(*cells(each))
        table.add_section()
    return table
