"""Reading the quantization settings that other projects write: nothing is passed over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from gossamer.errors import CheckpointError, GossamerError


def refuse_unknown(
    config: Mapping[str, Any], known: Collection[str], where: str, refusal: Callable[[str], GossamerError]
) -> None:
    """Refuses a key that nobody here reads, unless it says nothing: null, false, or empty.

    Args:
        config: the settings.
        known: keys that are read, or may be passed over.
        where: these settings stand, for messages.
        refusal: makes the error of a reason.

    >>> refuse_unknown({"bits": 8, "rotation": None}, {"bits"}, "scheme", ValueError)
    >>> refuse_unknown({"bits": 8, "rotation": "hadamard"}, {"bits"}, "scheme", ValueError)
    Traceback (most recent call last):
    ValueError: scheme.rotation is 'hadamard', and what that asks for is not known here
    """
    for key, value in config.items():
        if key in known or value is None or value is False or value in ({}, [], ""):
            continue
        shown = repr(value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        raise refusal(f"{where}.{key} is {shown}, and what that asks for is not known here")


def as_object(value: Any, where: str) -> Mapping[str, Any]:
    """Settings inside of settings; none are an empty object.

    Raises:
        CheckpointError: it is something else.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where} is {value!r}; it has to be an object with fields")
    return value


def as_names(value: Any, where: str) -> list[str]:
    """A list of names; none are an empty list.

    Raises:
        CheckpointError: it is something else.
    """
    if value is None:
        return []
    if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
        raise CheckpointError(f"{where} is {value!r}; it has to be a list of names")
    return list(value)
