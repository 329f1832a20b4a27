"""What the pruner asks how much a weight is worth, and the statistics that each answer takes.

A curvature says what it needs to see: nothing, the inputs of layers, or gradients of the loss. It begins a statistic
for each weight, which takes rows of inputs (T, K) or gradients (d), and gives a :class:`~.quadratic.Quadratic`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from gossamer.operators.gradient_store import GradientStore, check_finite
from gossamer.operators.inverse_fisher import FisherBlocks, InverseFisher
from gossamer.operators.ranks import Ranks
from gossamer.pruning.quadratic import Diagonal, FisherForm, Quadratic, SharedGram

Source = Literal["nothing", "inputs", "gradients"]


class Statistic(Protocol):
    """Of one weight.

    Several processes that see the inputs of different batches :meth:`total` them up. Gradients are sent to the process
    that owns the weight instead: what is made of them is many times as large as they are.
    """

    def add(self, seen: Tensor) -> None:
        """Rows of the layer's input (T, K), or a gradient (d)."""

    @property
    def count(self) -> int:
        """Rows or gradients so far."""

    @property
    def scale(self) -> float:
        """Mean of F's diagonal before damping: what a relative damping is relative to."""

    def quadratic(self, damping: float) -> Quadratic:
        """F, with an absolute damping."""


class InputStatistic(Statistic, Protocol):
    """Of the inputs of a layer."""

    def total(self, ranks: Ranks) -> None:
        """From here on it is the statistic of what all processes saw."""


class Curvature(Protocol):
    """See the module.

    Attributes:
        source: what its statistics take.
        relative_damping: damping, in units of the mean of F's diagonal, weight by weight.
        block_size: F couples that many consecutive weights at most; ``None`` for all.
        most_samples: gradients that it can use; ``None`` for any number.
    """

    @property
    def source(self) -> Source: ...

    @property
    def relative_damping(self) -> float: ...

    @property
    def block_size(self) -> int | None: ...

    @property
    def most_samples(self) -> int | None: ...

    def begin(self, shape: tuple[int, int]) -> Statistic:
        """A statistic for a weight (N, K)."""

    def bytes(self, shape: tuple[int, int]) -> int:
        """Memory of the statistic."""


class _AnyBlocks:
    """What most curvatures have in common."""

    block_size: ClassVar[int | None] = None
    most_samples: ClassVar[int | None] = None


@dataclass(frozen=True)
class Magnitude(_AnyBlocks):
    """F = I: small weights are pruned."""

    source: ClassVar[Source] = "nothing"
    relative_damping: ClassVar[float] = 0.0

    def begin(self, shape: tuple[int, int]) -> Statistic:
        return _Alike(shape)

    def bytes(self, shape: tuple[int, int]) -> int:
        return 0


@dataclass(frozen=True)
class Wanda(_AnyBlocks):
    """F = diag(mean of x^2): weights by magnitude times the size of their input (Sun et al. 2023, arXiv 2306.11695).

    Their scores ``|w_ij| |x_j|`` rank as the costs ``1/2 w_ij^2 E[x_j^2]`` do. The paper compares within rows:
    ``Unstructured("row")``.
    """

    source: ClassVar[Source] = "inputs"
    relative_damping: ClassVar[float] = 0.0

    def begin(self, shape: tuple[int, int]) -> Statistic:
        return _Squares((1, shape[1]), shape)

    def bytes(self, shape: tuple[int, int]) -> int:
        return 8 * shape[1]


@dataclass(frozen=True)
class LayerGram(_AnyBlocks):
    """F = X^T X / T for each row: the squared error of a layer's output.

    The Hessian of optimal brain compression and SparseGPT (Frantar and Alistarh 2022, arXiv 2208.11580; 2023, arXiv
    2301.00774).

    Args:
        relative_damping: see :class:`Curvature`.
        rounds: of a search for the mask, where weights compete within their own weight or row (see
            :mod:`~gossamer.pruning.search`); 0 to take those of least cost for themselves.
    """

    relative_damping: float = 0.01
    rounds: int = 30
    source: ClassVar[Source] = "inputs"

    def begin(self, shape: tuple[int, int]) -> Statistic:
        return Gram(shape[1], self.rounds)

    def bytes(self, shape: tuple[int, int]) -> int:
        return 6 * 8 * shape[1] ** 2  # with its inverse, its eigenvectors, and copies in fp32


@dataclass(frozen=True)
class DiagFisher(_AnyBlocks):
    """F = diag(mean of g^2), over gradients g of single samples."""

    relative_damping: float = 1e-3
    source: ClassVar[Source] = "gradients"

    def begin(self, shape: tuple[int, int]) -> Statistic:
        return _Squares(shape, shape)

    def bytes(self, shape: tuple[int, int]) -> int:
        return 8 * shape[0] * shape[1]


@dataclass(frozen=True)
class BlockFisher:
    """F = blocks along the diagonal of the mean of g g^T, of ``block_size`` consecutive weights.

    As in WoodFisher and oBERT (Singh and Alistarh 2020, arXiv 2004.14340; Kurtic et al. 2022, arXiv 2203.07259), but
    summed up and factored, instead of updated gradient by gradient. No gradient is stored.
    """

    block_size: int = 16
    relative_damping: float = 1e-2
    source: ClassVar[Source] = "gradients"
    most_samples: ClassVar[int | None] = None

    def begin(self, shape: tuple[int, int]) -> Statistic:
        return _Blocks(shape, self.block_size)

    def bytes(self, shape: tuple[int, int]) -> int:
        return 4 * shape[0] * shape[1] * self.block_size


