"""``gossamer eval --prefix-eps``: what attention to a long prefix within a tolerance costs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gossamer.cli.engine_options import load_llm
from gossamer.cli.measured_text import cut_windows, describe_text
from gossamer.options import Options
from gossamer.progress import Progress

if TYPE_CHECKING:
    from gossamer.report.prefix_tolerance import ToleranceQuality


def evaluate_prefix_tolerance(
    model: str,
    options: dict[str, Any],
    threads: int | None,
    text: Path | None,
    content: str,
    window: int,
    windows: int | None,
    as_json: bool,
) -> None:
    """Scores the windows of a text twice and prints the difference."""
    from gossamer.report.prefix_tolerance import STEP, evaluate_tolerance

    tolerant = Options.of({"runner": "native", "max_num_batched_tokens": STEP, "max_num_seqs": 2} | options)
    exact_ones = replace(tolerant, runner=tolerant.runner.exactly())
    within, exact = (load_llm(model, each.changed(), threads) for each in (tolerant, exact_ones))
    cut = cut_windows(within.tokenizer, content, window, windows)
    with Progress(len(cut)) as progress:
        quality = evaluate_tolerance(within, exact, cut, progress=progress.advance)
    if as_json:
        asked = {"model": model, "text": text and str(text), "window": window} | options
        typer.echo(json.dumps(asked | quality.to_dict()))
    else:
        _print(quality, f"{model} on {describe_text(text)}")


def _print(quality: ToleranceQuality, what: str) -> None:
    tolerance, interval = quality.tolerance, quality.perplexity_ratio_interval
    typer.echo(f"{what}: {quality.tokens:,} tokens over {quality.windows} prefixes")
    typer.echo(f"perplexity {quality.perplexity:.4f}, exactly {quality.exact_perplexity:.4f}")
    change = f"change {100 * (quality.perplexity_ratio - 1):+.3f} %"
    if interval is not None:
        change += f" (95 %: {100 * (interval[0] - 1):+.3f} to {100 * (interval[1] - 1):+.3f})"
    typer.echo(change)
    if tolerance["computed"] is None:
        return
    typer.echo(
        f"{tolerance['computed']:.1%} of the pairs of queries and keys of the prefix were computed; error measured "
        f"{tolerance['error']:.3f} (asked: {tolerance['eps']:g}), worst head {tolerance['worst_head']:.3f}; "
        f"{tolerance['exact_heads']} of {tolerance['heads']} heads exact"
    )
