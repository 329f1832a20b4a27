"""Whether machines of a cluster can work on a job: the same Gossamer, the same model, the same files, enough room."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gossamer
from gossamer.distributed.cluster import Node, nodes, places, require_ray
from gossamer.errors import ConfigurationError, GossamerError

#: Bytes of a process beside weights and cache: PyTorch, Ray, the tokenizer, a step's numbers.
PROCESS = 1 << 30


@dataclass(frozen=True)
class Workers:
    """What a job runs on.

    Attributes:
        actors: how many.
        threads: of each.
        memory: bytes of each.
        model, adapters: digests of what they load.
    """

    actors: int
    threads: int
    memory: int
    model: str
    adapters: dict[str, str]


def look(model: str, lora: dict[str, str], witness: str) -> dict[str, Any]:
    """What a machine has; runs on that machine. Errors are told, not raised, so that their words arrive."""
    from gossamer.models.resolve import resolve_model
    from gossamer.models.weights_digest import weights_digest

    told: dict[str, Any] = {"gossamer": gossamer.__version__, "host": platform.node(), "error": None}
    if not Path(witness).exists():
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


def choose_workers(
    model: str,
    lora: dict[str, str],
    witness: Path,
    *,
    actors: int | None,
    threads: int | None,
    cache_bytes: int,
) -> Workers:
    """Look at all machines of the cluster, and decide what runs where.

    Args:
        model, lora: as each machine is to load them.
        witness: a file of the job, which each machine has to see.
        actors: how many; by default as many as there is room for.
        threads: of each; by default a machine's processors are shared out among its actors, or all given to one.
        cache_bytes: of keys and values of each.

    Raises:
        ConfigurationError: a machine has another Gossamer, another model or not the files; or there is too little room.
    """
    there = [each for each in nodes() if each.cpus >= 1]  # a head without processors runs no actors
    if not there:
        raise ConfigurationError("no machine of the cluster has processors for actors; `ray status` lists them")
    seen = _look_at(there, model, lora, str(witness))
    first = seen[0]
    memory = first["bytes"] + cache_bytes + PROCESS
    smallest = int(min(each.cpus for each in there))
    if threads is None:
        each_node = 1 if actors is None else -(-actors // len(there))
        threads = max(smallest // each_node, 1)
    room = sum(places(each, cpus=threads, memory=memory) for each in there)
    if room < (actors or 1):
        listed = ", ".join(f"{each.address} has {each.cpus:g} and {_gb(each.memory)}" for each in there)
        parts = f"weights {_gb(first['bytes'])}, --memory {_gb(cache_bytes)}, {_gb(PROCESS)} for the process"
        raise ConfigurationError(
            f"{actors or 1} actors of {threads} CPUs and {_gb(memory)} each ({parts}) do not fit, there is room for "
            f"{room}: {listed}. Take fewer --actors, fewer --threads, a smaller --memory, or more machines"
        )
    return Workers(actors or room, threads, memory, first["digest"], first["lora"])


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"


def _look_at(there: list[Node], model: str, lora: dict[str, str], witness: str) -> list[dict[str, Any]]:
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
