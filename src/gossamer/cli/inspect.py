"""``gossamer inspect``: a model's outlier features, what it loses without them, and its memory under each scheme.

With ``--attention`` it is :mod:`gossamer.cli.inspect_attention` instead.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Dtype, Model, Threads
from gossamer.cli.inspect_attention import inspect_attention
from gossamer.cli.measured_text import Text, Window, cut_windows, describe_text, load, read, stored_weights
from gossamer.cli.terminal import notice
from gossamer.options import ModelOptions
from gossamer.progress import Progress

if TYPE_CHECKING:
    from rich.table import Table

    from gossamer.report.ablation import Ablation
    from gossamer.report.outliers import Feature, OutlierReport


def inspect(
    model: Model,
    text: Text = None,
    magnitude: Annotated[float, typer.Option(help="Smallest magnitude of an outlier.")] = 6.0,
    layers: Annotated[
        float, typer.Option(min=0, max=1, help="Smallest share of layers that a feature affects.")
    ] = 0.25,
    tokens: Annotated[float, typer.Option(min=0, max=1, help="Smallest share of positions that it affects.")] = 0.06,
    window: Window = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows at most.")] = 4,
    html: Annotated[Path | None, typer.Option(help="Write the report to this file, with a chart.")] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation/--no-ablation", help="Measure the model without its features.")
    ] = True,
    attention: Annotated[
        bool, typer.Option("--attention", help="Show how sparse attention is, of each head, instead of outliers.")
    ] = False,
    length: Annotated[int, typer.Option(min=2, help="With --attention: tokens of the text.")] = 512,
    dtype: Dtype = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Show a model's outlier features: the dimensions that make 8-bit products hard, and that it cannot do without.

    An outlier is a value of at least --magnitude in the input of a linear layer. A feature is a dimension with outliers
    in at least --layers of the layers and --tokens of the positions, as in the LLM.int8() paper. Its features are then
    set to zero, and as many random dimensions for comparison.

    With --attention, what is shown instead is whether the attention of each head is sparse enough for fast kernel
    products, on the first --length tokens of the text. That works with encoders such as BERT, too.
    """
    if html is not None:
        from gossamer.report.html import check_writable

        check_writable(html)
    if attention:
        inspect_attention(model, text, length, html, dtype, threads, as_json)
        return
    content = read(text)
    # What is looked at are linear layers of PyTorch.
    network, tokenizer = load(model, ModelOptions(dtype=dtype, weights="dequantized"), threads)
    cut = cut_windows(tokenizer, content, window, windows)
    # Imported here: PyTorch takes seconds, and what is wrong with the arguments should show before.
    from gossamer.report.ablation import ablate, passes
    from gossamer.report.outliers import find_outliers

    with Progress(len(cut)) as progress:
        report = find_outliers(network, cut, magnitude, layers, tokens, progress=lambda _: progress.advance())
    ablations: tuple[Ablation, ...] = ()
    if ablation and (total := passes(report, len(cut))):
        with Progress(total) as progress:
            ablations = ablate(network, cut, report, progress=lambda _: progress.advance())
    memory = memory_by_scheme(network)
    source = describe_text(text)
    if html is not None:
        from gossamer.report.html import render, write

        write(html, render(report, ablations, memory, model=model, text=source))
        notice(f"The report is in {html}", "dim")
    if as_json:
        about = {"model": model, "text": text and str(text), "window": window, "windows": len(cut)}
        found = {"ablation": [each.to_dict() for each in ablations], "memory": memory}
        typer.echo(json.dumps(about | report.to_dict() | found))
    else:
        stored = stored_weights(network)
        _print(report, ablations, memory, f"{model}{f' (weights: {stored})' if stored else ''} on {source}")


def memory_by_scheme(model: Any) -> dict[str, dict[str, int]]:
    """Bytes of the parts of a model: part -> ``fp32``, ``bf16`` or ``int8`` -> bytes.

    With int8, linear layers take a byte per weight and an fp32 scale per output; everything else stays in 16 bit.
    """
    from torch import nn

    from gossamer.report.outliers import is_linear, is_packed_experts

    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    counts = dict.fromkeys(("linear layers", "packed experts", "embeddings and output head", "everything else"), 0)
    counted: set[int] = set()

    def count(part: str, *weights: Any) -> None:
        for weight in weights:
            if id(weight) not in counted:  # a tied output head is the embedding
                counted.add(id(weight))
                counts[part] += weight.numel()

    scales = 0
    for module in model.modules():
        if module is head or module is inputs or isinstance(module, nn.Embedding):
            count("embeddings and output head", module.weight)
        elif is_linear(module):
            count("linear layers", module.weight)
            scales += module.nf if hasattr(module, "nf") else module.out_features  # the former is Conv1D's
        elif is_packed_experts(module):
            count("packed experts", *module.parameters(recurse=False))
    count("everything else", *model.parameters())
    sizes = {
        part: {"fp32": 4 * number, "bf16": 2 * number, "int8": 2 * number} for part, number in counts.items() if number
    }
    sizes["linear layers"]["int8"] = counts["linear layers"] + 4 * scales
    return sizes


