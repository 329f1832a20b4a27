"""What comes with the extra: ``pip install 'gossamer[ray]'``."""

from __future__ import annotations

import importlib.util
from typing import Any

from gossamer.errors import ConfigurationError


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


def require_simpy() -> Any:
    """The module, of discrete events.

    Raises:
        ConfigurationError: it is not installed; names the extra.
    """
    try:
        import simpy
    except ImportError:
        raise ConfigurationError("this needs SimPy, which is not installed: pip install 'gossamer[ray]'") from None
    return simpy
