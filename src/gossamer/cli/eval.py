"""``gossamer eval``: how well a model predicts a text, alone or against a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Model, Threads, takes_options
from gossamer.cli.measured_text import Text, Window, cut_windows, describe_text, load, read, stored_weights
from gossamer.cli.terminal import notice
from gossamer.errors import ConfigurationError
from gossamer.options import ConversationOptions, EngineOptions, ModelOptions, Options, RunnerOptions, option_fields
from gossamer.progress import Progress

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.report.quality import Interval, Quality


@takes_options()
def evaluate(
    model: Model,
    reference: Annotated[
        str | None, typer.Option(help="A model with the same vocabulary to compare with, named as MODEL is.")
    ] = None,
    text: Text = None,
    window: Window = 1024,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows at most; all of the text by default.")] = None,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure how well a model predicts a text, and how far it is from a reference.

    The text is cut into windows that do not overlap, and every token but the first of each is predicted from those
    before it: perplexity, and against a reference its ratio, KL divergence and agreement. Intervals are 95 %, from a
    bootstrap over windows. --dtype and the int8 options are for MODEL; the reference is taken as it is. Ctrl-C reports
    the windows that are done, with exit status 130.

        gossamer eval smollm2-135m --quantization int8 --reference smollm2-135m

    With --prefix-eps, the last 256 tokens of each window are predicted over the others as over a shared prefix, within
    the tolerance and exactly, natively.

        gossamer eval smollm2-135m --prefix-eps 0.05 --window 4096 --windows 8
    """
    content = read(text)
    chosen = Options.of(options)
    if not chosen.runner.exact:
        from gossamer.cli.eval_prefix import evaluate_prefix_tolerance

        if reference is not None:
            raise ConfigurationError(
                "--prefix-eps compares with exact attention of the same model: leave --reference out"
            )
        evaluate_prefix_tolerance(model, options, threads, text, content, window, windows, as_json)
        return
    _refuse_unused(options)
    network, tokenizer = load(model, chosen.model, threads)
    cut = cut_windows(tokenizer, content, window, windows)
    other = None
    if reference is not None:
        other, other_tokenizer = load(reference, ModelOptions(), threads)
        if not _same(cut, cut_windows(other_tokenizer, content, window, windows)):
            raise ConfigurationError(
                f"the tokenizers of {model} and {reference} split the text differently, so their predictions cannot be "
                "compared; choose a reference with the same tokenizer"
            )
    # Imported here: PyTorch takes seconds, and what is wrong with the arguments should show before.
    from gossamer.report.quality import Evaluation
    from gossamer.runners.loading import weights_of

    evaluation = Evaluation(network, other)
    interrupted = False
    try:
        with Progress(len(cut)) as progress:
            for each in cut:
                evaluation.add(each)
                progress.advance()
    except KeyboardInterrupt:
        interrupted = True
        notice(f"Stopped after {evaluation.windows} of {len(cut)} windows.")
    quality = evaluation.quality() if evaluation.windows else None
    if as_json:
        asked = {"model": model, "reference": reference, "text": text and str(text), "window": window}
        asked |= _described(chosen.model)
        asked |= {"weights": stored_weights(network), "computed": weights_of(network)}
        figures = quality.to_dict() if quality else {"windows": 0}
        typer.echo(json.dumps(asked | figures | {"interrupted": interrupted}))
    elif quality:
        stored = stored_weights(network)
        _print(quality, f"{model} (weights: {stored})" if stored else model, reference, text)
    raise typer.Exit(130 if interrupted else 0)


def _refuse_unused(options: dict[str, Any]) -> None:
    """Without a tolerance the windows are computed by transformers, by themselves: there is no engine."""
    for name in option_fields(RunnerOptions, EngineOptions, ConversationOptions):
        if name in options:
            flag = name.replace("_", "-")
            raise ConfigurationError(f"--{flag} is for the engine, which computes the windows only with --prefix-eps")


def _described(options: ModelOptions) -> dict[str, Any]:
    """What was asked of the model, for JSON."""
    from gossamer.models.load import int8_config

    int8 = int8_config(options)
    return {"dtype": options.dtype, "int8": int8 and int8.to_dict(), "int8_head": options.int8_head}


def _same(ours: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(ours) == len(theirs) and all(bool((a == b).all()) for a, b in zip(ours, theirs, strict=True))


def _print(quality: Quality, model: str, reference: str | None, text: Path | None) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    console.print(
        f"{model} on {quality.windows} windows of {describe_text(text)}, {quality.tokens:,} predicted tokens",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table("", "", "95 % interval")
    for name, value, interval, form in _rows(quality, reference):
        bounds = "" if interval is None else " to ".join(form.format(bound) for bound in interval)
        table.add_row(escape(name), form.format(value), bounds)
    console.print(table)


def _rows(quality: Quality, reference: str | None) -> list[tuple[str, float | None, Interval | None, str]]:
    """Name, value, interval and format of each line."""
    own = ("perplexity", quality.perplexity, quality.perplexity_interval, "{:.3f}")
    if quality.perplexity_ratio is None:
        return [own]
    assert quality.top1_agreement is not None  # it comes with the ratio
    return [
        own,
        (f"perplexity of {reference}", quality.reference_perplexity, None, "{:.3f}"),
        (
            "change of perplexity, %",
            *_percent(quality.perplexity_ratio, quality.perplexity_ratio_interval, 1),
            "{:+.3f}",
        ),
        ("KL divergence, nats per token", quality.kl, quality.kl_interval, "{:.5f}"),
        ("same most probable token, %", *_percent(quality.top1_agreement, quality.top1_agreement_interval), "{:.2f}"),
    ]


def _percent(value: float, interval: Interval | None, base: float = 0.0) -> tuple[float, Interval | None]:
    bounds = None if interval is None else (100 * (interval[0] - base), 100 * (interval[1] - base))
    return 100 * (value - base), bounds
