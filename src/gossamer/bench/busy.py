"""Processes that keep the machine busy while something is measured, as a neighbour would."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# ends by itself when its parent does
_SPIN = "import os\nparent = os.getppid()\nwhile os.getppid() == parent:\n    sum(range(10_000))"


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Run ``count`` processes that use a core each, with the usual priority, while the body runs."""
    processes = [subprocess.Popen([sys.executable, "-c", _SPIN]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()
