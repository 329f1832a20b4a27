"""More than one machine: replicas, jobs and matrices that are spread over several processes."""

from __future__ import annotations

from typing import Any

__all__ = ["serve_app"]


def __getattr__(name: str) -> Any:
    if name == "serve_app":  # imports Ray, which is an extra
        from gossamer.distributed.serving.app import serve_app

        return serve_app
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
