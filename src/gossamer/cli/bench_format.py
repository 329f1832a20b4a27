"""What the bench commands have in common: lists as options, figures as cells of a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from rich.console import Console


Isa = Annotated[
    str,
    typer.Option(
        help="Instruction sets that take turns: all that this processor has, or some, such as avx2,portable; "
        "the one in use by default."
    ),
]


def names(text: str) -> tuple[str, ...]:
    """``"a, b"`` -> ``("a", "b")``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str, option: str) -> list[int]:
    """``"8,64"`` -> ``[8, 64]``.

    Raises:
        ConfigurationError: something else than numbers; names the option.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"--{option} takes a number, or several with commas between, got {text!r}") from None


def optional(value: float | None, form: str) -> str:
    """The value in the form, or an empty cell."""
    return "" if value is None else form.format(value)


def print_grouped(
    console: Console,
    results: Sequence[dict[str, Any]],
    shape: tuple[str, str],
    columns: Sequence[str],
    cells: Callable[[dict[str, Any]], Sequence[str]],
) -> None:
    """A table of contestants, grouped by the two fields ``shape``; below it, why some of them have no figures."""
    from rich.table import Table

    table = Table()
    for name in (*shape, "", *columns):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for key, rows in groupby(results, key=lambda row: tuple(str(row[name]) for name in shape)):
        for number, row in enumerate(rows):
            table.add_row(*(("", "") if number else key), row["contestant"], *cells(row))
        table.add_section()
    console.print(table)
    for row in results:
        if row["error"]:
            console.print(
                f"{row[shape[0]]} x {row[shape[1]]}, {row['contestant']}: {row['error']}", soft_wrap=True, markup=False
            )
