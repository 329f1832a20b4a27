"""The model argument and the options that several commands share, and loading the model they describe."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import Field
from functools import wraps
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from gossamer.cli.terminal import notice, stderr, tell_weights
from gossamer.errors import ConfigurationError
from gossamer.models.lora_config import check_adapter_names
from gossamer.options import GROUPS, Options, option_fields

if TYPE_CHECKING:
    from gossamer import LLM
    from gossamer.runners.ranks import Ranks

Model = Annotated[
    str,
    typer.Argument(
        help="A name `gossamer pull` knows, a Hugging Face id, or a local directory or GGUF file.", show_default=False
    ),
]
Memory = Annotated[str, typer.Option(help=option_fields()["memory"].metadata["help"])]
Dtype = Annotated[str, typer.Option(help=option_fields()["dtype"].metadata["help"])]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")]
Lora = Annotated[
    list[str] | None,
    typer.Option(
        help="A LoRA adapter that requests may ask for in place of the model: NAME=DIR, a directory as PEFT writes it. "
        "May be given several times.",
        metavar="NAME=DIR",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]

_NONE = "none"  # how a text says that there is no value, where that is not the default


def takes_options(
    *groups: type[Any], compare: bool = False, parallel: bool = False, only: tuple[str, ...] = (), **defaults: Any
) -> Any:
    """A decorator that gives a command a flag for each option, and hands it what was said about them.

    The command has a parameter ``options``, a dictionary of the options that are not at their default. A parameter of
    its own takes the place of an option of the same name.

    Args:
        groups: whose options; all by default.
        compare: options that can be compared take several values, with commas between them; see :func:`combinations`.
        parallel: the command may run in several processes, which :func:`take_part` lets meet.
        only: these of them.
        defaults: of this command, where they are other ones.
    """
    known = {name: each for name, each in option_fields(*groups).items() if not only or name in only}

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = Signature.from_callable(command)
        hints = get_type_hints(command, include_extras=True)
        flags = [
            _flag(each, defaults.get(name, each.default), compare and "compare" in each.metadata)
            for name, each in known.items()
            if name not in own.parameters
        ]
        names = [flag.name for flag in flags]

        @wraps(command)
        def run(**arguments: Any) -> None:
            given = {name: _value(known[name], arguments.pop(name)) for name in names}
            said = {name: value for name, value in given.items() if value != known[name].default}
            if not parallel and "tensor_parallel" in said:
                raise ConfigurationError("--tensor-parallel is for gossamer batch, and for Python programs of your own")
            with _errors_are_told():
                command(**arguments, options=said)

        parameters: list[Parameter] = []
        for each in own.parameters.values():
            parameters += flags if each.name == "options" else [each.replace(annotation=hints[each.name])]
        parameters = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in parameters]
        run.__signature__ = Signature(parameters)  # type: ignore[attr-defined]  # a name that inspect looks for
        run.__annotations__ = {each.name: each.annotation for each in parameters}
        return run

    return decorate


def combinations(options: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every choice among options that were given several values.

    Raises:
        ConfigurationError: a text that should be a number is none.

    >>> list(combinations({"sparse_weights": "off,on", "seed": 3}))
    [{'sparse_weights': 'off', 'seed': 3}, {'sparse_weights': 'on', 'seed': 3}]
    """
    known = option_fields()
    choices = []
    for name, value in options.items():
        several = isinstance(value, str) and "compare" in known[name].metadata
        choices.append([_parsed(known[name], each.strip()) for each in value.split(",")] if several else [value])
    for chosen in itertools.product(*choices):
        yield dict(zip(options, chosen, strict=True))


