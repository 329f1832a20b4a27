"""The layout of keys and values, layer by layer, and the one budget of bytes that all of them share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.engine.large_pages import zeros

GROUP_BYTES = 16 << 20  # what moves is copied group by group, so that no second cache is needed
_SCALE_BYTES = 4
SHORTEST_INTERVAL, LONGEST_INTERVAL = 256, 2048  # tokens between states that are kept
NO_LIMIT = 1 << 40  # tokens, of a model that keeps nothing for each


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Keys and values of one token in one layer."""

    num_kv_heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class KVLayout:
    """Keys and values of one token in all layers.

    In int8 a key is as many codes as it has entries, and then what they are multiplied with, in fp32; so is a value.

    Attributes:
        layers: those that attend.
        state_bytes: what recurrent layers keep of a text (see :mod:`gossamer.engine.states`); 0 if there are none.
    """

    layers: tuple[LayerShape, ...]
    dtype: torch.dtype
    device: torch.device
    state_bytes: int = 0

    def width(self, dim: int) -> int:
        """Elements of ``dtype`` in which a key or value of ``dim`` entries is stored."""
        return dim + (_SCALE_BYTES if self.dtype == torch.int8 else 0)

    @property
    def bytes_per_token(self) -> int:
        return self._elements(self.layers) * self.dtype.itemsize

    @property
    def state_interval(self) -> int:
        """Tokens whose keys and values take what a state takes, or a few more: states kept so far apart at most double
        the memory of a prefix."""
        if not self.bytes_per_token:
            return LONGEST_INTERVAL
        return min(max(-(-self.state_bytes // self.bytes_per_token), SHORTEST_INTERVAL), LONGEST_INTERVAL)

    def size(self, tokens: int) -> int:
        """Bytes of so many tokens of one text, with a state."""
        return tokens * self.bytes_per_token + self.state_bytes

    def tokens_in(self, size: int) -> int:
        """How many tokens of one text ``size`` bytes hold."""
        return (size - self.state_bytes) // self.bytes_per_token if self.bytes_per_token else NO_LIMIT

    def _elements(self, layers: Sequence[LayerShape]) -> int:
        return sum(x.num_kv_heads * (self.width(x.key_dim) + self.width(x.value_dim)) for x in layers)

    def groups(self, *prefix: int, length: int) -> list[range]:
        """Layers whose keys and values share a piece of memory: as few as fill :data:`GROUP_BYTES`."""
        tokens = math.prod(prefix) * length * self.dtype.itemsize
        groups, first, size = [], 0, 0
        for index, layer in enumerate(self.layers):
            size += tokens * self._elements([layer])
            if size >= GROUP_BYTES or index + 1 == len(self.layers):
                groups.append(range(first, index + 1))
                first, size = index + 1, 0
        return groups

    def allocate(self, *prefix: int, length: int, layers: range | None = None) -> tuple[list[Tensor], list[Tensor]]:
        """Zeros for keys and values per layer, (*prefix, Hkv, length, width). Padding is masked, but must be finite."""
        keys: list[Tensor] = []
        values: list[Tensor] = []
        for group in self.groups(*prefix, length=length) if layers is None else [layers]:
            shapes: list[tuple[int, ...]] = []
            for index in group:
                layer = self.layers[index]
                rows = (*prefix, layer.num_kv_heads, length)
                shapes += [(*rows, self.width(layer.key_dim)), (*rows, self.width(layer.value_dim))]
            tensors = zeros(shapes, self.dtype, self.device)
            keys += tensors[::2]
            values += tensors[1::2]
        return keys, values


class MemoryBudget:
    """Counts the bytes of all keys and values, and makes room by evicting what nobody uses."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.used = 0
        self.peak = 0
        self.evict: Callable[[int], int] = lambda wanted: 0  # frees at least `wanted` bytes if it can; set by the tree

    @property
    def free(self) -> int:
        return self.total - self.used

    def reserve(self, size: int) -> bool:
        """Take ``size`` bytes, evicting if necessary; False, and nothing taken, if that does not suffice."""
        if size > self.free:
            self.evict(size - self.free)
        if size > self.free:
            return False
        self.used += size
        self.peak = max(self.peak, self.used)
        return True

    def release(self, size: int) -> None:
        self.used -= size
