"""Which int8 activations quantized weights need: what each way of rounding them does to a model of a GGUF file.

    python scripts/activation_scales.py smollm2-135m-Q4_1.gguf --windows 16      (some minutes on one core)

The weights are dequantized to fp32 and the model computed in fp32, once as it is and once for each setting with the
input of every linear layer rounded, the output layer's included. So the table shows the activations alone.

* One scale, absmax / 127 in fp32, covers a whole token, or a block of 256 or of 32 of its entries; codes are rounded to
  the nearest, ties to even. What does not fill a block is a block of its own.
* Outliers, with |x| > 6 mean |token| (:func:`gossamer.ops.int8.outlier_mask`), stay in floating point, or do not.

Behind +- stands the standard error of the change, from the differences of single tokens.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from gossamer.models.load import load_model
from gossamer.models.resolve import resolve_model
from gossamer.ops.int8 import outlier_mask, quantize_rowwise
from gossamer.report.quality import row_chunks, window_logits
from gossamer.texts import reference_text, token_windows

THRESHOLD = 6.0  # of the relative criterion
BLOCKS = (None, 256, 32)  # entries of a token that have a scale; None: all of them


def in_blocks(rows: Tensor, block: int | None) -> Tensor:
    """What int8 codes of rows (M, K) fp32 stand for, with a scale for every ``block`` entries of a row."""
    size = block or rows.shape[1]
    whole = rows.shape[1] // size * size
    parts = (rows[:, :whole].unflatten(1, (-1, size)), rows[:, None, whole:])
    rounded = [(codes * scale[..., None]).flatten(1) for codes, scale in map(quantize_rowwise, parts)]
    return torch.cat(rounded, dim=1)


@dataclass
class Setting:
    """A way to round activations, and what it did: sums over all tokens so far."""

    block: int | None
    outliers: bool
    kept: int = 0  # entries in floating point, of
    entries: int = 0
    losses: list[Tensor] = field(default_factory=list)  # log q - log p of the text's tokens
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)

    def round(self, layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """The input of a linear layer as this setting has it; a hook before its forward."""
        rows = inputs[0].flatten(0, -2)
        self.entries += rows.numel()
        if not self.outliers:
            return (in_blocks(rows, self.block).view_as(inputs[0]),)
        mask = outlier_mask(rows, THRESHOLD, "relative", "token")
        self.kept += int(mask.sum())
        rounded = torch.where(mask, rows, in_blocks(rows.masked_fill(mask, 0.0), self.block))
        return (rounded.view_as(inputs[0]),)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        handles = [layer.register_forward_pre_hook(self.round) for layer in layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, logits: Tensor, reference: Tensor, targets: Tensor) -> None:
        """Takes in the logits (T, V) of a window; ``reference`` (T, V) are the logarithms of probabilities."""
        for rows in row_chunks(logits):
            log_p, log_q = logits[rows].log_softmax(-1), reference[rows]
            target = targets[rows, None]
            self.losses.append((log_q.gather(1, target) - log_p.gather(1, target)).squeeze(1).double())
            self.kl.append((log_q.exp() * (log_q - log_p)).sum(-1, dtype=torch.float64))
            self.same.append(log_p.argmax(-1) == log_q.argmax(-1))


def measure(model: Any, windows: list[Tensor]) -> tuple[float, list[Setting]]:
    """The perplexity with fp32 activations, and what every setting did."""
    settings = [Setting(block, outliers) for block in BLOCKS for outliers in (False, True)]
    nll = []
    for window in track(windows, console=Console(stderr=True), disable=not sys.stderr.isatty()):
        targets = window[1:]
        reference = window_logits(model, window).log_softmax(-1)
        nll.append(-reference.gather(1, targets[:, None]).squeeze(1).double())
        for setting in settings:
            with setting.applied(model):
                logits = window_logits(model, window)
            setting.add(logits, reference, targets)
    return math.exp(torch.cat(nll).mean()), settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a GGUF file, or any other model")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--window", type=int, default=512, help="tokens")
    arguments = parser.parse_args()
    file = Path(arguments.model)
    model, tokenizer = load_model(file if file.is_file() else resolve_model(arguments.model), dtype="float32")
    windows = token_windows(tokenizer, reference_text(), arguments.window, arguments.windows)
    perplexity, settings = measure(model, windows)
    title = f"{file.name}, {len(windows)} windows of {arguments.window} tokens, perplexity {perplexity:.4f} in fp32"
    table = Table(title=title)
    columns = ("scale per", "outliers", "perplexity", "change", "mean KL", "max KL", "top-1", "in floating point")
    for name in columns:
        table.add_column(name, justify="right")
    for setting in settings:
        losses, kl = torch.cat(setting.losses), torch.cat(setting.kl)
        ratio = math.exp(losses.mean())
        error = float(losses.std()) / math.sqrt(len(losses))
        table.add_row(
            f"{setting.block}" if setting.block else "token",
            "kept" if setting.outliers else "-",
            f"{perplexity * ratio:.4f}",
            f"{ratio - 1:+.3%} +- {error:.3%}",
            f"{kl.mean():.6f}",
            f"{kl.max():.4f}",
            f"{torch.cat(setting.same).double().mean():.2%}",
            f"{setting.kept / setting.entries:.3%}",
        )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
