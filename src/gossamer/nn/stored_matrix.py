"""A matrix of weights in rows of quantized blocks, as a file stores it."""

from __future__ import annotations

import mmap
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.nn.block_types import BLOCK_TYPES


@dataclass(frozen=True)
class Mapped:
    """Where in a mapped file some bytes lie.

    Attributes:
        file: the mapping, from the first byte of the file.
        offset: of the first byte.
        size: in bytes.
    """

    file: mmap.mmap
    offset: int
    size: int

    def release(self) -> None:
        """Tell the system that these pages are not needed for now; what is read again is mapped again."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        start = -(-self.offset // mmap.PAGESIZE) * mmap.PAGESIZE  # pages that others have a part of stay
        end = (self.offset + self.size) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self.file.madvise(mmap.MADV_DONTNEED, start, end - start)


class BlockRows(Protocol):
    """Rows of blocks (N, bytes of a row) uint8: an array, or what makes the rows that are asked for."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ndim(self) -> int: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> np.ndarray: ...


class StoredMatrix:
    """Weights (N, K) in rows of blocks; their values are computed when they are asked for.

    Args:
        type: name of a type of blocks.
        inputs: K, a multiple of the weights of a block.
        data: (N, bytes of a row) uint8, in the order of the file.
        order: which row of ``data`` each row of the matrix is; the same by default.
        mapped: where ``data`` lies in a mapped file, if it does.
        input_order: (K) int64, which input each weight of a row of ``data`` is for; the same by default.

    Attributes:
        type: of the blocks, such as ``"Q4_K"``.
        shape: (N, K).
        mapped: whether :meth:`rows` is a view of a mapped file.
        input_order: as given: rows of blocks multiply ``x[..., input_order]``.

    Raises:
        ConfigurationError: the type is unknown, or the bytes are not those of rows of K weights.

    >>> data = np.zeros((4, 34), np.uint8)
    >>> data[:, 1], data[:, 2] = 0x3C, range(4)  # a scale of 1.0, and the first of 32 codes
    >>> matrix = StoredMatrix("Q8_0", 32, data)
    >>> matrix.shape, matrix.dequantize([1, 3])[:, :2]
    (torch.Size([4, 32]), tensor([[1., 0.],
            [3., 0.]]))
    """

    def __init__(
        self,
        type: str,
        inputs: int,
        data: BlockRows,
        order: np.ndarray | None = None,
        mapped: Mapped | None = None,
        input_order: Tensor | None = None,
    ) -> None:
        if type not in BLOCK_TYPES:
            raise ConfigurationError(f"{type!r} is not a type of blocks; these are: {', '.join(BLOCK_TYPES)}")
        block = BLOCK_TYPES[type]
        fits = data.dtype == np.uint8 and data.ndim == 2 and data.shape[1] == block.row_bytes(inputs)
        if inputs % block.weights or not fits:
            raise ConfigurationError(
                f"rows of {inputs} weights in {type}, whose blocks hold {block.weights} in {block.bytes} bytes, "
                f"are not {data.dtype} {list(data.shape)}"
            )
        if order is not None and np.array_equal(order, np.arange(len(data))):
            order = None
        self.type = type
        self.shape = torch.Size((len(data) if order is None else len(order), inputs))
        self.input_order = input_order
        self._block = block
        self._data = data
        self._order = order
        self._mapped = mapped

    @property
    def mapped(self) -> bool:
        return self._mapped is not None and self._order is None

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks."""
        return self.shape[0] * self._data.shape[1]

    def rows(self) -> np.ndarray:
        """(N, bytes of a row) uint8, contiguous: a view where the rows are in order, otherwise a copy."""
        return np.ascontiguousarray(self._data[... if self._order is None else self._order])

    def dequantize(self, rows: Any = ...) -> Tensor:
        """Values of some rows, or of all.

        Args:
            rows: what indexes the rows of an array: a slice, a number, or a list or tensor of numbers of any shape.

        Returns:
            (..., K) fp32, inputs in their own order; to the bit what gguf-py computes.
        """
        if isinstance(rows, Tensor):
            rows = rows.cpu().numpy()
        chosen = self._data[rows if self._order is None else self._order[rows]]
        values = self._block.dequantize(chosen.reshape(-1, self._block.bytes))
        shape = *chosen.shape[:-1], self.shape[1]
        found = torch.from_numpy(values.astype(np.float32, copy=False).reshape(shape))
        return found if self.input_order is None else found[..., self.input_order.argsort()]

    def first_bad_block(self) -> int | None:
        """The offset in bytes, within the data, of the first block with a scale that is no finite number."""
        place = self._block.first_bad_block(self._data[...].reshape(-1, self._block.bytes))
        return None if place is None else place * self._block.bytes

    def release(self) -> None:
        """Tell the system that the pages of the file are not needed; nothing if the data are not mapped."""
        if self._mapped is not None:
            self._mapped.release()

    def __repr__(self) -> str:
        return f"StoredMatrix({self.type}, {tuple(self.shape)})"
