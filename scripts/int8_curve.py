"""Quality against the share of multiply-adds in floating point: the curve that int8's default settings come from.

    python scripts/int8_curve.py --model smollm2-135m --windows 16

Every setting is measured on the same windows of real text against the model with its original weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from gossamer.bench.machine import describe
from gossamer.models.int8_quantizer import GossamerInt8Config
from gossamer.models.load import load_model
from gossamer.models.resolve import resolve_model
from gossamer.nn import Int8Linear
from gossamer.ops.int8 import outlier_mask
from gossamer.report.quality import Evaluation
from gossamer.texts import reference_text, token_windows

STORES = (0.0, 0.015)
SETTINGS: tuple[tuple[str, float, str | None], ...] = (
    ("absolute", 6.0, None),
    ("absolute", 6.0, "batch"),
    ("absolute", 6.0, "token"),
    ("absolute", 3.0, "token"),
    ("relative", 10.0, "token"),
    ("relative", 6.0, "token"),
    ("relative", 5.0, "token"),
    ("relative", 4.0, "token"),
    ("relative", 3.5, "token"),
    ("relative", 3.0, "token"),
)


@dataclass
class Point:
    """One setting: what it is, what it costs and what it gives."""

    criterion: str
    threshold: float
    outliers: str | None
    outlier_store: float
    share: float  # of multiply-adds in floating point
    perplexity: float
    change: float  # perplexity over the reference's, less 1
    change_interval: tuple[float, float] | None
    kl: float
    top1_agreement: float


class Replay:
    """The reference model, which computes each window only once for all settings."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device, self.config = model.device, model.config
        self._window: Tensor | None = None

    def __call__(self, input_ids: Tensor, **options: Any) -> Any:
        if self._window is None or not input_ids.equal(self._window):
            self._window, self._output = input_ids, self.model(input_ids=input_ids, **options)
        return self._output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)


@contextmanager
def counting(model: Any, counts: list[int]) -> Iterator[None]:
    """Adds up multiply-adds in floating point, and all of them, of the int8 layers."""

    def count(layer: Int8Linear, inputs: tuple[Tensor, ...]) -> None:
        rows = inputs[0].reshape(-1, layer.in_features).float()
        settings = layer.decomposition
        if settings.outliers is not None:
            mask = outlier_mask(rows, settings.threshold, settings.criterion, settings.outliers)  # type: ignore[arg-type]
            counts[0] += int(mask.sum()) * layer.out_features
        counts[1] += rows.numel() * layer.out_features

    layers = [layer for layer in model.modules() if isinstance(layer, Int8Linear)]
    handles = [layer.register_forward_pre_hook(count) for layer in layers]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def measure(model_name: str, windows: int, window: int) -> Iterator[Point]:
    """All settings on one model; the points come when all windows are done."""
    path = resolve_model(model_name)
    original, tokenizer = load_model(path, dtype="float32")
    reference = Replay(original)
    models = {
        store: load_model(path, dtype="float32", quantization=GossamerInt8Config(outlier_store=store))[0]
        for store in STORES
    }
    runs = [(store, setting) for store in STORES for setting in SETTINGS if not store or setting[2] is not None]
    evaluations = [Evaluation(models[store], reference) for store, _ in runs]
    counts = [[0, 0] for _ in runs]
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(model_name, total=windows * len(runs))
        for tokens in token_windows(tokenizer, reference_text(), window, windows):
            for (store, setting), evaluation, count in zip(runs, evaluations, counts, strict=True):
                criterion, threshold, outliers = setting
                decomposition = GossamerInt8Config(threshold, criterion, outliers).decomposition()  # type: ignore[arg-type]
                for layer in models[store].modules():
                    if isinstance(layer, Int8Linear):
                        layer.decomposition = decomposition
                with counting(models[store], count):
                    evaluation.add(tokens)
                bar.advance(task)
    for (store, (criterion, threshold, outliers)), evaluation, count in zip(runs, evaluations, counts, strict=True):
        quality = evaluation.quality()
        low, high = quality.perplexity_ratio_interval or (None, None)
        yield Point(
            criterion,
            threshold,
            outliers,
            store,
            count[0] / count[1],
            quality.perplexity,
            (quality.perplexity_ratio or 0) - 1,
            None if low is None or high is None else (low - 1, high - 1),
            quality.kl or 0.0,
            quality.top1_agreement or 0.0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024, help="tokens")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    points = list(measure(arguments.model, arguments.windows, arguments.window))
    if arguments.json:
        print(json.dumps({"machine": describe(), "model": arguments.model, "points": [asdict(p) for p in points]}))
        return
    table = Table(title=f"{arguments.model}, {arguments.windows} windows of {arguments.window} tokens")
    for name in ("criterion", "threshold", "outliers", "store", "in floating point", "perplexity", "change"):
        table.add_column(name, justify="left" if name in ("criterion", "outliers") else "right")
    for name in ("95 % interval", "KL", "top-1"):
        table.add_column(name, justify="right")
    for point in points:
        interval = point.change_interval
        table.add_row(
            point.criterion if point.outliers else "",
            f"{point.threshold:g}" if point.outliers else "",
            point.outliers or "none",
            f"{point.outlier_store:.1%}",
            f"{point.share:.2%}",
            f"{point.perplexity:.3f}",
            f"{point.change:+.2%}",
            "" if interval is None else f"{interval[0]:+.2%} to {interval[1]:+.2%}",
            f"{point.kl:.5f}",
            f"{point.top1_agreement:.2%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
