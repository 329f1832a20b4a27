"""``gossamer bench tools``: what valid calls cost per token."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Threads, load_llm, takes_options
from gossamer.cli.terminal import stderr


@takes_options()
def tools(
    model: Annotated[str, typer.Option(help="As for `gossamer serve`.")] = "smollm2-135m",
    new: Annotated[int, typer.Option(min=16, help="Tokens of an answer, at most.")] = 128,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.")] = 5,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Measure the time per token with the grammar of ten tools, beside the same prompt without.

    Answers are drawn one at a time, at temperature 1. **none** offers the tools and allows no call, so nothing is
    enforced; **auto** waits for the beginning of a call; **required** enforces the call's form at every token.
    """
    from gossamer.bench.tools import bench_tools

    with load_llm(model, options, threads) as llm, stderr.status("starting") as status:
        report = bench_tools(llm, new=new, repeats=repeats, progress=status.update)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report)


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(
        f"{report['machine']['cpu']}; {report['model']}, weights {report['weights']}; {report['tools']} tools"
    )
    table = Table()
    for name in ("tool_choice", "ms per token", "over none", "answers"):
        table.add_column(name, justify="left" if name == "tool_choice" else "right")
    for row in report["results"]:
        known = row["ms_per_token"] is not None
        ratio = f"{row['over_none']:.2f}x" if row["over_none"] is not None else ""
        table.add_row(
            row["tool_choice"], f"{row['ms_per_token']:.2f}" if known else "too short", ratio, str(len(row["rounds"]))
        )
    console.print(table)
