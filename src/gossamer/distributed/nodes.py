"""The machines of a cluster: what room they have, and whether they have the same Gossamer and the same model."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gossamer
from gossamer.distributed.extra import require_ray
from gossamer.errors import ConfigurationError, GossamerError

#: Bytes of a process beside weights and cache: PyTorch, Ray, the tokenizer, a step's numbers.
PROCESS = 1 << 30


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, and what it has free for actors.

    Attributes:
        id, address: Ray's id, and its IP address.
        cpus: processors.
        memory: bytes.
    """

    id: str
    address: str
    cpus: float
    memory: int


def nodes() -> list[Node]:
    """Those that are alive."""
    ray = require_ray()
    return [
        Node(
            each["NodeID"],
            each["NodeManagerAddress"],
            each["Resources"].get("CPU", 0.0),
            int(each["Resources"].get("memory", 0)),
        )
        for each in ray.nodes()
        if each["Alive"]
    ]


def places(node: Node, *, cpus: float, memory: int) -> int:
    """How many actors of this size a node has room for.

    >>> places(Node("a", "127.0.0.1", cpus=2.0, memory=8 << 30), cpus=1, memory=3 << 30)
    2
    """
    by_cpu = int(node.cpus // cpus) if cpus else 1_000_000
    return min(by_cpu, node.memory // memory) if memory else by_cpu


def from_the_root(
    model: str, lora: Mapping[str, str], options: Mapping[str, Any]
) -> tuple[str, dict[str, str], dict[str, Any]]:
    """Model, adapters and options of :class:`gossamer.LLM`, with paths that mean the same where actors work.

    >>> from_the_root("smollm2-135m", {}, {"prefix_dir": "/prefixes", "seed": 1})
    ('smollm2-135m', {}, {'prefix_dir': '/prefixes', 'seed': 1})
    """
    paths = {"chat_template", "generation_config"} & options.keys()
    known = {name: _absolute(options[name]) for name in paths if os.path.exists(options[name])}
    if options.get("prefix_dir"):
        known["prefix_dir"] = _absolute(options["prefix_dir"])
    found = _absolute(model) if os.path.exists(Path(model).expanduser()) else model
    return found, {name: _absolute(each) for name, each in lora.items()}, {**options, **known}


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().resolve())


def look(model: str, lora: dict[str, str], witness: str | None = None) -> dict[str, Any]:
    """What a machine has; runs on that machine. Errors are told, not raised, so that their words arrive.

    Args:
        model, lora: as it is to load them.
        witness: a file that it has to see.
    """
    from gossamer.models.resolve import resolve_model
    from gossamer.models.weights_digest import weights_digest

    told: dict[str, Any] = {"gossamer": gossamer.__version__, "host": platform.node(), "error": None}
    if witness is not None and not Path(witness).exists():
        return told | {"error": f"it does not see {Path(witness).parent}, which all machines need at the same path"}
    try:
        path = resolve_model(model, as_file=True)
        files = [each for each in path.rglob("*") if each.is_file()] if path.is_dir() else [path]
        weights = [each for each in files if each.suffix in (".safetensors", ".gguf")]
        told["digest"] = weights_digest(path)
        told["bytes"] = sum(each.stat().st_size for each in weights)
        told["lora"] = {name: weights_digest(Path(directory)) for name, directory in lora.items()}
    except (GossamerError, OSError) as error:
        told["error"] = str(error)
    return told


def look_at(there: list[Node], model: str, lora: dict[str, str], witness: str | None = None) -> list[dict[str, Any]]:
    """What each of these machines has; see :func:`look`.

    Raises:
        ConfigurationError: one has another Gossamer than this one, another model than the first, or not the files.
    """
    ray = require_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    task = ray.remote(look)
    asked = [
        task.options(
            num_cpus=0, max_retries=1, scheduling_strategy=NodeAffinitySchedulingStrategy(node_id=each.id, soft=False)
        ).remote(model, lora, witness)
        for each in there
    ]
    seen: list[dict[str, Any]] = []
    for node, reference in zip(there, asked, strict=True):
        try:
            told = ray.get(reference)
        except Exception as error:  # of Ray, of many kinds: no Gossamer there is one of them
            reason = str(error).strip().splitlines()[-1] if str(error).strip() else type(error).__name__
            raise ConfigurationError(f"machine {node.address} cannot run Gossamer: {reason}") from None
        _check(node, told, seen[0] if seen else None)
        seen.append(told)
    return seen


def _check(node: Node, told: dict[str, Any], first: dict[str, Any] | None) -> None:
    where = f"machine {node.address} ({told['host']})"
    if told["gossamer"] != gossamer.__version__:
        raise ConfigurationError(
            f"{where} has Gossamer {told['gossamer']}, this one {gossamer.__version__}; install the same everywhere"
        )
    if told["error"] is not None:
        raise ConfigurationError(f"{where}: {told['error']}")
    if first is not None and (told["digest"], told["lora"]) != (first["digest"], first["lora"]):
        raise ConfigurationError(
            f"{where} has another model or adapter of this name than {first['host']}: their files differ (SHA-256 "
            f"{told['digest'][:12]} and {first['digest'][:12]}); copy the same everywhere"
        )
