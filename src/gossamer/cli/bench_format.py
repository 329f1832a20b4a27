"""What the bench commands have in common: lists of numbers as options, figures as cells of a table."""

from __future__ import annotations

from gossamer.errors import ConfigurationError


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
