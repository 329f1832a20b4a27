"""The weights as they were before pruning, in a temporary file: memory holds one copy of a model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Original:
    """A copy of parameters, to go back to; a context manager that does so if its body fails.

    Args:
        parameters: whose values are copied to a file, from which the system pages them in when they are looked at.

    >>> weight = nn.Parameter(torch.ones(2))
    >>> try:
    ...     with Original([weight]), torch.no_grad():
    ...         _ = weight.zero_()
    ...         raise KeyboardInterrupt
    ... except KeyboardInterrupt:
    ...     weight.data
    tensor([1., 1.])
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="gossamer-original-")
        self._values: dict[int, tuple[nn.Parameter, Tensor]] = {}
        for parameter in parameters:
            if id(parameter) in self._values or not parameter.numel():
                continue
            file = f"{self._directory.name}/{len(self._values)}"
            copy = torch.from_file(file, shared=True, size=parameter.numel(), dtype=parameter.dtype)
            copy.view(parameter.shape).copy_(parameter.detach())
            self._values[id(parameter)] = parameter, copy.view(parameter.shape)

    def __enter__(self) -> Original:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            with torch.no_grad():
                for parameter, copy in self._values.values():
                    parameter.copy_(copy)
        self._values.clear()
        self._directory.cleanup()

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
