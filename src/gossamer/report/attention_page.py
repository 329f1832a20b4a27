"""The attention report in words: cells and sentences for the terminal, and one HTML file that needs no network."""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib.metadata import version
from importlib.resources import files
from statistics import median
from typing import Any

from jinja2 import Environment

from gossamer.report.attention_sparsity import AttentionReport, HeadSparsity

COLUMNS = ("layer", "head", "largest ratio", "at", "ratio", "growth", "sum / n", "effective support")

_LEFT, _TOP, _WIDTH, _HEIGHT = 52, 10, 500, 260  # of the chart's drawing area
_DECADES = 4  # that the chart shows below the largest ratio


def cells(head: HeadSparsity) -> list[str]:
    """A row of the table, as :data:`COLUMNS` names it."""
    report, largest = head.report, head.report.largest
    return [
        str(head.layer),
        str(head.head),
        short(largest.ratio),
        str(largest.n),
        short(report.ratio),
        "" if report.growth is None else f"{report.growth:+.2f}",
        short(report.sum_per_query),
        f"{report.effective_support:,.1f}",
    ]


def short(value: float) -> str:
    """Three digits.

    >>> short(62.1637), short(0.0042), short(3.2e-8), short(0.0)
    ('62.2', '0.0042', '3.20e-08', '0')
    """
    return f"{value:.2e}" if 0 < value < 1e-3 or value >= 1e4 else f"{value:.3g}"


def summary(report: AttentionReport) -> list[str]:
    """What the table amounts to, in sentences."""
    reports = [each.report for each in report.heads]
    largest, peak = report.largest, report.largest.report.largest
    middle = median(each.largest.ratio for each in reports)
    lines = [
        f"The largest ratio of all heads and prefixes is {short(peak.ratio)}, in layer {largest.layer}, head "
        f"{largest.head}, at {peak.n:,} tokens. The median of the heads' largest ratios is {short(middle)}."
    ]
    growths = [each.growth for each in reports if each.growth is not None]
    if growths and largest.report.growth is not None:
        lines.append(
            f"With n, that head's ratio grows like n^{largest.report.growth:.2f}, and the median head's like "
            f"n^{median(growths):.2f}. The assumption is n^0; a matrix of equal entries has n^1."
        )
    return lines


def render(report: AttentionReport, *, model: str, text: str) -> str:
    """The page.

    Args:
        report: of :func:`~gossamer.report.attention_sparsity.measure_attention`.
        model: how the model is called.
        text: what the tokens were taken from, such as "notes.txt".
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = files("gossamer.report").joinpath("attention_sparsity.html.jinja").read_text("utf-8")
    return environment.from_string(template).render(
        columns=COLUMNS,
        rows=[cells(each) for each in report.heads],
        summary=summary(report),
        chart=_chart(report),
        tokens=f"{report.tokens:,}",
        heads=len(report.heads),
        model=model,
        text=text,
        version=version("gossamer"),
    )


def _chart(report: AttentionReport) -> dict[str, Any]:
    """Ratios against prefix lengths, both logarithmic: the largest of each layer, that of all, and the guides."""
    layers: dict[int, list[float]] = {}
    for head in report.heads:
        ratios = [each.ratio for each in head.report.prefixes]
        layers[head.layer] = [max(pair) for pair in zip(layers.get(head.layer, ratios), ratios, strict=True)]
    overall = [max(ratios) for ratios in zip(*layers.values(), strict=True)]
    n = report.prefixes
    top = math.ceil(math.log10(max(max(overall), 1e-300)) + 1e-9)
    left, right = math.log10(n[0]), max(math.log10(n[-1]), math.log10(n[0]) + 1e-9)

    def x(length: float) -> float:
        return round(_LEFT + _WIDTH * (math.log10(length) - left) / (right - left), 1)

    def y(ratio: float) -> float:
        return round(_TOP + _HEIGHT * (top - math.log10(ratio)) / _DECADES, 1)

    def line(ratios: Iterable[float]) -> str:
        shown = ((each, min(ratio, 10.0**top)) for each, ratio in zip(n, ratios, strict=True))
        return " ".join(f"{x(each)},{y(ratio)}" for each, ratio in shown if ratio > 10.0 ** (top - _DECADES))

    doublings = [n[-1] >> halved for halved in range(n[-1].bit_length()) if n[-1] >> halved >= n[0]]
    return {
        "layers": [(layer, line(ratios)) for layer, ratios in layers.items()],
        "overall": line(overall),
        "guides": [line(overall[-1] * (each / n[-1]) ** slope for each in n) for slope in (0, 1)],
        "x": [(x(length), f"{length:,}") for length in doublings],
        "y": [(y(10.0**power), f"{10.0**power:g}") for power in range(top - _DECADES, top + 1)],
        "box": (_LEFT, _TOP, _LEFT + _WIDTH, _TOP + _HEIGHT),
    }
