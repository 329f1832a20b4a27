"""The Ray cluster that commands run on: reached or started, and looked at before anything begins.

Whoever reaches Ray's ports can run code there. A cluster that this process starts listens on the loopback interface
only; one that is reached by its address must ask for a token, which is Ray's default since 2.61, unless the caller
says otherwise.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from gossamer.errors import ConfigurationError

OBJECT_STORE = 512 * 2**20  # bytes of a cluster that is started here: only ids and requests pass through it


def check_ray() -> None:
    """Whether Ray is there, without importing it.

    Raises:
        ConfigurationError: it is not installed; names the extra.
    """
    if importlib.util.find_spec("ray") is None:
        require_ray()


def require_ray() -> Any:
    """The module.

    Raises:
        ConfigurationError: it is not installed; names the extra.
    """
    try:
        import ray
    except ImportError:
        raise ConfigurationError("this needs Ray, which is not installed: pip install 'gossamer[ray]'") from None
    return ray


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


def check_room(count: int, *, cpus: float, memory: int, what: str) -> None:
    """Whether the cluster has room for ``count`` actors.

    Args:
        what: one of them, for the message.

    Raises:
        ConfigurationError: it has not; says what there is.
    """
    there = nodes()
    room = sum(places(each, cpus=cpus, memory=memory) for each in there)
    if room < count:
        listed = ", ".join(f"{each.address} with {each.cpus:g} CPUs and {each.memory / 1e9:.1f} GB" for each in there)
        raise ConfigurationError(
            f"{count} x {what} need {cpus:g} CPUs and {memory / 1e9:.2f} GB each; there is room for {room}: "
            f"{listed or 'no node'}. Take fewer, a smaller --memory, fewer --threads, or more nodes"
        )


@contextmanager
def local_cluster(*, cpus: int | None = None) -> Iterator[Any]:
    """A cluster of this machine alone, for as long as the block lasts; nothing of it listens beyond loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it tells is told better by commands
    # Ray takes loopback addresses for a mistake on Linux, unless this is set before it is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    ray = require_ray()
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=False,
        object_store_memory=OBJECT_STORE,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield ray
    finally:
        ray.shutdown()


@contextmanager
def cluster_at(address: str, *, insecure: bool = False, timeout: float = 20.0) -> Iterator[Any]:
    """The cluster at an address, as ``ray.init`` takes it: ``auto``, ``host:port``.

    Args:
        insecure: take one that lets in whoever reaches it.
        timeout: seconds until it counts as unreachable.

    Raises:
        ConfigurationError: it does not answer, refuses us, or asks nobody for a token.
    """
    _check_reachable(address, timeout)
    ray = require_ray()
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds; they all say why
        raise ConfigurationError(f"cannot use the Ray cluster at {address}: {_first_line(error)}") from None
    try:
        if not insecure and not _asks_for_tokens(ray):
            raise ConfigurationError(
                f"the Ray cluster at {address} asks nobody for a token: whoever reaches its ports can run code on it. "
                "Start it with RAY_AUTH_MODE=token (https://docs.ray.io/en/latest/ray-security/token-auth.html), or "
                "say --insecure if its network is yours alone"
            )
        yield ray
    finally:
        ray.shutdown()


def _asks_for_tokens(ray: Any) -> bool:
    """As the processes of the cluster see it, which inherit its mode."""

    def asks() -> bool:
        from ray._raylet import (  # type: ignore[attr-defined]  # made by Cython
            AuthenticationMode,
            get_authentication_mode,
        )

        return bool(get_authentication_mode() != AuthenticationMode.DISABLED)

    return bool(ray.get(ray.remote(num_cpus=0)(asks).remote(), timeout=60))


def _check_reachable(address: str, timeout: float) -> None:
    """Ray itself would try for half a minute."""
    import socket

    host, _, port = address.rpartition(":")
    host = host.removeprefix("ray://")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=min(timeout, 5.0)).close()
    except OSError as error:
        raise ConfigurationError(
            f"there is no Ray cluster at {address} ({error.strerror or error}); `ray start --head` starts one, and "
            "`ray status` tells its address"
        ) from None


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
