"""The outlier report as one HTML file that needs no network, readable in light and dark."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment

from gossamer.errors import ConfigurationError
from gossamer.report.ablation import Ablation, Effect
from gossamer.report.outliers import InputStatistics, OutlierReport

FEATURES_SHOWN = 20  # of a group; JSON has all

Memory = Mapping[str, Mapping[str, int]]  # part of the model -> scheme -> bytes


def render(report: OutlierReport, ablations: Iterable[Ablation], memory: Memory, *, model: str, text: str) -> str:
    """The page.

    Args:
        report: of :func:`~gossamer.report.outliers.find_outliers`.
        ablations: of :func:`~gossamer.report.ablation.ablate`; may be empty.
        memory: bytes of each part of the model under each scheme.
        model: how the model is called.
        text: what the tokens were taken from, such as "notes.txt".
    """
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "figure": figure, "thousands": "{:,}".format, "effects": effects}
    template = environment.from_string(files("gossamer.report").joinpath("outliers.html.jinja").read_text("utf-8"))
    return template.render(
        report=report,
        ablations=list(ablations),
        memory=memory,
        schemes=list(next(iter(memory.values()))),
        panels=_panels(report),
        remarks=remarks(report),
        features_shown=FEATURES_SHOWN,
        model=model,
        text=text,
        version=version("gossamer"),
    )


def percent(share: float, digits: int = 1) -> str:
    """
    >>> percent(0.0625), percent(0.25, 0)
    ('6.2 %', '25 %')
    """
    return f"{100 * share:.{digits}f} %"


def figure(value: float, digits: int = 1) -> str:
    """
    >>> figure(2908.21), figure(12.8815, 2), figure(1.6e11)
    ('2,908.2', '12.88', '1.6e+11')
    """
    return f"{value:,.{digits}f}" if value < 1e7 else f"{value:.1e}"


def effects(ablation: Ablation) -> list[tuple[str, Effect, str]]:
    """The rows of an ablation's table: what was set to zero, what that did, and how perplexity changed."""
    rows = [("nothing", ablation.intact), (f"features: {_names(ablation.features.dimensions)}", ablation.features)]
    rows += [(f"at random: {_names(each.dimensions)}", each) for each in ablation.random]
    changes = [100 * (each.perplexity / ablation.intact.perplexity - 1) for _, each in rows]
    return [(*row, f"{change:+,.1f} %" if row[1].dimensions else "") for row, change in zip(rows, changes, strict=True)]


def remarks(report: OutlierReport) -> list[str]:
    """What a reader of the tables should know about groups in which the criterion selects too much."""
    return [
        f"{len(group.features)} of the {group.width} dimensions ({group.name}) are features, so the criterion singles "
        f"nothing out there, and nothing was set to zero. The mean magnitude of these inputs is up to "
        f"{max(each.mean for each in report.inputs if each.group == group.name):.1f}: ask for a larger magnitude."
        for group in report.groups
        if len(group.features) > group.width / 10
    ]


def _names(dimensions: Sequence[int]) -> str:
    shown = ", ".join(map(str, dimensions[:8]))
    return shown if len(dimensions) <= 8 else f"{shown} ... ({len(dimensions)})"


def _panels(report: OutlierReport) -> list[dict[str, Any]]:
    """One bar chart per kind of input; its drawing area is 360 x 100 at (36, 10)."""
    by_label: dict[str, list[InputStatistics]] = {}
    for each in report.inputs:
        if each.layer is not None:
            by_label.setdefault(each.label, []).append(each)
    width = 360 / report.num_layers
    every = max(1, round(report.num_layers / 10))
    return [
        {
            "label": label,
            "bars": [
                {
                    "layer": each.layer,
                    "tokens": each.tokens,
                    "dimensions": each.dimensions,
                    "largest": each.largest,
                    "x": round(36 + each.layer * width, 2),
                    "width": round(width, 2),
                    "height": round(max(100 * each.tokens, 1.0 if each.tokens else 0.0), 2),  # what is there is visible
                    "tick": each.layer % every == 0,
                }
                for each in inputs
                if each.layer is not None
            ],
        }
        for label, inputs in by_label.items()
    ]


def check_writable(path: Path) -> None:
    """Says at once what would otherwise come out after a long computation.

    Raises:
        ConfigurationError: ``path`` is a directory, or lies in one that does not exist or may not be written to.
    """
    if path.is_dir():
        raise ConfigurationError(f"{path} is a directory; name a file for the report")
    if not path.parent.is_dir():
        raise ConfigurationError(f"{path.parent} does not exist; create it or choose another file for the report")
    if not os.access(path.parent, os.W_OK):
        raise ConfigurationError(f"{path.parent} may not be written to; choose another file for the report")


def write(path: Path, page: str) -> None:
    """Writes the page in one step: whatever happens, there is the old file or the whole new one.

    Raises:
        ConfigurationError: it cannot be written.
    """
    path = path.resolve()  # a replaced file must be the one a link points to, not the link
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