def adapters_of(lora: list[str] | None, *models: str) -> dict[str, str]:
    """What ``--lora`` was given: name -> directory.

    Args:
        models: names that stand for the model itself.

    Raises:
        ConfigurationError: one is not of this form, or a name is there twice.

    >>> adapters_of(["sql=adapters/sql"])
    {'sql': 'adapters/sql'}
    """
    adapters: dict[str, str] = {}
    for each in lora or ():
        name, equals, directory = each.partition("=")
        if not (equals and directory):
            raise ConfigurationError(f"--lora takes NAME=DIR, such as sql=adapters/sql, got {each!r}")
        if name in adapters:
            raise ConfigurationError(f"--lora has the name {name!r} twice: {adapters[name]} and {directory}")
        adapters[name] = directory
    check_adapter_names(adapters, *models)
    return adapters


def load_llm(model: str, options: dict[str, Any], threads: int | None, adapters: dict[str, str] | None = None) -> LLM:
    """Load the model with these options. Importing PyTorch takes seconds, so it happens only here."""
    notice(f"Loading {model}", "dim")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer import LLM

    llm = LLM(model, lora=adapters, **options)
    tell_weights(model, llm.stored_weights, llm.weights)
    for name, base in llm.adapters.items():
        notice(f"Adapter {name}" + (f", trained on {base}" if base else ""), "dim")
    if llm.weights_note:
        notice(f"The weights are not computed with as they are stored: {llm.weights_note}", "dim")
    if llm.runner_note:
        notice(f"Computed by transformers, not natively: {llm.runner_note}", "dim")
    return llm


def take_part(options: dict[str, Any]) -> Ranks | None:
    """Meet the other processes that compute the model, if there are any. All but the first are silent from now on.

    Raises:
        ConfigurationError: the options exclude each other, or there is another number of processes.
    """
    parallel = Options.of(options).model.tensor_parallel
    if parallel == 1:
        return None
    from gossamer.runners.ranks import join

    ranks = join(parallel)
    if not ranks.leads:
        stderr.quiet = True
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  until the process ends
    return ranks


@contextmanager
def _errors_are_told() -> Iterator[None]:
    """A process that was silenced by :func:`take_part` tells an error all the same, and has no exit status otherwise.

    The status of the command is that of the first process: torchrun ends all as soon as one has another than 0.
    """
    try:
        yield
    except typer.Exit:
        if not stderr.quiet:
            raise
    finally:
        stderr.quiet = False


def _flag(option: Field[Any], default: Any, several: bool) -> Parameter:
    kind = type(option.default) if option.default is not None else str
    hint = _HINTS[option.name]
    if several:
        kind, default = str, _written(default)
    elif option.default is None and int in get_args(hint):
        kind = int
    limits = {} if several else {name: option.metadata[name] for name in ("min", "max") if name in option.metadata}
    text = option.metadata["help"] + (" " + option.metadata["compare"] if several else "")
    info = typer.Option(_spelling(option), help=text, **limits)
    annotation: Any = Annotated[kind if default is not None else kind | None, info]
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _spelling(option: Field[Any]) -> str:
    return "--" + option.name.replace("_", "-")


def _value(option: Field[Any], value: Any) -> Any:
    """What a flag stands for. A number may have been given as a text, to be compared."""
    if value == _NONE and type(None) in get_args(_HINTS[option.name]) and option.default is not None:
        return None
    if isinstance(value, str) and "compare" in option.metadata and "," not in value:
        return _parsed(option, value)
    return value


def _written(value: Any) -> str:
    """As it is given where several values are compared; :func:`_parsed` reads it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else value


def _parsed(option: Field[Any], value: str) -> Any:
    if isinstance(option.default, bool):
        if value not in ("on", "off"):
            raise ConfigurationError(f"{_spelling(option)} takes on, off or both, got {value!r}")
        return value == "on"
    if not isinstance(option.default, float):
        return value
    try:
        return float(value)
    except ValueError:
        raise ConfigurationError(f"{_spelling(option)} takes numbers, such as 0,0.05, got {value!r}") from None


_HINTS: dict[str, Any] = {name: hint for group in GROUPS for name, hint in get_type_hints(group).items()}