@dataclass(frozen=True)
class MFACFisher:
    """F = lambda I + G^T G / m over all parameters of a weight, from m stored gradients (M-FAC, arXiv 2107.03356).

    Args:
        gradients: m, how many are kept.
        relative_damping: see :class:`Curvature`.
        dtype: they are kept in; bf16 takes half the memory of fp32.
        block_size: parameters of a block of F; the whole weight by default.
    """

    gradients: int = 64
    relative_damping: float = 1e-2
    dtype: torch.dtype = torch.bfloat16
    block_size: int | None = None
    source: ClassVar[Source] = "gradients"

    @property
    def most_samples(self) -> int:
        return self.gradients

    def begin(self, shape: tuple[int, int]) -> Statistic:
        return _Gradients(shape, self.gradients, self.dtype, self.block_size)

    def bytes(self, shape: tuple[int, int]) -> int:
        return self.gradients * shape[0] * shape[1] * self.dtype.itemsize


class _Alike:
    scale, count = 1.0, 1

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape = shape

    def add(self, seen: Tensor) -> None:
        raise AssertionError("magnitudes need no data")

    def quadratic(self, damping: float) -> Quadratic:
        return Diagonal(torch.ones(1, 1), self.shape)


class _Squares:
    """Mean squares: of each input (1, K), or of each gradient (N, K)."""

    def __init__(self, kept: tuple[int, int], shape: tuple[int, int]) -> None:
        self.sums, self.shape, self.count = torch.zeros(kept, dtype=torch.float64), shape, 0

    def add(self, seen: Tensor) -> None:
        rows = seen.detach().reshape(-1, self.sums.numel())
        check_finite(rows, "what a layer sees")
        self.sums += rows.double().square().sum(0).reshape(self.sums.shape)
        self.count += len(rows)

    def total(self, ranks: Ranks) -> None:
        self.sums, self.count = _total(self.sums, self.count, ranks)

    @property
    def scale(self) -> float:
        return float(self.sums.mean()) / self.count

    def quadratic(self, damping: float) -> Quadratic:
        mean = (self.sums / self.count + damping).float()
        return Diagonal(mean.clamp_min(torch.finfo(torch.float32).tiny), self.shape)


class Gram:
    """Second moments of a layer's inputs.

    Args:
        columns: K, inputs of the layer.
        rounds: see :class:`LayerGram`.

    Attributes:
        count: rows that were seen.

    >>> gram = Gram(2)
    >>> gram.add(torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
    >>> gram.mean()
    tensor([[5., 1.],
            [1., 2.]], dtype=torch.float64)
    """

    def __init__(self, columns: int, rounds: int = 0) -> None:
        self.sums, self.count, self.rounds = torch.zeros(columns, columns, dtype=torch.float64), 0, rounds

    def add(self, seen: Tensor) -> None:
        rows = seen.detach().float()
        check_finite(rows, "the input of a layer")
        self.sums += rows.T @ rows
        self.count += len(rows)

    def total(self, ranks: Ranks) -> None:
        self.sums, self.count = _total(self.sums, self.count, ranks)

    def mean(self) -> Tensor:
        """The mean of x^T x over the rows x that were seen, (K, K) fp64."""
        return self.sums / self.count

    @property
    def scale(self) -> float:
        return float(self.sums.diagonal().mean()) / self.count

    def quadratic(self, damping: float) -> Quadratic:
        matrix = self.mean()
        matrix.diagonal().add_(damping)
        return SharedGram(matrix, self.rounds)


def _total(sums: Tensor, count: int, ranks: Ranks) -> tuple[Tensor, int]:
    found = ranks.add(torch.cat([sums.reshape(-1), sums.new_tensor([count])]))
    return found[:-1].view(sums.shape), int(found[-1])


class _Blocks:
    def __init__(self, shape: tuple[int, int], block_size: int) -> None:
        self.blocks, self.shape = FisherBlocks(shape[0] * shape[1], block_size, torch.float32), shape

    def add(self, seen: Tensor) -> None:
        self.blocks.add(seen)

    @property
    def count(self) -> int:
        return self.blocks.count

    @property
    def scale(self) -> float:
        diagonal = self.blocks.matrices.diagonal(dim1=1, dim2=2)
        return float(diagonal.sum(dtype=torch.float64)) / self.blocks.layout.d / self.blocks.count

    def quadratic(self, damping: float) -> Quadratic:
        return FisherForm(InverseFisher(self.blocks, damping), self.shape)


class _Gradients:
    def __init__(self, shape: tuple[int, int], count: int, dtype: torch.dtype, block_size: int | None) -> None:
        self.store = GradientStore(count, shape[0] * shape[1], dtype)
        self.shape, self.block_size = shape, block_size

    def add(self, seen: Tensor) -> None:
        if len(self.store) < self.store.m:
            self.store.append(seen)

    @property
    def count(self) -> int:
        return len(self.store)

    @property
    def scale(self) -> float:
        rows = self.store.rows
        total = sum(float(row.float().square().sum(dtype=torch.float64)) for row in rows)
        return total / self.store.d / len(rows)

    def quadratic(self, damping: float) -> Quadratic:
        size = self.block_size
        if size is None:
            return FisherForm(InverseFisher(self.store, damping), self.shape)
        return FisherForm(InverseFisher(self.store, damping, structure="block", block_size=size), self.shape)
