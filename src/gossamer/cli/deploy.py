"""``gossamer deploy``: several replicas of a model behind one address, on Ray Serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.cli.engine_options import AsJson, Lora, Model, adapters_of, takes_options
from gossamer.cli.terminal import notice
from gossamer.errors import ConfigurationError

_CLUSTER = "The cluster"
_API = "The API"
_LIMITS = "Limits"


@takes_options(max_num_batched_tokens=256)
def deploy(
    model: Model,
    replicas: Annotated[int, typer.Option(min=1, help="Processes with the model.", rich_help_panel=_CLUSTER)] = 2,
    max_replicas: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Start more replicas, up to so many, while more requests come than 0.7 of what is computed at once.",
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Processors of a replica.", rich_help_panel=_CLUSTER)] = 1,
    address: Annotated[
        str | None,
        typer.Option(
            help="A Ray cluster that runs already: auto, or host:port of its head. Without it a cluster of this "
            "machine is started, and ends with the command.",
            show_default=False,
            rich_help_panel=_CLUSTER,
        ),
    ] = None,
    insecure: Annotated[
        bool,
        typer.Option(
            "--insecure",
            help="Take a cluster that asks nobody for a token: whoever reaches it can run code there.",
            rich_help_panel=_CLUSTER,
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Check everything, print what would be deployed as a Serve config file, and start nothing.",
            rich_help_panel=_CLUSTER,
        ),
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Names that requests may give; the first is in answers. MODEL by default.", rich_help_panel=_API
        ),
    ] = None,
    lora: Lora = None,
    pin: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file whose text stays in the cache of every replica: a text, or messages if its name ends with "
            ".json.",
            rich_help_panel=_API,
        ),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option(
            help="A file for one line per request: times, tokens and keyed hashes of the prompt, no text. "
            "`gossamer simulate` reads it.",
            show_default=False,
            rich_help_panel=_API,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Sequences that may wait at a replica; more get 429.", rich_help_panel=_LIMITS)
    ] = 1024,
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until an answer is given up.", rich_help_panel=_LIMITS)
    ] = 1800.0,
    drain_timeout: Annotated[
        float,
        typer.Option(
            min=0.1, help="Seconds that running requests have when a replica is to end.", rich_help_panel=_LIMITS
        ),
    ] = 60.0,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    as_json: AsJson = False,
) -> None:
    """Serve one model with several replicas, each request by the one that has most of its prompt cached.

        gossamer deploy smollm2-135m --replicas 2 --quantization int8 --memory 1GB

        ray start --head && gossamer deploy smollm2-135m --replicas 8 --address auto

    Clients talk to it as to `gossamer serve`. A replica that dies is replaced; requests that it had not begun to answer
    go to another one, with the same random numbers, and streams that it had begun end with an error of their own. A
    replica that is to end finishes what it has. Clients must send one of the keys in the variable GOSSAMER_API_KEY, if
    there are any; on a cluster that runs already it must be set there.

    With --address the deployment stays after the command: `serve status` looks at it, `serve delete gossamer` ends it.
    Without, Ctrl-C and SIGTERM finish what is running and end it. Needs the extra: pip install 'gossamer[ray]'.
    """
    from gossamer.distributed.cluster import cluster_at, local_cluster
    from gossamer.distributed.extra import check_ray
    from gossamer.distributed.quiet import quiet_ray
    from gossamer.distributed.serving.deploying import Deployment, as_config

    check_ray()
    adapters = adapters_of(lora, *(served_model_name or [model]))
    for path in pin or ():
        if not path.is_file():
            raise ConfigurationError(f"cannot pin {path}: there is no such file")
    server = {
        "model_names": tuple(served_model_name or [model]),
        "max_queue": max_queue,
        "request_timeout": request_timeout,
        "drain_timeout": drain_timeout,
    }
    deployment = Deployment.of(
        model,
        replicas=replicas,
        max_replicas=max_replicas,
        threads=threads,
        host=host,
        port=port,
        lora=adapters,
        pinned=tuple(str(path.absolute()) for path in pin or ()),
        trace=None if trace is None else str(trace.absolute()),
        server=server,
        engine=options,
    )
    if dry_run:
        if address is not None:
            with quiet_ray(), cluster_at(address, insecure=insecure):
                deployment.check_cluster()
        else:
            deployment.check_machine()
        typer.echo(as_config(deployment.settings))
        notice("Nothing was started.", "dim")
        return
    notice(f"Starting {replicas} replicas of {model}", "dim")
    if address is not None:
        with quiet_ray(), cluster_at(address, insecure=insecure):
            url = deployment.start()
            _tell(url, deployment, as_json)
            notice("It stays: `serve status` looks at it, `serve delete gossamer` ends it.")
        return
    deployment.check_machine()
    with quiet_ray(), local_cluster():
        url = deployment.start()
        _tell(url, deployment, as_json)
        deployment.wait()


def _tell(url: str, deployment: Any, as_json: bool) -> None:
    if as_json:
        typer.echo(
            json.dumps({"address": url, "replicas": deployment.settings.replicas, "model": deployment.settings.model})
        )
    else:
        notice(f"Ready at {url}: clients use {url}/v1", "green")
