"""The text that a model is measured on, and the model, for commands that measure quality."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.terminal import notice, tell_weights

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.options import ModelOptions

Text = Annotated[
    Path | None,
    typer.Option(help="A UTF-8 file to measure on; the language reference that comes with Python by default."),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]


def read(text: Path | None) -> str:
    """The text of a file, or the default one."""
    from gossamer.texts import read_text, reference_text

    return reference_text() if text is None else read_text(text)


def describe_text(text: Path | None) -> str:
    return "Python's language reference" if text is None else str(text)


def load(model: str, options: ModelOptions, threads: int | None) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    notice(f"Loading {model}", "dim")
    import torch

    from gossamer.runners.loading import load_network, weights_of

    if threads is not None:
        torch.set_num_threads(threads)
    network, tokenizer = load_network(model, options)
    tell_weights(model, stored_weights(network), weights_of(network))
    return network, tokenizer


def stored_weights(network: Any) -> str | None:
    """How the GGUF file that a model came from stores its weights, such as ``Q4_1``."""
    return getattr(network.config, "gguf_file_type", None)


def cut_windows(tokenizer: Any, text: str, window: int, count: int | None) -> list[Tensor]:
    """Windows of the text; says so if there are fewer than were asked for."""
    from gossamer.texts import token_windows

    cut = token_windows(tokenizer, text, window, count)
    if count is not None and len(cut) < count:
        notice(f"The text holds {len(cut)} windows of {window} tokens, not {count}.", "yellow")
    return cut
