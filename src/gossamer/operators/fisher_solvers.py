"""The two ways to invert a damped Fisher matrix ``F = lambda I + G^T G / m``, whole or block by block.

*Dual*, for fewer gradients than parameters: with ``K = m lambda I + G G^T = C C^T`` (m x m),

    F^-1 x = (x - G^T K^-1 G x) / lambda          (Woodbury)
    F^-1_QQ = (I - W_Q^T W_Q) / lambda            with W = C^-1 G
    ln det F = d ln lambda + ln det K - m ln(m lambda)

M-FAC's own recursion (arXiv 2107.03356, algorithm 1) computes rescaled factors of the same K, gradient by gradient.
*Primal*, for blocks that are no larger than the number of gradients: F itself is formed and factored.

All of it is in fp64. Vectors are (d, k) here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.gradient_store import GradientStore, check_finite
from gossamer.operators.ranks import from_first

_GROUP_BYTES = 32 << 20  # of the blocks that are worked on at a time, in fp64
_FIRST_JITTER, _LAST_JITTER = 1e-9, 1e-3  # relative to the mean of the diagonal


class Solver(Protocol):
    """A factored inverse. ``jitter`` is what had to be added to the damping for the factors to exist."""

    jitter: float

    @property
    def trace(self) -> float:
        """Of ``(1/m) sum_i g_i g_i^T``."""

    def factor(self, damping: float) -> None:
        """Takes a damping, or another one."""

    def solve(self, x: Tensor) -> Tensor:
        """(d, k) -> F^-1 x, fp64."""

    def diagonal(self) -> Tensor:
        """(d) fp64."""

    def block(self, index: Tensor) -> Tensor:
        """(n, n) fp64: rows and columns ``index`` of F^-1."""

    def logdet(self) -> float:
        """ln det F."""

    def diagonal_blocks(self, size: int) -> Tensor:
        """(d / size, size, size) fp64: squares of F^-1 along its diagonal; ``size`` divides d and every block of F."""

    def product(self, x: Tensor) -> Tensor:
        """(d) -> F x, fp64."""

    def joint(self, w: Tensor, keep: Tensor) -> Tensor:
        """The cheapest step (d), fp64, that takes w to zero where ``keep`` is false; see InverseFisher."""


class FullDual:
    """One K for all parameters. Its columns may be kept by several processes: vectors are of this one's then."""

    def __init__(self, store: GradientStore) -> None:
        self.store = store
        self.jitter = 0.0
        self.gram = store.gram().clone()
        self._whitened: Tensor | None = None

    @property
    def trace(self) -> float:
        return float(self.gram.trace()) / len(self.gram)

    def factor(self, damping: float) -> None:
        m = len(self.gram)

        def make() -> Tensor:
            used, factors = _cholesky(self.gram[None], m, damping, self.store.total, singular=True)
            of_k = factors[0] * math.sqrt(m)  # K is m times the matrix that was factored
            return torch.cat([of_k.new_tensor([used]), of_k.reshape(-1)])

        found = from_first(self.store.ranks, make, 1 + m * m, f"damping {damping!r}").to(self.gram.device)
        self.damping, self.cholesky = float(found[0]), found[1:].view(m, m)
        self.jitter = self.damping - damping
        self._whitened = None

    def solve(self, x: Tensor) -> Tensor:
        weights = torch.cholesky_solve(self.store @ x, self.cholesky)
        out = torch.empty_like(x, dtype=torch.float64)
        for columns, chunk in self.store.chunks():
            out[columns] = (x[columns] - chunk.T @ weights) / self.damping
        return out

    def diagonal(self) -> Tensor:
        out = torch.empty(self.store.d, dtype=torch.float64, device=self.store.device)
        for columns, chunk in self.store.chunks():
            out[columns] = (1 - self._whiten(chunk).square().sum(0)) / self.damping
        return out

    def precompute(self) -> None:
        """Keep W (m, d) in fp64, so that an element costs O(m) instead of O(m^2)."""
        if self._whitened is None:
            made = torch.empty(len(self.gram), self.store.d, dtype=torch.float64, device=self.store.device)
            for columns, chunk in self.store.chunks():
                made[:, columns] = self._whiten(chunk)
            self._whitened = made

    def block(self, index: Tensor) -> Tensor:
        kept = self._whitened
        white = self._whiten(self.store.columns(index)) if kept is None else self.store.pick(kept, index)
        same = (index[:, None] == index).to(torch.float64)
        return (same - white.T @ white) / self.damping

    def logdet(self) -> float:
        m, d = len(self.gram), self.store.total
        of_k = 2 * float(self.cholesky.diagonal().log().sum())
        return d * math.log(self.damping) + of_k - m * math.log(m * self.damping)

    def diagonal_blocks(self, size: int) -> Tensor:
        out = torch.empty(self.store.d // size, size, size, dtype=torch.float64, device=self.store.device)
        step = max(size, _GROUP_BYTES // (8 * len(self.gram)) // size * size)
        for first in range(0, self.store.d, step):
            columns = self.store.rows[:, first : first + step].double()
            white = self._whiten(columns)
            out[first // size : first // size + columns.shape[1] // size] = _gram_blocks(white, size, self.damping)
        return out

    def product(self, x: Tensor) -> Tensor:
        along = (self.store @ x.to(torch.float64)[:, None]) / len(self.gram)
        out = self.damping * x.to(torch.float64)
        for columns, chunk in self.store.chunks():
            out[columns] += (chunk.T @ along)[:, 0]
        return out

    def joint(self, w: Tensor, keep: Tensor) -> Tensor:
        m = len(self.gram)
        system = torch.zeros(m, m, dtype=torch.float64, device=self.store.device)
        right = system.new_zeros(m, 1)
        for columns, chunk in self.store.chunks():
            kept, dropped = chunk * keep[columns], ~keep[columns]
            system += kept @ kept.T
            right += chunk @ (w[columns] * dropped).to(torch.float64)[:, None]
        system, right = self.store.ranks.add(torch.cat([system, right], 1)).split([m, 1], 1)
        system.diagonal().add_(m * self.damping)
        weights = torch.cholesky_solve(right, torch.linalg.cholesky(system))
        out = -w.to(torch.float64)
        for columns, chunk in self.store.chunks():
            out[columns] = torch.where(keep[columns], (chunk.T @ weights)[:, 0], out[columns])
        return out

    def _whiten(self, columns: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.cholesky, columns, upper=False)


class _Blocks:
    """How d parameters are divided: blocks of ``size``, the last one perhaps shorter and padded with zeros."""

    def __init__(self, d: int, size: int) -> None:
        self.d, self.size, self.count = d, size, -(-d // size)
        self.padded = self.count * size

    def groups(self, bytes_each: int) -> Iterator[slice]:
        step = max(1, _GROUP_BYTES // bytes_each)
        for first in range(0, self.count, step):
            yield slice(first, min(first + step, self.count))

    def cut(self, x: Tensor, group: slice) -> Tensor:
        """Entries (d, ...) of some blocks, (blocks, size, ...) in fp64."""
        part = x[group.start * self.size : min(group.stop * self.size, self.d)].to(torch.float64)
        missing = (group.stop - group.start) * self.size - len(part)
        if missing:
            part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
        return part.reshape(group.stop - group.start, self.size, *x.shape[1:])

    def paste(self, blocks: Tensor, out: Tensor, group: slice) -> None:
        """The inverse of :meth:`cut`."""
        where = out[group.start * self.size : min(group.stop * self.size, self.d)]
        where.copy_(blocks.reshape(-1, *out.shape[1:])[: len(where)])

    def members(self, index: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """For each block that parameters ``index`` belong to: the block, which of them, and their places in it."""
        of = index // self.size
        for block in of.unique().tolist():
            which = (of == block).nonzero()[:, 0]
            yield block, which, index[which] - block * self.size

    def block(self, index: Tensor, inside: dict[int, Tensor]) -> Tensor:
        """The square of F^-1 at ``index`` from those of its blocks."""
        out = torch.zeros(len(index), len(index), dtype=torch.float64, device=index.device)
        for block, which, _ in self.members(index):
            out[which[:, None], which] = inside[block]
        return out


class BlockDual:
    """Blocks with more parameters than there are gradients."""

    def __init__(self, store: GradientStore, size: int) -> None:
        self.store, self.blocks = store, _Blocks(store.d, size)
        self.jitter = 0.0
        m = len(store)
        self.gram = torch.empty(self.blocks.count, m, m, dtype=torch.float64, device=store.device)
        for group, rows in self._groups():
            torch.bmm(rows, rows.mT, out=self.gram[group])

    @property
    def trace(self) -> float:
        return float(self.gram.diagonal(dim1=1, dim2=2).sum()) / len(self.store)

    def _groups(self) -> Iterator[tuple[slice, Tensor]]:
        """Some blocks, and their gradients (blocks, m, size)."""
        for group in self.blocks.groups(8 * len(self.store) * self.blocks.size):
            yield group, self.blocks.cut(self.store.rows.T, group).mT

    def factor(self, damping: float) -> None:
        m = len(self.store)
        self.damping, self.cholesky = _cholesky(self.gram, m, damping, self.store.d, singular=True)
        self.jitter = self.damping - damping
        self.cholesky *= math.sqrt(m)

    def solve(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.float64)
        for group, rows in self._groups():
            part = self.blocks.cut(x, group)
            weights = torch.cholesky_solve(rows @ part, self.cholesky[group])
            self.blocks.paste((part - rows.mT @ weights) / self.damping, out, group)
        return out

    def diagonal(self) -> Tensor:
        out = torch.empty(self.store.d, dtype=torch.float64, device=self.store.device)
        for group, rows in self._groups():
            white = torch.linalg.solve_triangular(self.cholesky[group], rows, upper=False)
            self.blocks.paste((1 - white.square().sum(1)) / self.damping, out, group)
        return out

    def block(self, index: Tensor) -> Tensor:
        inside = {}
        for block, which, _ in self.blocks.members(index):
            columns = self.store.columns(index[which])
            white = torch.linalg.solve_triangular(self.cholesky[block], columns, upper=False)
            same = (index[which][:, None] == index[which]).to(torch.float64)
            inside[block] = (same - white.T @ white) / self.damping
        return self.blocks.block(index, inside)

    def logdet(self) -> float:
        m = len(self.store)
        of_k = 2 * float(self.cholesky.diagonal(dim1=1, dim2=2).log().sum())
        return self.store.d * math.log(self.damping) + of_k - self.blocks.count * m * math.log(m * self.damping)

    def diagonal_blocks(self, size: int) -> Tensor:
        out = torch.empty(self.blocks.padded // size, size, size, dtype=torch.float64, device=self.store.device)
        per_block = self.blocks.size // size
        for group, rows in self._groups():
            white = torch.linalg.solve_triangular(self.cholesky[group], rows, upper=False)
            found = _gram_blocks(white.movedim(0, 1).flatten(1), size, self.damping)
            out[group.start * per_block : group.stop * per_block] = found
        return out[: self.store.d // size]

    def product(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.float64)
        for group, rows in self._groups():
            part = self.blocks.cut(x, group)[..., None]
            found = self.damping * part + rows.mT @ (rows @ part) / len(self.store)
            self.blocks.paste(found[..., 0], out, group)
        return out

    def joint(self, w: Tensor, keep: Tensor) -> Tensor:
        m = len(self.store)
        out = torch.empty_like(w, dtype=torch.float64)
        for group, rows in self._groups():
            part, kept = self.blocks.cut(w, group), self.blocks.cut(keep, group).bool()
            inside = rows * kept[:, None]
            system = inside @ inside.mT
            system.diagonal(dim1=1, dim2=2).add_(m * self.damping)
            right = rows @ (part * ~kept)[..., None]
            weights = torch.cholesky_solve(right, torch.linalg.cholesky(system))
            step = torch.where(kept, (rows.mT @ weights)[..., 0], -part)
            self.blocks.paste(step, out, group)
        return out


class FisherBlocks:
    """The diagonal blocks of ``sum_i g_i g_i^T``, summed up as gradients come: none of them is stored.

    Args:
        d: numbers of a gradient.
        block_size: parameters of a block; the last one may be shorter.
        dtype: of the sums; fp32 takes half the memory of fp64.
        device: where they are.

    >>> blocks = FisherBlocks(3, 2)
    >>> blocks.add(torch.tensor([1.0, 2.0, 3.0]))
    >>> blocks.matrices[0], blocks.count
    (tensor([[1., 2.],
            [2., 4.]], dtype=torch.float64), 1)
    """

    def __init__(
        self, d: int, block_size: int, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
    ) -> None:
        if d < 1 or block_size < 1:
            raise ConfigurationError(f"blocks need at least one parameter each, got d={d}, block_size={block_size}")
        self.layout = _Blocks(d, min(block_size, d))
        self.count = 0
        shape = (self.layout.count, self.layout.size, self.layout.size)
        self.matrices = torch.zeros(shape, dtype=dtype, device=device)

    def add(self, gradient: Tensor) -> None:
        """A gradient (d), or several (k, d).

        Raises:
            ConfigurationError: it has another size, or a number that is not finite; nothing was added.
        """
        rows = gradient.detach().reshape(-1, gradient.shape[-1]) if gradient.dim() else gradient.reshape(1, 1)
        if rows.shape[1] != self.layout.d:
            raise ConfigurationError(f"a gradient of {self.layout.d:,} numbers is expected, got {rows.shape[1]:,}")
        check_finite(rows, "the gradient")
        for group in self.layout.groups(8 * (len(rows) + self.layout.size) * self.layout.size):
            part = self.layout.cut(rows.T, group).to(self.matrices.dtype)
            self.matrices[group].baddbmm_(part, part.mT)
        self.count += len(rows)


class Primal:
    """Blocks with no more parameters than there are gradients."""

    def __init__(self, sums: FisherBlocks) -> None:
        self.sums, self.blocks = sums, sums.layout
        self.jitter = 0.0

    @property
    def trace(self) -> float:
        sums = self.sums.matrices.diagonal(dim1=1, dim2=2)
        return float(sums.sum(dtype=torch.float64)) / self.sums.count

    @classmethod
    def of(cls, store: GradientStore, size: int) -> Primal:
        sums = FisherBlocks(store.d, size, device=store.device)
        for group in sums.layout.groups(8 * (len(store) + size) * size):
            part = sums.layout.cut(store.rows.T, group)
            torch.bmm(part, part.mT, out=sums.matrices[group])
        sums.count = len(store)
        return cls(sums)

    def factor(self, damping: float) -> None:
        sums, count = self.sums.matrices, self.sums.count
        self.damping, self.cholesky = _cholesky(sums, count, damping, self.blocks.d, singular=False)
        self.jitter = self.damping - damping

    def _groups(self) -> Iterator[tuple[slice, Tensor]]:
        """Some blocks, and their factors in fp64."""
        for group in self.blocks.groups(8 * self.blocks.size**2):
            yield group, self.cholesky[group].to(torch.float64)

    def solve(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.float64)
        for group, cholesky in self._groups():
            self.blocks.paste(torch.cholesky_solve(self.blocks.cut(x, group), cholesky), out, group)
        return out

    def diagonal(self) -> Tensor:
        out = torch.empty(self.blocks.d, dtype=torch.float64, device=self.cholesky.device)
        for group, cholesky in self._groups():
            self.blocks.paste(torch.cholesky_inverse(cholesky).diagonal(dim1=1, dim2=2), out, group)
        return out

    def block(self, index: Tensor) -> Tensor:
        inside = {}
        for block, _, places in self.blocks.members(index):
            inverse = torch.cholesky_inverse(self.cholesky[block].to(torch.float64))
            inside[block] = inverse[places[:, None], places]
        return self.blocks.block(index, inside)

    def logdet(self) -> float:
        padding = self.blocks.padded - self.blocks.d
        logarithms = sum(float(cholesky.diagonal(dim1=1, dim2=2).log().sum()) for _, cholesky in self._groups())
        return 2 * logarithms - (padding * math.log(self.damping) if padding else 0.0)

    def diagonal_blocks(self, size: int) -> Tensor:
        per_block = self.blocks.size // size
        out = torch.empty(self.blocks.padded // size, size, size, dtype=torch.float64, device=self.cholesky.device)
        for group, cholesky in self._groups():
            inverse = torch.cholesky_inverse(cholesky).unflatten(2, (per_block, size)).unflatten(1, (per_block, size))
            squares = inverse.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (blocks, per_block, size, size)
            out[group.start * per_block : group.stop * per_block] = squares.flatten(0, 1)
        return out[: self.blocks.d // size]

    def product(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x, dtype=torch.float64)
        for group in self.blocks.groups(8 * self.blocks.size**2):
            part = self.blocks.cut(x, group)[..., None]
            sums = self.sums.matrices[group].to(torch.float64) / self.sums.count
            self.blocks.paste((self.damping * part + sums @ part)[..., 0], out, group)
        return out

    def joint(self, w: Tensor, keep: Tensor) -> Tensor:
        out = torch.empty_like(w, dtype=torch.float64)
        for group in self.blocks.groups(8 * self.blocks.size**2):
            part, kept = self.blocks.cut(w, group), self.blocks.cut(keep, group).bool()
            matrix = self.sums.matrices[group].to(torch.float64) / self.sums.count
            matrix.diagonal(dim1=1, dim2=2).add_(self.damping)
            right = (matrix @ (part * ~kept)[..., None]) * kept[..., None]
            system = matrix * (kept[:, None] & kept[..., None])
            system.diagonal(dim1=1, dim2=2).add_((~kept).to(torch.float64))  # the identity where nothing is kept
            step = torch.cholesky_solve(right, torch.linalg.cholesky(system))[..., 0]
            self.blocks.paste(torch.where(kept, step, -part), out, group)
        return out


def _gram_blocks(white: Tensor, size: int, damping: float) -> Tensor:
    """Squares along the diagonal of ``(I - W^T W) / damping`` for W (m, n): (n / size, size, size)."""
    cut = white.unflatten(1, (-1, size)).movedim(1, 0)
    same = torch.eye(size, dtype=white.dtype, device=white.device)
    return (same - cut.mT @ cut) / damping


def _cholesky(sums: Tensor, count: int, damping: float, d: int, *, singular: bool) -> tuple[float, Tensor]:
    """Factors of ``sums / count + damping I``, and the damping: more of it if they have none.

    Args:
        sums: (blocks, n, n), positive semidefinite.
        count: of gradients.
        damping: at least 0.
        d: parameters, over which the trace of a Fisher matrix is spread.
        singular: whether there is no way without damping.

    Raises:
        ConfigurationError: no reasonable damping helps.
    """
    mean = float(sums.diagonal(dim1=1, dim2=2).sum(dtype=torch.float64)) / count / d
    if mean <= 0 and damping == 0:
        raise ConfigurationError("all gradients are zero, so that a damping above 0 is needed")
    factors = torch.empty_like(sums)
    jitter = _FIRST_JITTER * mean if singular and damping == 0 else 0.0
    while jitter <= _LAST_JITTER * mean:
        if _factor(sums, count, damping + jitter, factors):
            return damping + jitter, factors
        jitter = max(10 * jitter, _FIRST_JITTER * mean)
    raise ConfigurationError(f"damping {damping:g} is too small for gradients with a mean square of {mean:g}")


def _factor(sums: Tensor, count: int, damping: float, out: Tensor) -> bool:
    step = max(1, _GROUP_BYTES // (8 * sums.shape[-1] ** 2))
    for first in range(0, len(sums), step):
        part = sums[first : first + step].to(torch.float64) / count
        part.diagonal(dim1=1, dim2=2).add_(damping)
        factor, info = torch.linalg.cholesky_ex(part)
        if bool(info.any()) or not bool(factor.diagonal(dim1=1, dim2=2).gt(0).all()):
            return False
        out[first : first + step] = factor
    return True
