"""Processes that compute one thing together, as operators and the pruner see them.

One process, :data:`ALONE`, is the rule; :class:`gossamer.distributed.fisher.group.Group` is several. Everything that
several processes do is written for :class:`Ranks`, so that there is one algorithm and not two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, GossamerError


class Ranks(Protocol):
    """Processes, of which this one has a number. Each method is called by all of them, in the same order."""

    @property
    def rank(self) -> int:
        """Of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def add(self, sums: Tensor, fault: GossamerError | None = None, agreed: str = "") -> Tensor:
        """The sum of a tensor over all processes, fp64, equal in each bit everywhere.

        Args:
            sums: of the same shape in each process.
            fault: what is wrong in this one, if something is.
            agreed: what has to be the same in each, in lines.

        Raises:
            GossamerError: in all processes: the fault of one, which is named.
            ConfigurationError: in all processes: they do not do the same.
        """

    def gather(self, part: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        """The part (``lengths[rank]``) of each process."""

    def exchange(self, parts: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Numbers for each process, ``sent[r]`` of them for process r, become those from each, ``received[r]``."""

    def share(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """What process ``source`` has; the others give nothing."""

    def mesh(self, device_type: str) -> Any:
        """A ``torch.distributed.device_mesh.DeviceMesh`` of the processes, for tensors on such devices."""


class Alone:
    """One process.

    >>> Alone().add(torch.ones(2))
    tensor([1., 1.])
    """

    rank, size = 0, 1

    def add(self, sums: Tensor, fault: GossamerError | None = None, agreed: str = "") -> Tensor:
        if fault is not None:
            raise fault
        return sums

    def gather(self, part: Tensor, lengths: Sequence[int]) -> list[Tensor]:
        return [part]

    def exchange(self, parts: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return parts

    def share(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        return dict(tensors or {})

    def mesh(self, device_type: str) -> Any:
        raise ConfigurationError("one process has no mesh")


ALONE = Alone()


def own_columns(d: int, rank: int, size: int) -> slice:
    """Which of d columns process ``rank`` of ``size`` keeps: r d / W up to (r + 1) d / W.

    >>> [own_columns(10, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    return slice(rank * d // size, (rank + 1) * d // size)


def from_first(ranks: Ranks, make: Callable[[], Tensor], length: int, agreed: str = "") -> Tensor:
    """What the first process makes, (length) fp64, in all of them; its error too.

    Processors may round differently: what decides how all go on is computed once.
    """
    if ranks.size == 1:
        return make()
    fault, made = None, torch.zeros(length, dtype=torch.float64)
    if ranks.rank == 0:
        try:
            made = make()
        except GossamerError as error:
            fault = error
    return ranks.add(made, fault, agreed)


@contextmanager
def together(ranks: Ranks, doing: str) -> Iterator[None]:
    """An error of one process in the body is raised in all of them after it. The body has nothing to do with others.

    Args:
        ranks: the processes.
        doing: what the body does, for the message of an error that is not one of ours.

    Raises:
        GossamerError: of the body; unless it is that of all processes, it names those whose it is.

    >>> with together(ALONE, "counting"):
    ...     raise ConfigurationError("there is nothing to count")
    Traceback (most recent call last):
    gossamer.errors.ConfigurationError: there is nothing to count
    """
    if ranks.size == 1:
        yield
        return
    fault: GossamerError | None = None
    try:
        yield
    except GossamerError as error:
        fault = error
    except Exception as error:
        fault = GossamerError(f"{doing}: {type(error).__name__}: {error}")
        fault.__cause__ = error
    ranks.add(torch.zeros(0), fault, doing)
