"""m gradients of d numbers each: the matrix G whose rows M-FAC works with (arXiv 2107.03356).

Rows are stored in fp32 or bf16, in memory or in a file. Every sum over d is in fp64, column chunk by column chunk: the
inverse of a Fisher matrix with a small damping forgives nothing less (at 1e-8 a Gram matrix summed in fp32 is wrong in
the third digit), and a chunk that fits into the cache costs no more to convert than to read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.gradients import gram as gram_of
from gossamer.operators.fisher_plan import check_memory
from gossamer.operators.ranks import ALONE, Ranks, together

STORE_TYPES = (torch.float32, torch.bfloat16)
_CHUNK_BYTES = 4 << 20  # of a chunk of columns in fp64

Gradient = Tensor | Sequence[Tensor] | Mapping[str, Tensor]


class GradientStore:
    """Rows of G, of which ``len(store)`` are filled.

    Several processes may keep one G, each some of its columns: what they give and get is of these columns then, and
    sums over all columns are sums over the processes.

    Args:
        m: most rows.
        d: numbers of a gradient; those that this process keeps, of which there may be none.
        dtype: of the rows: ``torch.float32`` or ``torch.bfloat16``.
        device: where they are.
        memmap: a file to hold them instead of memory. It is made anew, and is the caller's to remove.
        ranks: the processes that keep columns; each has to call the methods that sum over columns.

    Attributes:
        total: columns of all processes.

    Raises:
        ConfigurationError: a size below 1, another dtype, or more memory than there is.

    >>> store = GradientStore(2, 3)
    >>> store.append(torch.tensor([1.0, 2.0, 2.0])), store.append([torch.zeros(2), torch.ones(1)])
    (0, 1)
    >>> store @ torch.ones(3), store.T @ torch.tensor([1.0, 1.0])
    (tensor([5., 1.], dtype=torch.float64), tensor([1., 2., 3.], dtype=torch.float64))
    >>> store.gram()
    tensor([[9., 2.],
            [2., 1.]], dtype=torch.float64)
    """

    def __init__(
        self,
        m: int,
        d: int,
        dtype: torch.dtype = torch.float32,
        *,
        device: torch.device | str = "cpu",
        memmap: Path | str | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._join(m, d, dtype, ranks)
        self.device = torch.device(device)
        if memmap is None:
            if self.device.type == "cpu":
                check_memory(m * d * dtype.itemsize, f"{m} gradients of {d:,} numbers", "pass memmap=FILE")
            self._rows = torch.empty(m, d, dtype=dtype, device=self.device)
        else:
            if self.device.type != "cpu":
                raise ConfigurationError(f"a file holds gradients of the CPU, not of {self.device}")
            path = Path(memmap)
            path.write_bytes(b"")  # whatever was there is not ours
            self._rows = torch.from_file(str(path), shared=True, size=m * d, dtype=dtype).view(m, d)
        self._count = 0
        self._gram = torch.zeros(m, m, dtype=torch.float64, device=self.device)
        self._stale: set[int] = set()  # rows whose products are not in the Gram matrix yet

    def _join(self, m: int, d: int, dtype: torch.dtype, ranks: Ranks) -> None:
        """Checks the sizes together with the other processes, and learns which columns are whose."""
        fault = None
        least = 1 if ranks.size == 1 else 0
        if dtype not in STORE_TYPES:
            fault = ConfigurationError(f"gradients are stored in float32 or bfloat16, got {dtype}")
        elif m < 1 or d < least:
            fault = ConfigurationError(f"a gradient store needs at least one row and one column, got m={m}, d={d}")
        columns = torch.zeros(ranks.size, dtype=torch.float64)
        columns[ranks.rank] = d
        columns = ranks.add(columns, fault, f"a store of {m} gradients in {dtype}")
        self.m, self.d, self.dtype, self.ranks = m, d, dtype, ranks
        self.total, self._first = int(columns.sum()), int(columns[: ranks.rank].sum())
        if not self.total:
            raise ConfigurationError("a gradient store needs at least one column, and no process keeps any")

    @classmethod
    def of(cls, gradients: Tensor, ranks: Ranks = ALONE) -> GradientStore:
        """A store of the rows of a tensor (m, d); fp32 and bf16 ones are used in place, others become fp32.

        Of several processes each gives its columns.

        >>> len(GradientStore.of(torch.ones(2, 3, dtype=torch.float64)))
        2
        """
        rows = gradients.detach()
        with together(ranks, "storing gradients"):
            if gradients.dim() != 2 or not (len(gradients) if ranks.size > 1 else gradients.numel()):
                raise ConfigurationError(
                    f"gradients must be (m, d) with at least one each, got {tuple(gradients.shape)}"
                )
            rows = rows if rows.dtype in STORE_TYPES or rows.is_complex() else rows.float()
            check_finite(rows, "the gradients")
        store = cls.__new__(cls)
        store._join(len(rows), rows.shape[1], rows.dtype, ranks)
        store.device, store._rows = rows.device, rows
        store._count = store.m
        store._gram = torch.zeros(store.m, store.m, dtype=torch.float64, device=rows.device)
        store._stale = set(range(store.m))
        return store

    def __len__(self) -> int:
        return self._count

    @property
    def rows(self) -> Tensor:
        """(len, d): the filled rows themselves, not a copy; to change one use :meth:`replace`."""
        return self._rows[: self._count]

    @property
    def num_bytes(self) -> int:
        """Of the rows and the Gram matrix."""
        return self._rows.numel() * self.dtype.itemsize + 8 * self.m * self.m

    def append(self, gradient: Gradient) -> int:
        """Fill the next row. Returns its index.

        Args:
            gradient: (d) numbers: one tensor, or several (perhaps named) that are taken one after the other.

        Raises:
            ConfigurationError: the store is full, the sizes do not add up to d, or a number is not finite. The store
                is as it was.
        """
        if self._count == self.m:
            raise ConfigurationError(f"the store holds {self.m} gradients already; replace() one of them")
        self._fill(self._count, gradient)
        self._count += 1
        return self._count - 1

    def replace(self, index: int, gradient: Gradient) -> None:
        """Overwrite row ``index``; see :meth:`append`."""
        if not 0 <= index < self._count:
            raise ConfigurationError(f"row {index} is not among the {self._count} that are filled")
        self._fill(index, gradient)

    def _fill(self, index: int, gradient: Gradient) -> None:
        parts = named_parts(gradient)
        with together(self.ranks, f"filling row {index}"):
            size = sum(part.numel() for _, part in parts)
            if size != self.d:
                raise ConfigurationError(f"a gradient of {self.d:,} numbers is expected, got {size:,}")
            for name, part in parts:
                check_finite(part, name)
        row, start = self._rows[index], 0
        for _, part in parts:
            row[start : start + part.numel()].copy_(part.detach().reshape(-1))
            start += part.numel()
        self._stale.add(index)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Columns of G in order: where they are, and (len, columns) of them in fp64, valid until the next ones."""
        count = self._count
        width = max(1, min(self.d, max(64, _CHUNK_BYTES // (8 * max(count, 1)))))
        buffer = torch.empty(count * width, dtype=torch.float64, device=self.device)
        for start in range(0, self.d, width):
            columns = slice(start, min(start + width, self.d))
            chunk = buffer[: count * (columns.stop - start)].view(count, columns.stop - start)
            yield columns, chunk.copy_(self._rows[:count, columns])

    def __matmul__(self, x: Tensor) -> Tensor:
        """``G x``: (d) or (d, k) -> (len) or (len, k), fp64."""
        self._check(x, self.d, "columns")
        out = torch.zeros(self._count, *x.shape[1:], dtype=torch.float64, device=self.device)
        for columns, chunk in self.chunks():
            out += chunk @ x[columns].to(self.device, torch.float64)
        return self.ranks.add(out)

    @property
    def T(self) -> _Transposed:
        """``G^T``, for ``store.T @ w``."""
        return _Transposed(self)

    def combine(self, w: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """``G^T w``: (len) or (len, k) -> (d) or (d, k); summed in fp64, returned in ``dtype``."""
        self._check(w, self._count, "rows")
        weights = w.to(self.device, torch.float64)
        out = torch.empty(self.d, *w.shape[1:], dtype=dtype, device=self.device)
        for columns, chunk in self.chunks():
            out[columns] = chunk.T @ weights
        return out

    def columns(self, indices: Tensor | Sequence[int]) -> Tensor:
        """(len, n): columns of G, fp64, whichever process keeps them."""
        index = torch.as_tensor(indices, device=self.device)
        if index.numel() and not -self.total <= int(index.min()) <= int(index.max()) < self.total:
            raise ConfigurationError(f"a column lies outside of the {self.total:,} of a gradient")
        return self.pick(self.rows, index)

    def pick(self, matrix: Tensor, index: Tensor) -> Tensor:
        """(len, n) fp64: columns ``index``, counted over all processes, of a matrix (len, d) that is kept as G is."""
        if self.ranks.size == 1:
            return matrix[:, index].double()
        places = index % self.total - self._first
        found = torch.zeros(len(matrix), len(index), dtype=torch.float64, device=self.device)
        here = (places >= 0) & (places < self.d)
        found[:, here] = matrix[:, places[here]].double()
        return self.ranks.add(found)

    def gram(self) -> Tensor:
        """``G G^T``, (len, len) fp64; only what has changed since the last call is computed. Not a copy."""
        n, gram = self._count, self._gram
        if len(self._stale) == n:
            gram[:n, :n] = self.ranks.add(gram_of(self.rows) if self.d else torch.zeros_like(gram[:n, :n]))
        elif self._stale:
            stale = torch.tensor(sorted(self._stale), device=self.device)
            made = torch.zeros(len(stale), n, dtype=torch.float64, device=self.device)
            for _, chunk in self.chunks():
                made.addmm_(chunk[stale], chunk.T)
            made = self.ranks.add(made)
            gram[stale, :n] = made
            gram[:n, stale] = made.T
        self._stale.clear()
        return gram[:n, :n]

    def _check(self, x: Tensor, length: int, kind: str) -> None:
        if x.dim() not in (1, 2) or x.shape[0] != length or not x.is_floating_point():
            raise ConfigurationError(
                f"G has {length:,} {kind}: expected ({length}) or ({length}, k) floating-point numbers, got "
                f"{tuple(x.shape)} {x.dtype}"
            )


class _Transposed:
    def __init__(self, store: GradientStore) -> None:
        self._store = store

    def __matmul__(self, w: Tensor) -> Tensor:
        return self._store.combine(w)


def named_parts(gradient: Gradient) -> list[tuple[str, Tensor]]:
    """The tensors of a gradient, with a name for each that a message can use."""
    if isinstance(gradient, Tensor):
        return [("the gradient", gradient)]
    if isinstance(gradient, Mapping):
        return [(f"the gradient of {name}", part) for name, part in gradient.items()]
    return [(f"part {index} of the gradient", part) for index, part in enumerate(gradient)]


def check_finite(numbers: Tensor, name: str) -> None:
    """Raises :class:`~gossamer.errors.ConfigurationError` if a number is NaN, infinite or complex."""
    if numbers.is_complex():
        raise ConfigurationError(f"{name} is complex; pass its real view (torch.view_as_real)")
    # the sum of finite numbers may overflow, but then the slow answer decides
    if not math.isfinite(float(numbers.sum())) and not bool(numbers.isfinite().all()):
        raise ConfigurationError(f"{name} has NaN or infinite entries; nothing was stored")