# --- tables ----------------------------------------------------------------------------------------------------------


def _print(
    report: OutlierReport, ablations: tuple[Ablation, ...], memory: dict[str, dict[str, int]], title: str
) -> None:
    from rich.console import Console

    from gossamer.report.html import percent, remarks

    console = Console(highlight=False)
    console.width = max(console.width, 100)  # a narrow terminal may wrap the tables; columns cut short help nobody
    say = partial(console.print, markup=False, soft_wrap=True)
    say(f"{title}: {report.num_layers} layers, {report.positions:,} tokens")
    say(
        f"Outliers have a magnitude of {report.magnitude:g} or more; features have them in at least "
        f"{100 * report.layers:g} % of the layers and {100 * report.tokens:g} % of the positions."
    )
    console.print(_features(report))
    for remark in remarks(report):
        say(remark)
    console.print(_by_layer(report))
    for each in report.inputs:
        if each.layer is None:
            tokens = f"at {percent(each.tokens)} of tokens, largest {each.largest:.1f}"
            say(f"{each.label}: {each.dimensions} dimensions with outliers, {tokens}")
    if report.unseen:
        say(f"Not seen: {', '.join(report.unseen)}")
    if ablations:
        console.print(_ablations(ablations))
    console.print(_memory(memory))


def _features(report: OutlierReport) -> Table:
    from rich.table import Table

    from gossamer.report.html import FEATURES_SHOWN, figure, percent

    def cells(feature: Feature) -> list[str]:
        sign = ("+" if feature.positive else "-") if feature.one_sided else f"{percent(feature.positive)} +"
        quartiles = ", ".join(map(figure, feature.quartiles))
        return [str(feature.dimension), percent(feature.layers, 0), percent(feature.tokens), quartiles, sign]

    table = Table(
        "inputs", "dimension", "layers", "positions", "quartiles", "sign", title="Features", title_justify="left"
    )
    for group in report.groups:
        for feature in group.features[:FEATURES_SHOWN]:
            table.add_row(group.name, *cells(feature))
        if len(group.features) > FEATURES_SHOWN:
            table.add_row(f"  and {len(group.features) - FEATURES_SHOWN} more", style="dim")
        if not group.features:
            table.add_row(group.name, "none" if group.nearest else "no outlier")
        if group.nearest:
            table.add_row("  affects most positions", *cells(group.nearest), style="dim")
    return table


def _by_layer(report: OutlierReport) -> Table:
    from rich.table import Table

    from gossamer.report.html import figure, percent

    inputs = {(each.layer, each.label): each for each in report.inputs if each.layer is not None}
    labels = list(dict.fromkeys(label for _, label in inputs))
    table = Table(title="Dimensions with outliers, share of tokens with one, largest magnitude", title_justify="left")
    table.add_column("layer", justify="right")
    for label in labels:
        table.add_column(label.replace("/", "/\n"), justify="right")
    for layer in sorted({layer for layer, _ in inputs if layer is not None}):
        cells = []
        for label in labels:
            each = inputs.get((layer, label))
            cells.append(f"{each.dimensions} {percent(each.tokens):>7} {figure(each.largest):>7}" if each else "")
        table.add_row(str(layer), *cells)
    return table


def _ablations(ablations: tuple[Ablation, ...]) -> Table:
    from rich.table import Table

    from gossamer.report.html import effects, figure, percent

    table = Table(title="Without the features", title_justify="left")
    for name in ("inputs", "set to zero", "perplexity", "change", "most probable\ntoken", "largest\nattention weight"):
        table.add_column(name, justify="left" if len(table.columns) < 2 else "right")
    for ablation in ablations:
        for name, effect, change in effects(ablation):
            attention = "" if effect.attention_top1 is None else percent(effect.attention_top1, 2)
            top1 = percent(effect.top1, 2)
            table.add_row(ablation.group, name, figure(effect.perplexity, 2), change, top1, attention)
        table.add_section()
    return table


def _memory(memory: dict[str, dict[str, int]]) -> Table:
    from rich.table import Table

    from gossamer.report.html import figure

    schemes = ("fp32", "bf16", "int8")
    table = Table(title="Memory of the weights, in MB", title_justify="left", show_footer=True)
    table.add_column("", footer="all")
    for scheme in schemes:
        total = sum(sizes[scheme] for sizes in memory.values())
        table.add_column(scheme, justify="right", footer=figure(total / 1e6))
    for part, sizes in memory.items():
        table.add_row(part, *(figure(sizes[scheme] / 1e6) for scheme in schemes))
    return table
