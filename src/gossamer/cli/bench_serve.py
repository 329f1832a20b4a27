"""``gossamer bench serve``: servers under load."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.bench_format import optional
from gossamer.cli.engine_options import AsJson, Memory, Threads
from gossamer.cli.terminal import stderr
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    pass

SOAK_SECONDS = 600.0
REQUESTS_PER_CLIENT = 4  # of a round, unless something else is asked for
_LOAD = "The load"
_WHO = "Who is measured"
_TIMES = {"TTFT": "ttft_ms", "ITL": "itl_ms", "E2E": "e2e_ms"}


def serve(
    model: Annotated[str, typer.Option(help="As for `gossamer serve`.")] = "smollm2-135m",
    clients: Annotated[int, typer.Option(min=1, help="Clients that ask at the same time.", rich_help_panel=_LOAD)] = 64,
    requests: Annotated[
        int | None,
        typer.Option(
            min=1, help="Requests of a round, of all clients; 4 per client by default.", rich_help_panel=_LOAD
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0.1, help="Ask for so long in each round, instead of --requests.", rich_help_panel=_LOAD),
    ] = None,
    prefix: Annotated[int, typer.Option(min=1, help="Tokens that prompts share.", rich_help_panel=_LOAD)] = 2048,
    suffix: Annotated[
        int, typer.Option(min=1, help="Tokens that each prompt has of its own.", rich_help_panel=_LOAD)
    ] = 64,
    new: Annotated[int, typer.Option(min=1, help="Tokens of each answer.", rich_help_panel=_LOAD)] = 64,
    num_prefixes: Annotated[
        int, typer.Option(min=1, help="Different prefixes, which prompts take in turn.", rich_help_panel=_LOAD)
    ] = 1,
    stream: Annotated[
        bool, typer.Option("--stream/--no-stream", help="Read answers token by token.", rich_help_panel=_LOAD)
    ] = True,
    token_ids: Annotated[
        bool,
        typer.Option(
            "--token-ids", help="Send the numbers of tokens, so that no server has to make them.", rich_help_panel=_LOAD
        ),
    ] = False,
    seed: Annotated[int, typer.Option(help="Chooses other suffixes.", rich_help_panel=_LOAD)] = 0,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians are shown.", rich_help_panel=_LOAD)] = 3,
    soak: Annotated[
        bool,
        typer.Option(
            "--soak",
            help="One round of ten minutes (or --seconds) without the offline engine: does the server grow, do pauses "
            "appear?",
            rich_help_panel=_LOAD,
        ),
    ] = False,
    quantization: Annotated[
        str,
        typer.Option(
            help="Of our server and engine: int8, or none for the model as it is; auto is none for a GGUF file, and "
            "int8 for anything else."
        ),
    ] = "auto",
    memory: Memory = "4GB",
    max_num_batched_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that our server and engine compute in one forward pass.")
    ] = 256,
    offline: Annotated[
        bool,
        typer.Option(
            "--offline/--no-offline", help="Measure our engine without a server as well.", rich_help_panel=_WHO
        ),
    ] = True,
    peers: Annotated[
        str,
        typer.Option(
            help="Other projects' servers: llama.cpp, vllm, xllamacpp, llama-cpp-python, or all. docs/how-to/bench.md "
            "says how each is installed.",
            rich_help_panel=_WHO,
        ),
    ] = "",
    peers_in: Annotated[Path, typer.Option(help="The directory with their environments.", rich_help_panel=_WHO)] = Path(
        ".venv-bench"
    ),
    url: Annotated[
        list[str] | None,
        typer.Option(
            help="A server that runs already, as NAME=http://HOST:PORT; again for more of them.", rich_help_panel=_WHO
        ),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that an answer, or the start of a server, may take.")
    ] = 600.0,
    threads: Threads = None,
    as_json: AsJson = False,
) -> None:
    """Put a load on servers with OpenAI's API: ours, other projects', and any that runs already.

        gossamer bench serve --clients 64 --prefix 2048

        gossamer bench serve --peers vllm,llama.cpp

        gossamer bench serve --url other=http://127.0.0.1:9000

        gossamer bench serve --soak

    So many clients ask at the same time, each again as soon as it has its answer. Prompts are real text: a long prefix
    that all share, as a system prompt would be, and a suffix of their own. Servers are started, get one request per
    client so that prefixes are cached, and take their rounds in turn on the same threads.

    **TTFT** is the time to the first text, **ITL** between two events with text, **E2E** to the end of the answer.
    "of offline" compares tokens per second with our engine, asked for the same prompts without a server: what is
    missing to 100 % is what HTTP costs. "client" is how many processor cores the clients took from the servers.
    """
    if requests is not None and (seconds is not None or soak):
        raise ConfigurationError("--requests cannot be given together with --seconds or --soak")
    if soak:
        seconds, repeats, offline = seconds or SOAK_SECONDS, 1, False
    import torch

    from gossamer.bench.peers.servers import server_names
    from gossamer.bench.serve import bench_serve
    from gossamer.bench.serve_contestants import ServeOptions
    from gossamer.bench.serve_load import Load

    load = Load(
        clients=clients,
        requests=requests or REQUESTS_PER_CLIENT * clients if seconds is None else None,
        seconds=seconds,
        prefix=prefix,
        suffix=suffix,
        new=new,
        num_prefixes=num_prefixes,
        stream=stream,
        token_ids=token_ids,
        seed=seed,
        timeout=timeout,
    )
    options = ServeOptions(
        threads=threads or torch.get_num_threads(),
        quantization=quantization,
        memory=memory,
        max_num_batched_tokens=max_num_batched_tokens,
        offline=offline,
        peers=server_names(peers),
        environments=peers_in,
        urls=_addresses(url or []),
        start_timeout=timeout,
    )
    # so that no server is left behind
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with stderr.status("starting") as status:
        report = bench_serve(model, load, options, repeats=repeats, progress=status.update)
    if as_json:
        typer.echo(json.dumps(report, indent=2))
    else:
        _print_report(report, soak)


def _addresses(given: list[str]) -> dict[str, str]:
    from gossamer.bench.http_client import Address

    found: dict[str, str] = {}
    for each in given:
        name, separator, address = each.partition("=")
        if not separator or not name or name in found:
            raise ConfigurationError(f"--url takes NAME=http://HOST:PORT, each name once, got {each!r}")
        Address.parse(address)
        found[name] = address
    return found


def _print_report(report: dict[str, Any], soak: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    machine, load = report["machine"], report["load"]
    console = Console()
    console.width = max(console.width, 140)  # a narrow terminal may wrap the table; columns cut short help nobody
    console.print(f"{machine['cpu']}, {machine['threads']} threads; {report['model']}")
    console.print(_describe(load), soft_wrap=True)
    table = Table()
    for name in ("server", "tok/s", "of\noffline", "req/s"):
        table.add_column(name, justify="left" if name == "server" else "right", no_wrap=True)
    for name in _TIMES:
        for which in ("p50", "p99"):
            table.add_column(f"{name} ms\n{which}", justify="right", no_wrap=True)
    for name in ("cached", "errors", "server\ncores", "client\ncores"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report["results"]:
        if row["error"] is None:
            table.add_row(*_cells(row))
    console.print(table)
    for row in report["results"]:
        for line in _lines(row, soak):
            console.print(line, soft_wrap=True, markup=False, highlight=False)


def _describe(load: dict[str, Any]) -> str:
    amount = f"{load['requests']} requests" if load["requests"] else f"{load['seconds']:g} s"
    prefixes = "one prefix" if load["num_prefixes"] == 1 else f"{load['num_prefixes']} prefixes"
    kind = "token ids" if load["token_ids"] else "text"
    return (
        f"{load['clients']} clients, {amount} a round; {prefixes} of {load['prefix']} tokens, {load['suffix']} of its "
        f"own, {load['new']} new ones; {kind}, {'streamed' if load['stream'] else 'not streamed'}"
    )


def _cells(row: dict[str, Any]) -> list[str]:
    times = [row[field][which] if row[field] else None for field in _TIMES.values() for which in ("p50", "p99")]
    return [
        row["name"],
        f"{row['output_tokens_per_s']:,.0f}",
        optional(row["over_offline"], "{:.1%}"),
        f"{row['requests_per_s']:,.1f}",
        *(optional(each, "{:,.1f}") for each in times),
        optional(row["cached_share"], "{:.1%}"),
        str(sum(row["errors"].values())),
        optional(row["server_cores"], "{:.2f}"),
        optional(row["client_cores"], "{:.2f}") if row["name"] != "offline" else "",
    ]


def _lines(row: dict[str, Any], soak: bool) -> list[str]:
    """What has no place in the table: why there are no figures, what was run, what it cost, whether it grew."""
    if row["error"] is not None:
        return [row["error"]]
    about = [each for each in (row["version"], row["weights"] and f"weights {row['weights']}") if each]
    lines = [": ".join([row["name"], "; ".join([*about, row["command"]])])]
    if (cost := row.get("http_cost")) is not None:
        fair = "" if cost >= 0 else " (less than none: something else disturbed the engine more than the server)"
        lines.append(f"{row['name']}: HTTP costs {cost:.1%} of the engine's tokens per second{fair}")
    if soak:
        lines += _soak_lines(row)
    if row["errors"]:
        lines.append(f"{row['name']}: " + ", ".join(f"{kind} ({count} times)" for kind, count in row["errors"].items()))
    if row["short_answers"]:
        lines.append(f"{row['name']}: {row['short_answers']} answers had fewer tokens than were asked for")
    if (row["idle_cores"] or 0) > 0.1:
        lines.append(f"{row['name']} kept {row['idle_cores']:.1f} processor cores busy while it was not its turn")
    if row["ended"] is False:
        lines.append(f"{row['name']} did not end when it was told to, and was killed")
    return lines


def _soak_lines(row: dict[str, Any]) -> list[str]:
    lines = []
    if memory := row["memory"]:
        ends = f"{memory['first_kb'] / 1e3:,.1f} MB at the start, {memory['last_kb'] / 1e3:,.1f} MB at the end"
        slope = memory["kb_per_minute"]
        growth = "too short to say how it grows" if slope is None else f"{slope:+,.0f} kB/min once it has settled"
        indices = memory.get("index_kb_per_minute")
        drafts = "" if indices is None else f", {indices:+,.0f} of them in what drafts are looked up in"
        lines.append(f"{row['name']}: {growth}{drafts}; {ends}")
    if row["itl_ms"] and row["itl_ms"]["p50"]:
        lines.append(f"{row['name']}: p99 / p50 of ITL {row['itl_ms']['p99'] / row['itl_ms']['p50']:.2f}")
    return lines
