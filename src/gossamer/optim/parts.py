"""Which part of each parameter a process keeps the history of.

Parameters are real here: a complex one is pairs of numbers, in a last dimension of 2. Of several processes each keeps a
run of slices along the first dimension, as ``torch.chunk`` and DTensor's ``Shard(0)`` cut it: ``ceil(n / W)`` slices,
the last ones fewer or none. A parameter that FSDP2 (``fully_shard``) has cut is left as it is cut; one that each
process has as a whole (DDP) is cut here, and its step is put together again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.ranks import Ranks


def real(tensor: Tensor) -> Tensor:
    """The same numbers as a real tensor: a complex one as pairs, in a last dimension of 2."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout == torch.strided else gradient.to_dense()


def is_cut(parameter: Tensor) -> bool:
    """Whether it is a DTensor: its values are the part that this process has."""
    return hasattr(parameter, "placements")


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor, the memory itself."""
    own: Tensor = tensor.to_local() if is_cut(tensor) else tensor
    return own


def slices(length: int, rank: int, size: int) -> slice:
    """Of ``length`` slices those of process ``rank``.

    >>> [slices(7, rank, 3) for rank in range(3)], slices(1, 2, 3)
    ([slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)], slice(1, 1, None))
    """
    each = -(-length // size)
    return slice(min(rank * each, length), min((rank + 1) * each, length))


class Parts:
    """The parts of some parameters that a process keeps.

    Args:
        params: all parameters; places below are among them.
        ranks: the processes.

    Raises:
        ConfigurationError: a DTensor is cut in another way than along its first dimension, over these processes.
    """

    def __init__(self, params: Sequence[Tensor], ranks: Ranks) -> None:
        self.params, self.ranks = params, ranks
        for place, parameter in enumerate(params):
            if is_cut(parameter):
                self._check(place, parameter)

    def _check(self, place: int, parameter: Any) -> None:
        from torch.distributed.tensor import Shard

        mesh = parameter.device_mesh
        if mesh.ndim != 1 or tuple(parameter.placements) != (Shard(0),):
            raise ConfigurationError(
                f"parameter {place} is a DTensor with placements {list(parameter.placements)} on a mesh of "
                f"{mesh.ndim} dimensions; those that fully_shard cuts along dimension 0 over one mesh dimension can be "
                "taken"
            )
        if (mesh.size(), mesh.get_local_rank()) != (self.ranks.size, self.ranks.rank):
            raise ConfigurationError(
                f"parameter {place} is cut over {mesh.size()} processes, and the group has {self.ranks.size}: pass "
                "group=Group(mesh.get_group()) of its mesh"
            )

    def shape(self, place: int) -> tuple[int, ...]:
        """Of the part: that of the whole but for the first dimension. A number is a vector of one."""
        whole = self.whole(place)
        if self.ranks.size == 1:
            return whole
        own = slices(whole[0], self.ranks.rank, self.ranks.size)
        return own.stop - own.start, *whole[1:]

    def whole(self, place: int) -> tuple[int, ...]:
        """The shape of the parameter."""
        return tuple(real(self.params[place]).shape) or (1,)

    def of(self, place: int, gradient: Tensor) -> Tensor:
        """The part of a gradient that this process keeps."""
        own = real(local(dense(gradient)))
        if self.ranks.size == 1 or is_cut(gradient):
            return own
        own = own.reshape(self.whole(place))
        return own[slices(len(own), self.ranks.rank, self.ranks.size)]

    def steps(self, parts: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """From the parts of steps, what is added to :meth:`target` of each: d numbers are sent where they are whole."""
        if self.ranks.size == 1:
            return {place: part.view(real(local(self.params[place])).shape) for place, part in parts.items()}
        steps = {place: part for place, part in parts.items() if is_cut(self.params[place])}
        together = [place for place in parts if place not in steps]
        if not together:
            return steps
        sizes = [[self._size(place, rank) for place in together] for rank in range(self.ranks.size)]
        flat = torch.cat([parts[place].reshape(-1) for place in together])
        found = self.ranks.gather(flat, [sum(each) for each in sizes])
        cut = [numbers.split(each) for numbers, each in zip(found, sizes, strict=True)]
        for number, place in enumerate(together):
            whole = torch.cat([each[number] for each in cut])
            steps[place] = whole.view(real(self.params[place]).shape)
        return {place: steps[place] for place in parts}

    def _size(self, place: int, rank: int) -> int:
        first, *others = self.whole(place)
        own = slices(first, rank, self.ranks.size)
        return (own.stop - own.start) * math.prod(others)

    def target(self, place: int) -> Tensor:
        """The memory of a parameter that a step is added to."""
        return real(local(self.params[place].detach()))

    def spread(self, place: int, history: Tensor) -> Tensor:
        """The history (m, *part) of a parameter as one of (m, *whole): a DTensor if there are several processes."""
        if self.ranks.size == 1:
            return history
        from torch.distributed.tensor import DTensor, Shard

        parameter: Any = self.params[place]
        mesh = parameter.device_mesh if is_cut(parameter) else self.ranks.mesh(history.device.type)
        shape = torch.Size([len(history), *self.whole(place)])
        strides = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(history, mesh, [Shard(1)], run_check=False, shape=shape, stride=strides)
