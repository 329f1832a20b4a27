"""What routers made of a trace, side by side: as numbers, as a table, and as a page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np

from gossamer.distributed.simulate.cluster import FleetOptions, Outcome
from gossamer.distributed.simulate.speeds import Speeds

if TYPE_CHECKING:
    from rich.table import Table


def summary(outcome: Outcome, options: FleetOptions) -> dict[str, Any]:
    """The numbers of one router; times are seconds, shares from 0 to 1.

    ``hit_rate`` is cached over prompt tokens; ``balance_requests`` and ``balance_busy`` the most of any replica over
    the mean; ``utilization`` the mean share of the whole time in which a replica computed; ``cost`` that of all
    replicas for the time, ``cost_per_million`` per 10^6 output tokens.
    """
    seconds = outcome.seconds or float("nan")
    cost = options.price * options.replicas * seconds / 3600
    return {
        "router": outcome.router,
        "requests": outcome.requests,
        "failed": outcome.failed,
        "prompt_tokens": outcome.prompt_tokens,
        "computed_tokens": outcome.computed_tokens,
        "saved_tokens": outcome.cached_tokens,
        "recomputed_tokens": outcome.recomputed_tokens,
        "hit_rate": outcome.cached_tokens / max(outcome.prompt_tokens, 1),
        "ttft": _quantiles(outcome.ttft),
        "inter_token": _quantiles(outcome.inter_token),
        "seconds": seconds,
        "requests_per_second": outcome.requests / seconds,
        "output_tokens_per_second": outcome.output_tokens / seconds,
        "balance_requests": _balance(outcome.requests_by_replica),
        "balance_busy": _balance(outcome.busy_by_replica),
        "utilization": sum(outcome.busy_by_replica) / options.replicas / (outcome.whole_seconds or float("nan")),
        "peak_tokens": outcome.peak_tokens,
        "evicted_tokens": outcome.evicted_tokens,
        "preemptions": outcome.preemptions,
        "cost": cost,
        "cost_per_million": 1e6 * cost / max(outcome.output_tokens, 1),
        "steps": outcome.steps,
        "events": outcome.events,
        "router_stats": outcome.router_stats,
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not len(values):
        return dict.fromkeys(("mean", "p50", "p95", "p99"), float("nan"))
    numbers = np.asarray(values, dtype=np.float64)
    p50, p95, p99 = np.quantile(numbers, [0.5, 0.95, 0.99]).tolist()
    return {"mean": float(numbers.mean()), "p50": p50, "p95": p95, "p99": p99}


def _balance(values: Sequence[float]) -> float:
    mean = sum(values) / max(len(values), 1)
    return max(values) / mean if mean else 1.0


def as_json(results: list[dict[str, Any]], options: FleetOptions, speeds: Speeds) -> dict[str, Any]:
    """All of it, for scripts; what is not a number is ``null``."""
    fleet = {name: getattr(options, name) for name in FleetOptions.__dataclass_fields__}
    measured = {"model": speeds.model, "machine": speeds.machine, "threads": speeds.threads, **speeds.residuals}
    whole: dict[str, Any] = {"fleet": fleet, "speeds": measured, "results": results}
    return _without_nan(whole)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_nan(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and value != value else value


COLUMNS = (
    ("router", "left"),
    ("computed\nMtokens", "right"),
    ("saved", "right"),
    ("TTFT s\np50", "right"),
    ("\np95", "right"),
    ("\np99", "right"),
    ("token ms\np50", "right"),
    ("\np95", "right"),
    ("requests\nper s", "right"),
    ("busy", "right"),
    ("most / mean\nbusy", "right"),
    ("\nrequests", "right"),
    ("memory\nMtokens", "right"),
    ("cost per\nM tokens", "right"),
)


def row(result: dict[str, Any]) -> list[str]:
    """One router's numbers under :data:`COLUMNS`."""
    ttft, inter = result["ttft"], result["inter_token"]
    return [
        result["router"],
        f"{result['computed_tokens'] / 1e6:,.3f}",
        f"{100 * result['hit_rate']:.1f} %",
        *(f"{ttft[name]:.3f}" for name in ("p50", "p95", "p99")),
        *(f"{1e3 * inter[name]:.1f}" for name in ("p50", "p95")),
        f"{result['requests_per_second']:,.2f}",
        f"{100 * result['utilization']:.0f} %",
        f"{result['balance_busy']:.2f}",
        f"{result['balance_requests']:.2f}",
        f"{result['peak_tokens'] / 1e6:,.3f}",
        f"{result['cost_per_million']:,.2f}" if result["cost"] else "-",
    ]


def table(results: list[dict[str, Any]]) -> Table:
    """For a terminal."""
    from rich.table import Table

    made = Table()
    for name, justify in COLUMNS:
        made.add_column(name, justify="left" if justify == "left" else "right", no_wrap=True)
    for result in results:
        made.add_row(*row(result))
    return made


def page(results: list[dict[str, Any]], options: FleetOptions, speeds: Speeds, *, trace: str) -> str:
    """One HTML file that needs no network. ``trace`` says what was replayed."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["thousands"] = "{:,}".format
    source = files("gossamer.distributed.simulate").joinpath("routers.html.jinja").read_text("utf-8")
    bars = [
        _bars("Prompt tokens computed, millions", results, lambda each: each["computed_tokens"] / 1e6),
        _bars("Time to first token, p50, seconds", results, lambda each: each["ttft"]["p50"]),
        _bars("Time to first token, p99, seconds", results, lambda each: each["ttft"]["p99"]),
        _bars("Busiest replica over the mean", results, lambda each: each["balance_busy"]),
    ]
    return environment.from_string(source).render(
        results=results,
        rows=[row(each) for each in results],
        columns=[name.replace("\n", " ").strip() for name, _ in COLUMNS],
        bars=bars,
        options=options,
        speeds=speeds,
        trace=trace,
        version=version("gossamer"),
    )


def _bars(title: str, results: list[dict[str, Any]], value: Any) -> dict[str, Any]:
    """A bar per router; the drawing area is 300 wide at x = 120."""
    values = [value(each) for each in results]
    largest = max((each for each in values if each == each), default=0.0) or 1.0
    bars = [
        {
            "label": each["router"],
            "value": f"{number:,.3g}",
            "width": round(300 * number / largest, 1) if number == number else 0,
        }
        for each, number in zip(results, values, strict=True)
    ]
    return {"title": title, "bars": bars, "height": 22 * len(bars) + 6}
