"""The weights as they were before pruning, in a temporary file: memory holds one copy of a model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError


class Original:
    """A copy of parameters, to go back to; a context manager that does so if its body fails.

    Args:
        parameters: whose values are copied to files, from which the system pages them in when they are looked at.
        directory: for these files, which have no names and are gone with the process; the system's by default.

    Raises:
        ConfigurationError: they cannot be written.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> try:
    ...     with Original([weight]), torch.no_grad():
    ...         _ = weight.zero_()
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     weight.data
    tensor([1., 1.])
    """

    def __init__(self, parameters: Iterable[nn.Parameter], directory: Path | None = None) -> None:
        self._values: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for parameter in parameters:
            if id(parameter) not in self._values and parameter.numel():
                copy = _mapped(parameter.shape, parameter.dtype, directory)
                copy.copy_(parameter.detach())
                self._values[id(parameter)] = parameter, copy

    def __enter__(self) -> Original:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, copy in self._values.values():
                    parameter.copy_(copy)
        self._values.clear()

    @contextmanager
    def in_place(self, parameters: Iterable[nn.Parameter]) -> Iterator[None]:
        """These parameters have their old values in the body, and then again those they have now."""
        swapped = [self._values[id(parameter)] for parameter in parameters if id(parameter) in self._values]
        now = [parameter.detach().clone() for parameter, _ in swapped]
        with torch.no_grad():
            for parameter, copy in swapped:
                parameter.copy_(copy)
            try:
                yield
            finally:
                for (parameter, _), value in zip(swapped, now, strict=True):
                    parameter.copy_(value)


def _mapped(shape: torch.Size, dtype: torch.dtype, directory: Path | None) -> Tensor:
    """A tensor in a file that is deleted already, of which the mapping is all that is left."""
    where = directory or tempfile.gettempdir()
    try:
        handle, name = tempfile.mkstemp(prefix="gossamer-original-", dir=directory)
    except OSError as error:
        raise ConfigurationError(f"cannot keep a copy of the weights in {where}: {error.strerror}") from error
    try:
        if hasattr(os, "posix_fallocate"):  # a mapped file for which there is no space would end the process
            os.posix_fallocate(handle, 0, shape.numel() * dtype.itemsize)
        return torch.from_file(name, shared=True, size=shape.numel(), dtype=dtype).view(shape)
    except OSError as error:
        raise ConfigurationError(f"there is no space in {where} for a copy of the weights: {error.strerror}") from error
    finally:
        os.close(handle)
        os.unlink(name)
