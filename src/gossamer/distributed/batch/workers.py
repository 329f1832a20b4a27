"""What a batch runs on: how many actors, and what each has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gossamer.distributed.nodes import PROCESS, look_at, nodes, places
from gossamer.errors import ConfigurationError


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
    seen = look_at(there, model, lora, str(witness))
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
