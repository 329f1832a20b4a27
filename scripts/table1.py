"""Prints Table 1 of LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339) for real models.

    .venv/bin/python scripts/table1.py                                      all of it (about half an hour)
    .venv/bin/python scripts/table1.py --models smollm2-135m --windows 2    a first look
    .venv/bin/python scripts/table1.py --rows absmax-vector llm-int8 --json

The paper measures perplexity on C4; here it is on the language reference that comes with Python. A window of text is
one batch, so what has one scale per tensor has one per window. The output layer is never quantized.
``NAME:rescaled`` is the model with outlier features made by hand (``gossamer.papers.rescale``): synthetic.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.bench.machine import describe
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.models import resolve_model
from gossamer.models.load import load_model
from gossamer.nn.int8_linear import Decomposition, in_16_bit
from gossamer.nn.outlier_store import find_outlier_columns, random_reading
from gossamer.nn.quantize import OUTLIER_STORE
from gossamer.ops.int8 import int8_linear, outlier_mask
from gossamer.papers.int8_variants import Quantized, Scheme, linear_variant, quantize_weight
from gossamer.papers.rescale import emulate_outliers
from gossamer.report.quality import Evaluation, Quality
from gossamer.texts import reference_text, token_windows

MODELS = ("smollm2-135m", "gemma3-270m", "smollm2-135m:rescaled")
STORE = OUTLIER_STORE  # share of the columns whose weights the outlier store keeps in 16 bit
PAPER = Decomposition(6.0, "absolute", "batch")
OURS = Decomposition()


@dataclass(frozen=True)
class Row:
    """A way to compute a linear layer.

    Attributes:
        label: the paper's, where it is the paper's.
        scheme: one of the paper's; ``None`` for Gossamer's own op, or for fp32.
        outliers: what leaves the int8 product, if anything does.
        store: whether Gossamer's op has 16-bit weights for some columns.
        paper: the paper's perplexity for 13B parameters.
    """

    label: str
    scheme: Scheme | None = None
    outliers: Decomposition | None = None
    store: bool = False
    paper: float | None = None


_OURS_LABEL = f"Gossamer, {OURS.criterion} {OURS.threshold}, {OURS.outliers}"
ROWS = {
    "fp32": Row("fp32", paper=12.45),
    "absmax": Row("Int8 absmax", "absmax", paper=19.08),
    "zeropoint": Row("Int8 zeropoint", "zeropoint", paper=13.94),
    "absmax-row": Row("Int8 absmax row-wise", "absmax row-wise", paper=16.49),
    "absmax-vector": Row("Int8 absmax vector-wise", "absmax vector-wise", paper=16.48),
    "zeropoint-vector": Row("Int8 zeropoint vector-wise", "zeropoint vector-wise", paper=13.47),
    "absmax-row-decomposition": Row("Int8 absmax row-wise + decomposition", "absmax row-wise", PAPER, paper=12.46),
    "llm-int8": Row("Absmax LLM.int8()", "absmax vector-wise", PAPER, paper=12.45),
    "zeropoint-llm-int8": Row("Zeropoint LLM.int8()", "zeropoint vector-wise", PAPER, paper=12.45),
    "gossamer-paper": Row("Gossamer, absolute 6.0, batch", outliers=PAPER),
    "gossamer-paper-store": Row(f"Gossamer, absolute 6.0, batch, {STORE:.1%} store", outliers=PAPER, store=True),
    "gossamer": Row(_OURS_LABEL, outliers=OURS),
    "gossamer-store": Row(f"{_OURS_LABEL}, {STORE:.1%} store", outliers=OURS, store=True),
}


class Switch:
    """Which row the layers compute as, and how many of their multiply-adds are in 16 bit, by label of the row."""

    def __init__(self) -> None:
        self.row = ROWS["fp32"]
        self.taken: Counter[str] = Counter()
        self.total: Counter[str] = Counter()

    def count(self, x: Tensor, outputs: int) -> None:
        settings, rows = self.row.outliers, x.reshape(-1, x.shape[-1])
        self.total[self.row.label] += rows.numel() * outputs
        if settings is not None:
            mask = outlier_mask(rows, settings.threshold, settings.criterion, settings.outliers)  # type: ignore[arg-type]
            self.taken[self.row.label] += int(mask.sum()) * outputs


class SwitchedLinear(nn.Module):
    """A linear layer that computes as the switch says. It keeps the original weight once, and codes by scheme."""

    def __init__(self, linear: nn.Linear, columns: Tensor, switch: Switch) -> None:
        super().__init__()
        self.weight, self.bias, self.switch = linear.weight, linear.bias, switch
        self.outlier_columns = columns
        self.outlier_weight = in_16_bit(linear.weight[:, columns])
        self._quantized: dict[str, Quantized] = {}

    def quantized(self, scheme: Scheme) -> Quantized:
        kind = scheme.replace(" row-wise", "")  # as far as the weight goes, row-wise is one scale per tensor
        if kind not in self._quantized:
            self._quantized[kind] = quantize_weight(self.weight, scheme)
        return self._quantized[kind]

    def forward(self, x: Tensor) -> Tensor:
        row = self.switch.row
        if row.scheme is None and row.outliers is None:
            return nn.functional.linear(x, self.weight, self.bias)
        self.switch.count(x, len(self.weight))
        if row.scheme is None:
            return self._gossamer(x, row)
        threshold = None if row.outliers is None else row.outliers.threshold
        quantized = self.quantized(row.scheme)
        return linear_variant(x, self.weight, self.bias, row.scheme, threshold, quantized=quantized)

    def _gossamer(self, x: Tensor, row: Row) -> Tensor:
        codes, scale, _ = self.quantized("absmax vector-wise")
        how = (row.outliers.threshold, row.outliers.criterion, row.outliers.outliers)
        store = {"outlier_columns": self.outlier_columns, "outlier_weight": self.outlier_weight} if row.store else {}
        return int8_linear(x, codes, scale, self.bias, *how, **store)


class RowModel:
    """The model as one row computes it.

    ``remember`` keeps the last answer: all rows are compared with fp32's, which is then computed only once.
    """

    def __init__(self, model: Any, switch: Switch, row: Row, remember: bool = False) -> None:
        self._model, self._switch, self._row, self._remember = model, switch, row, remember
        self.config, self.device, self.get_input_embeddings = model.config, model.device, model.get_input_embeddings
        self._last: tuple[Tensor, Any] | None = None

    def __call__(self, input_ids: Tensor, **arguments: Any) -> Any:
        if self._last is not None and torch.equal(self._last[0], input_ids):
            return self._last[1]
        self._last = None  # before there is a second one: it may be a gigabyte
        self._switch.row = self._row
        output = self._model(input_ids=input_ids, **arguments)
        if self._remember:
            self._last = input_ids, output
        return output


def measure(name: str, keys: Sequence[str], count: int, window: int) -> dict[str, Any]:
    """The rows for one model, fp32 first."""
    base, _, change = name.partition(":")
    if change not in ("", "rescaled"):
        raise ConfigurationError(f"{name}: what follows the colon must be 'rescaled'")
    model, tokenizer = load_model(resolve_model(base), "float32")
    windows = token_windows(tokenizer, reference_text(), window, count)
    emulation = emulate_outliers(model) if change else None
    switch = Switch()
    switch_linears(model, switch)
    reference = RowModel(model, switch, ROWS["fp32"], remember=True)
    evaluations = {"fp32": Evaluation(reference, reference)}
    evaluations |= {key: Evaluation(RowModel(model, switch, ROWS[key]), reference) for key in keys if key != "fp32"}
    for number, ids in enumerate(windows, start=1):
        print(f"{name}: window {number} of {len(windows)}", file=sys.stderr, flush=True)
        for evaluation in evaluations.values():
            evaluation.add(ids)
    return {
        "model": name,
        "windows": len(windows),
        "window": window,
        "outlier_dimensions": None if emulation is None else emulation.dimensions,
        "rows": [figures(key, evaluation.quality(), switch) for key, evaluation in evaluations.items()],
    }


def switch_linears(model: Any, switch: Switch) -> None:
    head = model.get_output_embeddings()
    linears = {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }
    read = random_reading(model)
    assert read is not None
    columns = find_outlier_columns(linears, STORE, read)
    for name, linear in linears.items():
        model.set_submodule(name, SwitchedLinear(linear, columns[name], switch))


def figures(key: str, quality: Quality, switch: Switch) -> dict[str, Any]:
    row = ROWS[key]
    return {
        "row": key,
        "label": row.label,
        "perplexity": quality.perplexity,
        "perplexity_ratio": quality.perplexity_ratio,
        "perplexity_ratio_interval": quality.perplexity_ratio_interval,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        "share_16_bit": switch.taken[row.label] / switch.total[row.label] if key != "fp32" else None,
        "paper_13b": row.paper,
    }


# --- output ----------------------------------------------------------------------------------------------------------


def print_tables(report: dict[str, Any]) -> None:
    machine = report["machine"]
    print(f"{machine['cpu']}, torch {machine['torch']}, transformers {machine['transformers']}\n")
    results = report["models"]
    print("Perplexity, and its change against fp32; at the right the paper's, for 13B parameters on C4\n")
    lines = []
    for each in zip(*(result["rows"] for result in results), strict=True):
        paper = each[0]["paper_13b"]
        lines.append(
            [each[0]["label"]]
            + [f"{row['perplexity']:.2f} ({percent(row['perplexity_ratio'])})" for row in each]
            + ["" if paper is None else f"{paper:.2f} ({percent(paper / ROWS['fp32'].paper)})"]  # type: ignore[operator]
        )
    print_markdown(["", *(result["model"] for result in results), "paper, 13B"], lines)
    for result in results:
        print(f"\n{result['model']}, windows of {result['window']} tokens: {result['windows']}\n")
        if result["outlier_dimensions"]:
            print(f"synthetic outliers in the hidden dimensions {', '.join(map(str, result['outlier_dimensions']))}\n")
        print_markdown(
            ["", "perplexity", "change", "95 % interval", "KL, nats", "same top token", "in 16 bit"],
            [details(row) for row in result["rows"]],
        )


def details(row: dict[str, Any]) -> list[str]:
    interval, share = row["perplexity_ratio_interval"], row["share_16_bit"]
    return [
        row["label"],
        f"{row['perplexity']:.3f}",
        percent(row["perplexity_ratio"]),
        "" if interval is None else " to ".join(percent(end) for end in interval),
        f"{row['kl']:.5f}",
        f"{row['top1_agreement']:.1%}".replace("%", " %"),
        "" if share is None else f"{100 * share:.2f} %",
    ]


def percent(ratio: float) -> str:
    change = 100 * (ratio - 1)
    return f"{change:+.2f} %" if abs(change) < 100 else f"{change:+,.0f} %"


def print_markdown(head: list[str], lines: list[list[str]]) -> None:
    widths = [max(len(cell) for cell in column) for column in zip(head, *lines, strict=True)]
    rule = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    for line in (head, rule, *lines):
        cells = [line[0].ljust(widths[0])] + [
            cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)
        ]
        print(f"| {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), metavar="NAME", help=f"default: {' '.join(MODELS)}"
    )
    parser.add_argument("--windows", type=int, default=8, help="windows of text (default 8)")
    parser.add_argument("--window", type=int, default=1024, help="tokens per window (default 1024)")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=list(ROWS),
        choices=list(ROWS),
        metavar="ROW",
        help=f"fp32 is always there; {' '.join(ROWS)}",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    arguments = parser.parse_args()
    try:
        results = [measure(name, arguments.rows, arguments.windows, arguments.window) for name in arguments.models]
    except GossamerError as error:
        sys.exit(f"table1: {error}")
    except KeyboardInterrupt:
        sys.exit("table1: interrupted")
    report = {"machine": describe(), "models": results}
    if arguments.json:
        print(json.dumps(report, indent=2))
    else:
        print_tables(report)


if __name__ == "__main__":
    main()
