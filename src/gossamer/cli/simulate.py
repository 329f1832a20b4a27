"""``gossamer simulate``: what a fleet of replicas would make of a trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Threads, load_llm, takes_options
from gossamer.cli.terminal import notice, stderr
from gossamer.errors import ConfigurationError
from gossamer.options import ModelOptions, RunnerOptions
from gossamer.sizes import parse_bytes

if TYPE_CHECKING:
    from gossamer.distributed.simulate.speeds import Speeds
    from gossamer.distributed.simulate.trace import Trace

_FLEET, _MADE, _MEASURED = "The fleet", "Traces that are made up (--generate)", "Measured speeds (--measure)"


@takes_options(ModelOptions, RunnerOptions)
def simulate(
    trace: Annotated[
        Path | None, typer.Argument(help="Requests, as a server has logged them or --generate has made them.")
    ] = None,
    speeds: Annotated[Path | None, typer.Option(help="How long steps take: a file that --measure has made.")] = None,
    replicas: Annotated[int, typer.Option(min=1, help="How many.", rich_help_panel=_FLEET)] = 2,
    router: Annotated[
        str,
        typer.Option(
            help="prefix, lmetric, round-robin, random, power-of-two, consistent-hash, ray-prefix; several with "
            "commas; or all.",
            rich_help_panel=_FLEET,
        ),
    ] = "all",
    memory: Annotated[str, typer.Option(help="For keys and values, of each replica.", rich_help_panel=_FLEET)] = "4GB",
    max_num_seqs: Annotated[
        int, typer.Option(min=1, help="Sequences computed at a time, by each.", rich_help_panel=_FLEET)
    ] = 256,
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens computed in one forward pass.", rich_help_panel=_FLEET)
    ] = 2048,
    ingresses: Annotated[
        int, typer.Option(min=1, help="Routers, each of which sees a part of the requests.", rich_help_panel=_FLEET)
    ] = 1,
    in_flight: Annotated[
        int | None,
        typer.Option(min=1, help="Keep so many requests in flight, whatever their times.", rich_help_panel=_FLEET),
    ] = None,
    warm_up: Annotated[int, typer.Option(min=0, help="First requests that do not count.", rich_help_panel=_FLEET)] = 0,
    price: Annotated[float, typer.Option(min=0, help="Of a replica per hour.", rich_help_panel=_FLEET)] = 0.0,
    seed: Annotated[int, typer.Option(help="Of all that is drawn at random.")] = 0,
    generate: Annotated[
        str | None,
        typer.Option(help="zipf (questions about popular prefixes) or agents (conversations).", rich_help_panel=_MADE),
    ] = None,
    requests: Annotated[
        int, typer.Option(min=1, help="How many; of agents, conversations.", rich_help_panel=_MADE)
    ] = 1000,
    rate: Annotated[
        float, typer.Option(help="Arrivals per second on average; of agents, of conversations.", rich_help_panel=_MADE)
    ] = 1.0,
    prefixes: Annotated[
        int, typer.Option(min=1, help="Prefixes; of agents, system prompts.", rich_help_panel=_MADE)
    ] = 100,
    exponent: Annotated[
        float, typer.Option(help="Of Zipf's law; 0 makes all prefixes equally popular.", rich_help_panel=_MADE)
    ] = 1.0,
    prefix_tokens: Annotated[
        int, typer.Option(min=1, help="Of a prefix or system prompt.", rich_help_panel=_MADE)
    ] = 2000,
    suffix_tokens: Annotated[
        int, typer.Option(min=1, help="Behind a prefix; of agents, what a turn adds on average.", rich_help_panel=_MADE)
    ] = 32,
    output_tokens: Annotated[
        int, typer.Option(min=1, help="Of an answer; of agents, on average.", rich_help_panel=_MADE)
    ] = 32,
    turns: Annotated[int, typer.Option(min=1, help="Of an agent, on average.", rich_help_panel=_MADE)] = 8,
    think: Annotated[
        float, typer.Option(help="Seconds from an answer to an agent's next turn, on average.", rich_help_panel=_MADE)
    ] = 2.0,
    measure: Annotated[
        str | None, typer.Option(help="A model, as for `gossamer serve`.", rich_help_panel=_MEASURED)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each case is timed.", rich_help_panel=_MEASURED)] = 2,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    threads: Threads = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Where a trace or speeds are written.")] = None,
    report: Annotated[Path | None, typer.Option(help="Also write a page with charts.")] = None,
    as_json: AsJson = False,
) -> None:
    """Replay requests on simulated replicas, with one router after the other, and put what each does side by side.

    The routers are the ones that serve. Replicas follow the rules of the engine's scheduler and prefix tree, and take
    the time of steps that were measured on this machine:

        gossamer simulate --measure smollm2-135m -o speeds.json

        gossamer simulate --generate zipf --requests 5000 --rate 2 -o trace.jsonl

        gossamer simulate trace.jsonl --speeds speeds.json --replicas 4

    Without -o, what --generate makes is replayed at once.
    """
    if sum(each is not None for each in (trace, generate, measure)) != 1:
        raise ConfigurationError("give one of these: a trace, --generate, or --measure")
    if measure is not None:
        _measure(measure, options, threads, rounds, seed, output, as_json)
        return
    if options or threads:
        raise ConfigurationError("options of the model and --threads are for --measure")
    if trace is not None:
        from gossamer.distributed.simulate.trace import read_trace

        source, told = read_trace(trace), trace.name
    else:
        assert generate is not None
        source = _generated(generate, requests, rate, prefixes, exponent, prefix_tokens, suffix_tokens, output_tokens,
                            turns, think, seed)  # fmt: skip
        told = f"generated ({generate}, {requests:,}, {rate:g} per second, {prefixes:,} prefixes, seed {seed})"
        if output is not None:
            _write(source, output)
            return
    if output is not None:
        raise ConfigurationError("-o is for --generate and --measure; --report and --json are for results")
    if speeds is None:
        raise ConfigurationError(
            "say how long steps take: --speeds FILE, from `gossamer simulate --measure MODEL -o FILE`"
        )
    import gossamer
    from gossamer.distributed.simulate.cluster import FleetOptions
    from gossamer.distributed.simulate.speeds import read_speeds

    measured = read_speeds(speeds, version=gossamer.__version__)
    fleet = FleetOptions(
        replicas=replicas,
        memory_tokens=parse_bytes(memory) // measured.kv_bytes_per_token,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        ingresses=ingresses,
        in_flight=in_flight,
        warm_up=warm_up,
        price=price,
        seed=seed,
    )
    _replay(source, told, measured, fleet, router, report, as_json)


def _replay(
    trace: Trace, told: str, speeds: Speeds, fleet: Any, router: str, report: Path | None, as_json: bool
) -> None:
    from rich.console import Console

    from gossamer.distributed.routing.policies_compared import ROUTERS
    from gossamer.distributed.simulate import report as reports
    from gossamer.distributed.simulate.cluster import replay
    from gossamer.report.html import check_writable, write

    names = list(ROUTERS) if router == "all" else [each.strip() for each in router.split(",")]
    if unknown := [each for each in names if each not in ROUTERS]:
        raise ConfigurationError(f"there is no router {unknown[0]!r}; there are {', '.join(ROUTERS)}, and all")
    if report is not None:
        check_writable(report)
    results: list[dict[str, Any]] = []
    with stderr.status("starting") as status:
        for name in names:
            status.update(f"{name}: {len(results) + 1} of {len(names)}")
            results.append(reports.summary(replay(trace, speeds, fleet, router=name), fleet))
    if as_json:
        typer.echo(json.dumps(reports.as_json(results, fleet, speeds), indent=2))
    else:
        console = Console()
        console.width = max(console.width, 160)  # a narrow terminal may wrap the table; columns cut short help nobody
        console.print(
            f"{told}; {fleet.replicas:,} replicas of {fleet.memory_tokens:,} tokens; steps of {speeds.model} on "
            f"{speeds.machine}, {speeds.threads} threads"
        )
        console.print(reports.table(results))
        if failed := max(each["failed"] for each in results):
            console.print(f"Up to {failed:,} requests did not fit into a replica's memory.")
    if report is not None:
        write(report, reports.page(results, fleet, speeds, trace=told))


def _generated(
    kind: str, requests: int, rate: float, prefixes: int, exponent: float, prefix_tokens: int, suffix_tokens: int,
    output_tokens: int, turns: int, think: float, seed: int,
) -> Trace:  # fmt: skip
    from gossamer.distributed.simulate.generate import agent_trace, zipf_trace

    if kind == "zipf":
        return zipf_trace(
            requests=requests,
            rate=rate,
            prefixes=prefixes,
            exponent=exponent,
            prefix_tokens=prefix_tokens,
            suffix_tokens=suffix_tokens,
            output_tokens=output_tokens,
            seed=seed,
        )
    if kind == "agents":
        return agent_trace(
            conversations=requests,
            rate=rate,
            turns=turns,
            systems=prefixes,
            system_tokens=prefix_tokens,
            tool_tokens=suffix_tokens,
            output_tokens=output_tokens,
            think_seconds=think,
            seed=seed,
        )
    raise ConfigurationError(f"--generate takes zipf or agents, got {kind!r}")


def _write(trace: Trace, path: Path) -> None:
    from gossamer.distributed.simulate.trace import write_trace

    with stderr.status(f"writing {path}"):
        count = write_trace(path, trace)
    notice(f"{count:,} requests in {path}")


def _measure(
    model: str, options: dict[str, Any], threads: int | None, rounds: int, seed: int, output: Path | None, as_json: bool
) -> None:
    if output is None:
        raise ConfigurationError("say where the speeds go: -o FILE")
    from gossamer.bench.machine import describe
    from gossamer.distributed.simulate.measure import measure_speeds
    from gossamer.distributed.simulate.speeds import as_report
    from gossamer.report.html import check_writable

    check_writable(output)
    with load_llm(model, options | {"speculation": "off"}, threads) as llm, stderr.status("starting") as status:
        machine = describe()["cpu"]
        speeds = measure_speeds(llm, model=model, machine=machine, rounds=rounds, seed=seed, progress=status.update)
    speeds.write(output)
    numbers = as_report(speeds)
    if as_json:
        typer.echo(json.dumps(numbers, indent=2))
        return
    for name, value in numbers.items():
        if not name.startswith("error"):
            typer.echo(f"{name:>16}  {value:12,.4f} us")
    error = speeds.residuals
    typer.echo(
        f"{int(error['steps']):,} steps; relative error of the fit: median {100 * error['median']:.1f} %, "
        f"p90 {100 * error['p90']:.1f} %, of all time together {100 * error['bias']:+.1f} %"
    )
