"""``gossamer bench deploy``: two replicas, their router, what Ray costs, and what becomes of requests that lose one."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson
from gossamer.cli.terminal import stderr


class What(StrEnum):
    """What is measured."""

    routing = "routing"
    overhead = "overhead"
    kills = "kills"
    simulation = "simulation"


def deploy(
    what: Annotated[
        What,
        typer.Argument(
            help="routing: prompt tokens computed, by router; overhead: streamed tokens/s beside plain servers; kills: "
            "requests whose replica or ingress is killed; simulation: what `gossamer simulate` says of the same "
            "requests."
        ),
    ] = What.routing,
    model: Annotated[str, typer.Option(help="As for `gossamer deploy`.")] = "smollm2-135m",
    quantization: Annotated[str, typer.Option(help="int8, or none for the checkpoint as it is.")] = "int8",
    replicas: Annotated[int, typer.Option(min=1, help="Of the model.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Of each replica.")] = 1,
    memory: Annotated[str, typer.Option(help="Of each replica, for keys and values.")] = "1GB",
    groups: Annotated[int, typer.Option(min=1, help="Prefixes.")] = 16,
    each: Annotated[int, typer.Option(min=1, help="Requests of each prefix.")] = 8,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens of a prefix.")] = 1024,
    suffix: Annotated[int, typer.Option(min=1, help="Tokens behind it.")] = 32,
    new: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 16,
    head: Annotated[int, typer.Option(min=0, help="Characters that all prompts begin with.")] = 0,
    scarce: Annotated[
        int | None, typer.Option(min=1, help="Give each replica memory for so many prefixes only.", show_default=False)
    ] = None,
    routers: Annotated[str, typer.Option(help="prefix, round-robin, ray, with commas.")] = "prefix,round-robin,ray",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Of overhead; medians are shown.")] = 3,
    kills: Annotated[int, typer.Option(min=1, help="Processes that are killed, every fourth one the ingress.")] = 20,
    seed: Annotated[int, typer.Option(help="Of the order of requests, and of their texts.")] = 1,
    as_json: AsJson = False,
) -> None:
    """Measure two replicas of `gossamer deploy` on this machine. Needs the extra: pip install 'gossamer[ray]'.

    **routing** sends groups of prompts in shuffled order, and counts what is computed; `ideal` is each prefix once, and
    all that is behind. With `ray` it is Ray's own prefix router for language models, with its defaults.
    """
    from gossamer.bench.deploy import (
        ROUTERS,
        Setting,
        bench_kills,
        bench_overhead,
        bench_routing,
        bench_simulation,
    )
    from gossamer.bench.fleet_load import Load
    from gossamer.distributed.extra import check_ray
    from gossamer.errors import ConfigurationError

    check_ray()
    wanted = tuple(routers.split(","))
    if unknown := [name for name in wanted if name not in ROUTERS]:
        raise ConfigurationError(f"--routers has {unknown[0]!r}; there are {', '.join(ROUTERS)}")
    # so that no process is left behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    setting = Setting(
        model=model,
        quantization=None if quantization == "none" else quantization,
        threads=threads,
        replicas=replicas,
        max_num_seqs=max(concurrency, 8),
        memory=memory,
    )
    load = Load(groups=groups, each=each, prefix=prefix, suffix=suffix, new=new, head=head, seed=seed)
    with stderr.status("starting") as status:
        if what is What.routing:
            report = bench_routing(
                setting, load, routers=wanted, concurrency=concurrency, scarce=scarce, progress=status.update
            )
        elif what is What.overhead:
            report = bench_overhead(setting, load, concurrency=concurrency, rounds=rounds, progress=status.update)
        elif what is What.simulation:
            setting = replace(setting, speculation="off")
            report = bench_simulation(setting, load, concurrency=concurrency, progress=status.update)
        else:
            report = bench_kills(setting, load, kills=kills, concurrency=concurrency, progress=status.update)
    typer.echo(json.dumps(report, indent=2)) if as_json else _print(report)


def _print(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, machine = Console(), report["machine"]
    setting = report["setting"]
    console.print(
        f"{machine['cpu']}; {setting['replicas']} replicas of {setting['model']}, "
        f"{setting['quantization'] or 'as it is'}, {setting['threads']} threads and {setting['memory']} each"
    )
    table = Table()
    if report["kind"] == "routing":
        load = report["load"]
        console.print(
            f"{load['groups']} prefixes of {load['prefix']} tokens, {load['each']} requests of each, shuffled, "
            f"{report['concurrency']} at once; {load['head']} characters in common; ideal: {report['ideal']:,} tokens"
        )
        for name in ("router", "computed", "x ideal", "TTFT p50", "p95 ms", "seconds", "errors"):
            table.add_column(name, justify="left" if name == "router" else "right", no_wrap=True)
        for row in report["results"]:
            table.add_row(
                row["router"],
                f"{row['computed']:,}",
                f"{row['computed'] / report['ideal']:.2f}",
                f"{1e3 * row['ttft_p50']:,.0f}",
                f"{1e3 * row['ttft_p95']:,.0f}",
                f"{row['seconds']:.1f}",
                str(row["errors"]),
            )
    elif report["kind"] == "overhead":
        for name in ("what", "tokens/s", "rounds", "TTFT p50 ms", "errors"):
            table.add_column(name, justify="left" if name == "what" else "right", no_wrap=True)
        for row in report["results"]:
            rounds = ", ".join(f"{each:,.0f}" for each in row["rounds"])
            ttft = f"{1e3 * row['ttft_p50']:,.0f}"
            table.add_row(row["what"], f"{row['tokens_per_second']:,.0f}", rounds, ttft, str(row["errors"]))
    elif report["kind"] == "simulation":
        for name in ("", "real", "simulated", "off by"):
            table.add_column(name, justify="right" if name else "left", no_wrap=True)
        for row in report["results"]:
            table.add_row(row["what"], f"{row['real']:,.4g}", f"{row['simulated']:,.4g}", f"{100 * row['off']:+.1f} %")
    else:
        for name in ("killed", "times", "median s", "longest s"):
            table.add_column(name, justify="left" if name == "killed" else "right", no_wrap=True)
        for name in ("engine", "ingress"):
            seconds = sorted(each["seconds"] for each in report["recovered"] if each["killed"] == name)
            if seconds:
                table.add_row(name, str(len(seconds)), f"{seconds[len(seconds) // 2]:.1f}", f"{seconds[-1]:.1f}")
    console.print(table)
    if report["kind"] == "overhead":
        console.print(f"{report['ratio']:.2f}x")
    if report["kind"] == "kills":
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(report["outcomes"].items()))
        console.print(
            f"{report['requests']} requests: {outcomes}; {report['without_end']} without an answer or an error"
        )
