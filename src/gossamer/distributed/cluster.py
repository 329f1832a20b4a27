"""The Ray cluster that commands run on: reached, or started.

Whoever reaches Ray's ports can run code there. A cluster that this process starts listens on the loopback interface
only; one that is reached by its address must ask for a token, which is Ray's default since 2.61, unless the caller
says otherwise.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gossamer.distributed.extra import require_ray
from gossamer.errors import ConfigurationError

OBJECT_STORE = 512 * 2**20  # bytes of a cluster that is started here: only ids and requests pass through it


@contextmanager
def local_cluster(*, cpus: int | None = None) -> Iterator[Any]:
    """A cluster of this machine alone, for as long as the block lasts; nothing of it listens beyond loopback."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.serve").setLevel(logging.ERROR)  # what it tells is told better by commands
    # Ray takes loopback addresses for a mistake on Linux, unless this is set before it is imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # Ten times a second by default, which takes 3 % of a processor and notices a dead replica half a second earlier.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    # Its own token, which Ray would write into the home directory otherwise.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
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
def cluster_at(address: str, *, insecure: bool = False) -> Iterator[Any]:
    """A cluster that runs already.

    Args:
        address: ``auto`` or ``host:port``.
        insecure: take one that lets in whoever reaches it.

    Raises:
        ConfigurationError: it does not answer, refuses us, or asks nobody for a token.
    """
    from gossamer.distributed.tokens import check_address

    found = check_address(address, insecure=insecure)
    ray = require_ray()
    try:
        ray.init(address=found, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:  # of many kinds; they all say why
        raise ConfigurationError(f"cannot use the Ray cluster at {found}: {_first_line(error)}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
