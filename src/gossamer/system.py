"""What the system says of itself."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that processes can take without others having to give up theirs; ``None`` where Linux does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
