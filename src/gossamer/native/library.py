"""Which native kernels there are, and which of them are used."""

from __future__ import annotations

import os
from functools import cache
from types import ModuleType

import torch  # noqa: F401  loads its OpenMP first, so that the kernels share it

from gossamer.errors import ConfigurationError

VARIABLE = "GOSSAMER_ISA"
REFERENCE = "reference"  # no native kernels: PyTorch alone


@cache
def core() -> ModuleType | None:
    """The compiled module, or ``None`` if the package was installed without it."""
    try:
        from gossamer import _native
    except ImportError:
        return None
    module: ModuleType = _native
    return module


def instruction_sets() -> list[str]:
    """Those that this build has and this processor can run, best first."""
    library = core()
    return [] if library is None else list(library.instruction_sets())


def instruction_set() -> str | None:
    """The one in use: the best, or the one that ``GOSSAMER_ISA`` names; ``None`` for PyTorch alone.

    Raises:
        ConfigurationError: ``GOSSAMER_ISA`` names one that is not there.
    """
    there = instruction_sets()
    wanted = os.environ.get(VARIABLE)
    if not wanted:
        return there[0] if there else None
    if wanted == REFERENCE:
        return None
    if wanted not in there:
        choices = ", ".join([*there, REFERENCE])
        raise ConfigurationError(f"{VARIABLE} is {wanted!r}; this build on this processor has: {choices}")
    return wanted
