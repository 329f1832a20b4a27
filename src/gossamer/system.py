"""What the system says of itself."""

from __future__ import annotations

from pathlib import Path


def available_memory() -> int | None:
    """Bytes that processes can take without others having to give up theirs; ``None`` where Linux does not tell."""
    return _bytes(Path("/proc/meminfo"), "MemAvailable:")


def peak_memory() -> int | None:
    """Most bytes of this process that have been in memory at any time; ``None`` where Linux does not tell."""
    return _bytes(Path("/proc/self/status"), "VmHWM:")


def resident_memory(pid: int) -> int | None:
    """Bytes of a process that are in memory now; ``None`` where Linux does not tell."""
    return _bytes(Path(f"/proc/{pid}/status"), "VmRSS:")


def _bytes(file: Path, field: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)
