"""What a client's program consists of: functions, one for each feature, that fail where the client and the server do
not understand each other. ``table.py`` runs the program and reads what it prints."""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from typing import Any

FEATURES = ["answer", "stream", "tools", "required", "results", "structured", "responses", "embeddings", "scoring"]
QUESTION = "What is the weather in Paris?"
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Oslo"]}, "days": {"type": "integer"}},
    "required": ["city", "days"],
    "additionalProperties": False,
}

_cells: dict[str, Callable[[], object]] = {}


def cell(feature: str) -> Callable[[Callable[[], object]], Callable[[], object]]:
    """Marks what tries a feature, one of :data:`FEATURES`."""
    if feature not in FEATURES or feature in _cells:
        raise ValueError(f"no such feature, or a second one: {feature}")

    def mark(function: Callable[[], object]) -> Callable[[], object]:
        _cells[feature] = function
        return function

    return mark


def address() -> tuple[str, str, str]:
    """The server's address, its model, and an encoder's address, from the command line."""
    url, model, encoder = sys.argv[1:4]
    return url, model, encoder


def check_arguments(arguments: str | dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call that are valid under :data:`PARAMETERS`."""
    found = json.loads(arguments) if isinstance(arguments, str) else arguments
    assert set(found) == {"city", "days"} and found["city"] in ("Paris", "Oslo"), found
    assert type(found["days"]) is int, found
    return found


def run() -> None:
    """Print a line of JSON for each cell: its feature, and what went wrong, if anything did."""
    for feature, function in _cells.items():
        try:
            function()
            fault = None
        except Exception as error:  # whatever a client raises is what the cell says
            traceback.print_exc()
            fault = f"{type(error).__name__}: {error}"
        print(json.dumps({"feature": feature, "fault": fault}), flush=True)
