"""What recurrent layers keep of a text: a state of the same size however long the text is.

A state is what such a layer knows of all tokens before the next one: the last inputs of a short convolution, the matrix
of a linear attention, the state of a state space model. Keys and values of a prefix can be cut where one likes; a state
stands behind one token only. So a node of the tree has, beside keys and values, states behind some of its tokens, the
last one among them, and a sequence has one in its slot. A state never changes: each step makes new ones, and whoever
holds one may share it.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class State:
    """A row of tensors that several sequences' states stand in, (sequences, ...) each.

    >>> import torch
    >>> state = State([torch.arange(6.0).view(3, 2)], 1)
    >>> state.tensors(), state.apart().batch[0].shape
    ([tensor([2., 3.])], torch.Size([1, 2]))
    """

    __slots__ = ("__weakref__", "batch", "index")

    def __init__(self, batch: list[Tensor], index: int) -> None:
        self.batch = batch
        self.index = index

    def tensors(self) -> list[Tensor]:
        """Its own row of each tensor."""
        return [tensor[self.index] for tensor in self.batch]

    @property
    def finite(self) -> bool:
        """Whether all of it are numbers."""
        return all(bool(tensor.isfinite().all()) for tensor in self.tensors())

    def apart(self) -> State:
        """The same in memory of its own, which it keeps from nobody."""
        if all(len(tensor) == 1 for tensor in self.batch):
            return self
        return State([tensor[self.index : self.index + 1].clone() for tensor in self.batch], 0)


class StateMemory:
    """Memory for states of ``size`` fp32 numbers, in one tensor each. What a state leaves is the next one's.

    Every step makes new states and drops the old ones; in memory fresh from the system that takes longer than computing
    them. ``spare`` is how much may lie idle: as many states as a step has made.

    >>> memory = StateMemory(3)
    >>> state = memory.take()
    >>> address = state.batch[0].data_ptr()
    >>> del state
    >>> memory.take().batch[0].data_ptr() == address
    True
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.spare = 1
        self._free: list[Tensor] = []

    def take(self) -> State:
        """A state with anything in it."""
        tensor = self._free.pop() if self._free else torch.empty(1, self.size)
        state = State([tensor], 0)
        weakref.finalize(state, self._give_back, tensor).atexit = False
        return state

    def _give_back(self, tensor: Tensor) -> None:
        if len(self._free) < self.spare:
            self._free.append(tensor)
