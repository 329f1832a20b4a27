"""Where commands write what is not their result: progress, notices and errors go to stderr."""

from __future__ import annotations

from gossamer.errors import GossamerError
from gossamer.progress import stderr as stderr


def notice(text: str, style: str = "") -> None:
    """One line; a terminal may wrap it, a file or pipe gets it whole."""
    stderr.print(text, style=style, soft_wrap=True)


def print_error(error: GossamerError) -> None:
    """What went wrong, as every command shows it."""
    stderr.print("error: ", style="bold red", end="")
    notice(str(error))


def tell_weights(model: str, stored: str | None, computed: str) -> None:
    """Say how the file that a model's weights came from stores them, if it rounds them: that shows in its answers.

    Args:
        model: its name.
        stored: how the file stores them, if it is known.
        computed: what is computed with.
    """
    if stored not in (None, "F32", "F16", "BF16"):
        notice(
            f"The weights of {model} were rounded to {stored} by whoever made its GGUF file; computed with: {computed}",
            "dim",
        )
