"""The ``gossamer`` command. PyTorch and transformers are imported inside commands, so that --help is immediate."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from gossamer.cli.batch import batch
from gossamer.cli.bench import bench_app
from gossamer.cli.chat import chat
from gossamer.cli.compress import compress
from gossamer.cli.deploy import deploy
from gossamer.cli.eval import evaluate
from gossamer.cli.export import export
from gossamer.cli.info import info
from gossamer.cli.inspect import inspect
from gossamer.cli.pull import pull
from gossamer.cli.serve import serve
from gossamer.cli.simulate import simulate
from gossamer.cli.terminal import print_error
from gossamer.errors import GossamerError

app = typer.Typer(
    name="gossamer",
    help="Makes transformer language models light: many prompts, one prefix, on the machine you already own.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
)
app.command()(pull)
app.command()(batch)
app.command()(chat)
app.command()(serve)
app.command()(deploy)
app.command()(simulate)
app.command()(compress)
app.command()(export)
app.command("eval")(evaluate)
app.command()(inspect)
app.command()(info)
app.add_typer(bench_app, name="bench")


def _print_version(wanted: bool) -> None:
    if wanted:
        import gossamer

        typer.echo(f"gossamer {gossamer.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. An error of ours becomes one line on stderr; GOSSAMER_DEBUG=1 shows where it came from."""
    try:
        app()
    except GossamerError as error:
        if os.environ.get("GOSSAMER_DEBUG"):
            raise
        print_error(error)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
