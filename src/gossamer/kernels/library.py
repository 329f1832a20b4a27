"""Which native kernels there are, and which of them are used."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import ModuleType

import torch  # noqa: F401  loads its OpenMP first, so that the kernels share it

from gossamer.errors import ConfigurationError

VARIABLE = "GOSSAMER_ISA"
FILE_VARIABLE = "GOSSAMER_NATIVE"  # another build of the module, such as that of `make sanitize`
REFERENCE = "reference"  # no native kernels: PyTorch alone


@cache
def core() -> ModuleType | None:
    """The compiled module, or ``None`` if the package was installed without it."""
    if file := os.environ.get(FILE_VARIABLE):
        spec = importlib.util.spec_from_file_location("gossamer._native", file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    try:
        return importlib.import_module("gossamer._native")
    except ImportError:
        return None


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


def compared(names: Sequence[str]) -> list[str]:
    """The instruction sets that a benchmark compares: ``["all"]`` for every one there is, or some by name.

    Raises:
        ConfigurationError: one of them is not there.
    """
    there = instruction_sets()
    if list(names) == ["all"]:
        return there
    for name in names:
        if name not in there:
            raise ConfigurationError(f"isa must be all, or among {', '.join(there)} on this processor; got {name!r}")
    return list(dict.fromkeys(names))


@contextmanager
def using(isa: str | None) -> Iterator[None]:
    """Within, :func:`instruction_set` is ``isa``; what it is anyway for ``None``."""
    before = os.environ.get(VARIABLE)
    if isa is not None:
        os.environ[VARIABLE] = isa
    try:
        yield
    finally:
        if isa is not None:
            os.environ.pop(VARIABLE)
            if before is not None:
                os.environ[VARIABLE] = before
