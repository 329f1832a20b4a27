"""``gossamer serve``: the HTTP server."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.engine_options import Lora, Threads, adapters_of, load_llm, takes_options
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from gossamer.server import ModelSpec

_API = "The API"
_LIMITS = "Limits"


@takes_options(max_num_batched_tokens=256)
def serve(
    model: Annotated[
        list[str],
        typer.Argument(
            help="A name `gossamer pull` knows, a Hugging Face id, or a local directory or GGUF file; several are "
            "loaded when they are asked for.",
            show_default=False,
        ),
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is all of them.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar="GOSSAMER_API_KEY",
            help="Requests must carry this key, or one of several. Prefer the variable: others can read arguments.",
            rich_help_panel=_API,
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            help="Names that requests may give; the first is in answers. MODEL by default.", rich_help_panel=_API
        ),
    ] = None,
    lora: Lora = None,
    models_memory: Annotated[
        str,
        typer.Option(
            help="With several models: what all that are loaded may take together; the one not used for the longest "
            "time ends when another needs the room.",
            rich_help_panel=_API,
        ),
    ] = "8GB",
    pin: Annotated[
        list[Path] | None,
        typer.Option(
            help="A file whose text stays in the cache: a text, or messages if its name ends with .json.",
            rich_help_panel=_API,
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web pages of this origin may call the server from a browser.", rich_help_panel=_API),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="A name under which the server is reached, as through a proxy; others are refused. By default those "
            "of this machine, or any if --host is reached from others.",
            rich_help_panel=_API,
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="Where files and batches are kept, over restarts; without it they end with the server.",
            rich_help_panel=_API,
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="Sequences that may wait; more get 429.", rich_help_panel=_LIMITS)
    ] = 1024,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            help="Refuse fields of requests that have no effect here, such as store, which a header names otherwise; "
            "and calls in the history of tools that are not offered.",
            rich_help_panel=_API,
        ),
    ] = False,
    response_memory: Annotated[
        str,
        typer.Option(
            help="Answers of /v1/responses that are kept in memory, to go on from; 0 keeps none.",
            rich_help_panel=_LIMITS,
        ),
    ] = "64MiB",
    max_logprobs: Annotated[
        int,
        typer.Option(
            min=0, help="Log-probabilities that a request may ask for at each token.", rich_help_panel=_LIMITS
        ),
    ] = 20,
    max_body: Annotated[str, typer.Option(help="Largest body of a request.", rich_help_panel=_LIMITS)] = "8MiB",
    max_file: Annotated[str, typer.Option(help="Largest uploaded file.", rich_help_panel=_LIMITS)] = "512MiB",
    request_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds until an answer is given up.", rich_help_panel=_LIMITS)
    ] = 1800.0,
    idle_timeout: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a connection may be silent.", rich_help_panel=_LIMITS)
    ] = 60.0,
    drain_timeout: Annotated[
        float,
        typer.Option(min=0.1, help="Seconds that running requests have after SIGTERM.", rich_help_panel=_LIMITS),
    ] = 60.0,
    log_format: Annotated[
        str | None, typer.Option(help="text or json; text on a terminal by default.", show_default=False)
    ] = None,
    options: dict[str, Any] = {},  # noqa: B006  made by the decorator
    threads: Threads = None,
) -> None:
    """Serve a model, or several, over HTTP, with OpenAI's API.

        gossamer serve smollm2-135m --quantization int8

        gossamer serve smollm2-135m qwen2.5-coder-1.5b --models-memory 8GB --memory 1GB

    Then any client of that API works with `http://127.0.0.1:8000/v1`, and the page at `http://127.0.0.1:8000/` shows
    the model and its cache. Prefixes that requests share are found by themselves, computed once and kept while memory
    allows; `--pin` keeps one in any case. `--lora sql=DIR` serves an adapter beside the model, to requests whose
    `model` is `sql`. SIGTERM and Ctrl-C finish what is running first. Exit status: 0, or 1 if the engine has failed.
    """
    from gossamer.server import ServerOptions, create_app, create_front
    from gossamer.server import serve as run
    from gossamer.sizes import parse_bytes

    names = tuple(served_model_name or model)
    adapters = adapters_of(lora, *names)
    if log_format not in (None, "text", "json"):
        raise ConfigurationError(f"--log-format takes text or json, got {log_format!r}")
    for path in pin or ():
        if not path.is_file():
            raise ConfigurationError(f"cannot pin {path}: there is no such file")
    if len(model) > 1 and (served_model_name or lora or pin or data_dir):
        raise ConfigurationError(
            "--served-model-name, --lora, --pin and --data-dir are of a server of one model; it has several"
        )
    if len(set(model)) < len(model):
        raise ConfigurationError(f"a model is given twice: {', '.join(model)}")
    settings = ServerOptions(
        host=host,
        port=port,
        model_names=names,
        api_keys=tuple(api_key or ()),
        max_queue=max_queue,
        max_logprobs=max_logprobs,
        strict=strict,
        response_memory=0 if response_memory == "0" else parse_bytes(response_memory),
        max_body=parse_bytes(max_body),
        max_file=parse_bytes(max_file),
        request_timeout=request_timeout,
        idle_timeout=idle_timeout,
        drain_timeout=drain_timeout,
        pinned=tuple(pin or ()),
        allowed_origins=tuple(allowed_origin or ()),
        allowed_hosts=tuple(allowed_host or ()),
        data_dir=data_dir,
        json_logs=log_format == "json" or (log_format is None and not sys.stderr.isatty()),
    )

    if len(model) == 1:
        raise typer.Exit(run(create_app(partial(load_llm, model[0], options, threads, adapters), settings), settings))
    memory = parse_bytes(models_memory)
    specs = _specs(model, {"memory": memory // (2 * len(model))}, options, threads)
    raise typer.Exit(run(create_front(specs, settings, memory), settings))


def _specs(
    models: list[str], defaults: dict[str, Any], options: dict[str, Any], threads: int | None
) -> dict[str, ModelSpec]:
    """Models that are loaded when they are asked for. That they exist, and what options say, is seen now.

    Args:
        defaults: of those that generate text, for what ``options`` do not say.
        options: for all of them. Where some generate text and others do not, each has the options that concern it.
    """
    from gossamer.engine.chat_template import read_chat_template
    from gossamer.models.resolve import resolve_model
    from gossamer.options import Options
    from gossamer.pooling.loading import find_task
    from gossamer.pooling.refusals import check_options, without_effect
    from gossamer.server import ModelSpec

    asked = Options.of(defaults | options)
    read_chat_template(asked.conversation.chat_template)
    tasks = {model: find_task(model, asked.model.task) for model in models}
    specs = {}
    for model, task in tasks.items():
        own, cache = defaults | options, asked.engine.memory_bytes
        if task != "generate":
            ignored = without_effect(options) if "generate" in tasks.values() else []
            own, cache = {name: value for name, value in options.items() if name not in ignored}, 0
            check_options(model, task, Options.of(own))
        path = resolve_model(model, as_file=True)
        files = [path] if path.is_file() else list(path.glob("*.safetensors"))
        weights = sum(file.stat().st_size for file in files)
        specs[model] = ModelSpec(partial(load_llm, model, own, threads), weights, cache)
    return specs
