"""The keys that clients of a deployment must have."""

from __future__ import annotations

import os


def api_keys() -> tuple[str, ...]:
    """Those in the variable ``GOSSAMER_API_KEY``, with spaces between them, as ``gossamer serve`` reads it.

    They are no part of what is deployed, which Ray keeps and shows: every node has them in its environment.
    """
    return tuple(os.environ.get("GOSSAMER_API_KEY", "").split())
