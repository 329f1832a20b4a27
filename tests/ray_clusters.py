"""Ray clusters of several nodes on this machine, for tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Before Ray is imported anywhere: nodes on the loopback interface, and no report about them to anybody.
os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
OBJECT_STORE = 100 * 2**20
GIGABYTE = 2**30


@contextmanager
def cluster(nodes: int = 2, *, cpus: int = 1, memory: int = 8 * GIGABYTE) -> Iterator[Any]:
    """A cluster with this process in it; every node has so many CPUs and so much memory."""
    import logging

    import ray
    from ray.cluster_utils import Cluster

    size = {"num_cpus": cpus, "memory": memory, "object_store_memory": OBJECT_STORE}
    made = Cluster(initialize_head=True, head_node_args=size | {"include_dashboard": False})
    try:
        for _ in range(nodes - 1):
            made.add_node(**size)
        ray.init(address=made.address, log_to_driver=False, logging_level=logging.ERROR)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
