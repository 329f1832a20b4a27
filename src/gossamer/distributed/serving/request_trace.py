"""A line per answered request, without texts: what ``gossamer simulate`` replays."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gossamer.distributed.routing.chain import BLOCK_BYTES
from gossamer.distributed.serving.prompts import RoutedPrompt
from gossamer.errors import ConfigurationError

if TYPE_CHECKING:
    from gossamer.distributed.serving.ingress import Lease


class RequestTrace:
    """Appends to a file; every line reaches the operating system at once.

    Args:
        path: of the file; it is made, or goes on.

    Raises:
        ConfigurationError: it cannot be written.
    """

    def __init__(self, path: str) -> None:
        try:
            self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115  for the server's life
        except OSError as error:
            raise ConfigurationError(f"cannot write the trace {path}: {error.strerror}") from None

    def write(self, prompt: RoutedPrompt, lease: Lease) -> None:
        """A request that has been answered."""
        usage = lease.usage or {}
        line = {
            "t": round(lease.began, 4),
            "chain": [f"{each:016x}" for each in prompt.chain],
            "block_tokens": round(BLOCK_BYTES * usage["prompt_tokens"] / max(prompt.size, 1), 2),
            "prompt_tokens": usage["prompt_tokens"],
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "output_tokens": usage["completion_tokens"],
            "seconds": round(time.time() - lease.began, 4),
            "replica": lease.replica,
        }
        self._file.write(json.dumps(line) + "\n")
