"""The inverse of the damped empirical Fisher matrix of some gradients (M-FAC's static algorithm, arXiv 2107.03356)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.operators.fisher_gradients import Parameters, cut_gradients, gradients_of, shared_gradients
from gossamer.operators.fisher_plan import Solver as SolverChoice
from gossamer.operators.fisher_plan import Structure, check_memory, plan_fisher
from gossamer.operators.fisher_solvers import BlockDual, FisherBlocks, FullDual, Primal, Solver
from gossamer.operators.gradient_store import GradientStore
from gossamer.operators.ranks import ALONE, Ranks


class InverseFisher:
    r"""``F^-1`` for ``F = lambda I + (1/m) sum_i g_i g_i^T``, never built: products, elements, blocks, determinant.

    Several processes may keep the columns of one store (``GradientStore(..., ranks=...)``). Vectors, diagonals and
    masks are then of this process's columns, indices and everything else of all; every process calls the same methods,
    and each product sums one vector of m numbers over them.

    Args:
        gradients: (m, d): a tensor, a :class:`~gossamer.operators.gradient_store.GradientStore`, or the sums of
            :class:`~gossamer.operators.fisher_solvers.FisherBlocks`.
        damping: lambda, at least 0.
        relative_damping: instead: lambda as a multiple of the mean of the diagonal of ``(1/m) sum_i g_i g_i^T``.
        structure: ``"full"``, or ``"block"``: entries of F outside of blocks of ``block_size`` parameters count as 0.
        block_size: parameters of a block; the last one may be shorter.
        solver: ``"dual"`` works with m x m matrices, ``"primal"`` with ``block_size`` x ``block_size`` ones; ``"auto"``
            takes the smaller. Both give the same numbers.

    Attributes:
        m, d: gradients, and numbers of each that this process keeps; ``total`` is those of all processes.
        damping: lambda as it is used. Where F has no inverse, or none in fp64, something was added, and there was a
            warning.
        jitter: what was added.
        plan: its memory and work.

    Raises:
        ConfigurationError: arguments out of range, gradients that are not finite, more memory than the system has.

    >>> gradients = torch.tensor([[1.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    >>> inverse = InverseFisher(gradients, damping=0.5)     # F = diag(1/2 + 1/2, 1/2 + 2, 1/2)
    >>> inverse @ torch.tensor([1.0, 1.0, 1.0])
    tensor([1.0000, 0.4000, 2.0000])
    >>> round(inverse.elem(1, 1), 4), round(inverse.logdet(), 4), round(math.log(1.0 * 2.5 * 0.5), 4)
    (0.4, 0.2231, 0.2231)
    """

    def __init__(
        self,
        gradients: Tensor | GradientStore | FisherBlocks,
        damping: float | None = None,
        *,
        relative_damping: float | None = None,
        structure: Structure = "full",
        block_size: int | None = None,
        solver: SolverChoice = "auto",
    ) -> None:
        self._solver: Solver
        self._ranks: Ranks = ALONE
        if isinstance(gradients, FisherBlocks):
            if not gradients.count:
                raise ConfigurationError("no gradient was added to the blocks")
            if solver == "dual":
                raise ConfigurationError("blocks that were summed up are inverted as they are: solver='primal'")
            self.m, self.d = gradients.count, gradients.layout.d
            self.total, self.device = self.d, gradients.matrices.device
            size = gradients.layout.size
            self.plan = plan_fisher(self.m, self.d, structure="block", block_size=size, streaming=True)
            self._solver = Primal(gradients)
        else:
            store = gradients if isinstance(gradients, GradientStore) else GradientStore.of(gradients)
            if not len(store):
                raise ConfigurationError("the store has no gradients yet")
            self.m, self.d, self.total, self.device = len(store), store.d, store.total, store.device
            self._ranks = store.ranks
            if self._ranks.size > 1:
                if structure != "full" or solver == "primal":
                    raise ConfigurationError(
                        "several processes keep the columns of one whole matrix: structure='full', solver='dual'. "
                        "Blocks have nothing in common; let each process have its own"
                    )
                solver = "dual"
            self.plan = plan_fisher(
                self.m, self.total, structure=structure, block_size=block_size, solver=solver, dtype=store.dtype
            )
            check_memory(self.plan.factor_bytes, f"the factors of {self.plan}", "use structure='block'")
            size = self.plan.block_size
            if self.plan.solver == "primal":
                self._solver = Primal.of(store, size)
            else:
                self._solver = FullDual(store) if size == self.total else BlockDual(store, size)
        self.update_damping(damping, relative_damping=relative_damping)

    def update_damping(self, damping: float | None = None, *, relative_damping: float | None = None) -> None:
        """Another damping, as in the constructor: only the small matrices are factored again.

        Raises:
            ConfigurationError: not exactly one of the two, or negative, or not finite.
        """
        if (damping is None) == (relative_damping is None):
            raise ConfigurationError("pass either damping or relative_damping")
        if relative_damping is not None:
            damping = relative_damping * self._solver.trace / self.total
        assert damping is not None
        if not 0 <= damping < math.inf:
            raise ConfigurationError(f"damping must be a finite number of at least 0, got {damping}")
        self._solver.factor(damping)
        self.jitter = self._solver.jitter
        self.damping = damping + self.jitter
        if self.jitter:
            warnings.warn(
                f"with damping {damping:g} the Fisher matrix of {self.m} gradients in {self.total:,} dimensions has no "
                f"inverse; {self.jitter:g} was added",
                stacklevel=3,
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.total, self.total

    def mv(self, x: Tensor) -> Tensor:
        """``F^-1 x``: (d) or (d, k) -> the same shape and dtype; sums are in fp64."""
        if x.dim() not in (1, 2) or x.shape[0] != self.d or not x.is_floating_point():
            raise ConfigurationError(
                f"F has {self.d:,} columns: expected ({self.d}) or ({self.d}, k) floating-point numbers, got "
                f"{tuple(x.shape)} {x.dtype}"
            )
        wide = x.detach().to(self.device, torch.float64)
        return self._solver.solve(wide[:, None] if x.dim() == 1 else wide).reshape(x.shape).to(x.dtype)

    __matmul__ = mv

    def diag(self) -> Tensor:
        """The diagonal of ``F^-1``, (d) fp64."""
        return self._solver.diagonal()

    def elem(self, i: int, j: int) -> float:
        """One element of ``F^-1``; see :meth:`precompute` for many of them."""
        block = self.block([i] if i == j else [i, j])
        return float(block[0, -1])

    def precompute(self) -> None:
        """Spend m d numbers of fp64 so that an element costs O(m) instead of O(m^2); both do not depend on d."""
        if isinstance(self._solver, FullDual):
            check_memory(8 * self.m * self.d, "the factors of all parameters", "ask for elements without them")
            self._solver.precompute()

    def block(self, index: Tensor | list[int]) -> Tensor:
        """Rows and columns ``index`` (n) of ``F^-1``: (n, n) fp64."""
        wanted = torch.as_tensor(index, device=self.device)
        if wanted.dim() != 1 or (len(wanted) and not 0 <= int(wanted.min()) <= int(wanted.max()) < self.total):
            raise ConfigurationError(f"a block is named by indices from 0 to {self.total - 1:,}")
        return self._solver.block(wanted)

    def quad(self, x: Tensor) -> float:
        """``x^T F^-1 x`` for x (d)."""
        return self._dot(x.detach().to(self.device, torch.float64), self.mv(x.detach().double()).to(self.device))

    def _dot(self, x: Tensor, y: Tensor) -> float:
        return float(self._ranks.add((x @ y).reshape(1)))

    def diagonal_blocks(self, size: int) -> Tensor:
        """Squares along the diagonal of ``F^-1``, of ``size`` parameters each: (d / size, size, size) fp64.

        Raises:
            ConfigurationError: ``size`` does not divide d and the blocks of F.
        """
        of_f = self.plan.block_size
        if size < 1 or self.d % size or (of_f < self.total and of_f % size):
            raise ConfigurationError(f"squares of {size} do not divide {self.d:,} parameters in blocks of {of_f:,}")
        return self._solver.diagonal_blocks(size)

    def curvature(self, x: Tensor) -> float:
        """``x^T F x`` for x (d): of F, not of its inverse. Half of it is the loss that F expects of a step x."""
        wide = x.detach().to(self.device, torch.float64)
        return self._dot(wide, self._solver.product(wide))

    def joint_step(self, weights: Tensor, keep: Tensor) -> Tensor:
        """The step that prunes some weights and has all others make up for it together, at least cost in F.

        It minimizes ``1/2 s^T F s`` under ``s_i = -w_i`` for each i that is not kept. The other entries solve
        ``F_KK s_K = F_KQ w_Q``; where F comes from fewer gradients than parameters, that is the m x m system
        ``s_K = G_K^T (m lambda I + G_K G_K^T)^-1 G_Q w_Q``.

        Args:
            weights: (d).
            keep: (d) bool.

        Returns:
            (d) in the dtype of ``weights``; ``weights + step`` is zero where it is pruned.

        >>> inverse = InverseFisher(torch.tensor([[1.0, 1.0]]), damping=1.0)      # F = [[2, 1], [1, 2]]
        >>> inverse.joint_step(torch.tensor([1.0, 3.0]), torch.tensor([False, True]))
        tensor([-1.0000,  0.5000])
        """
        if weights.shape != (self.d,) or keep.shape != (self.d,) or keep.dtype != torch.bool:
            raise ConfigurationError(
                f"weights and a mask of {self.d:,} entries are expected, got {tuple(weights.shape)} and "
                f"{tuple(keep.shape)} {keep.dtype}"
            )
        step = self._solver.joint(weights.detach().to(self.device), keep.to(self.device))
        return step.to(weights)

    def logdet(self) -> float:
        """``ln det F``: of F, not of its inverse."""
        return self._solver.logdet()

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        loader: Iterable[Any],
        m: int,
        *,
        per_sample: bool = True,
        fisher: Literal["empirical", "mc"] = "empirical",
        params: Parameters = ".*",
        dtype: torch.dtype = torch.float32,
        streaming: bool = False,
        vectorize: bool = False,
        ranks: Ranks = ALONE,
        **settings: Any,
    ) -> InverseFisher:
        """Of the gradients of a model at its data; see :func:`~gossamer.operators.fisher_gradients.gradients_of`.

        Args:
            model, loss_fn, loader, m, per_sample, fisher, params, vectorize: as there.
            dtype: of the stored gradients.
            streaming: sum up blocks of ``block_size`` gradient by gradient, and store none.
            ranks: processes with the same model and data, which each compute some of the gradients and keep some of the
                columns, r d / W up to (r + 1) d / W. Targets that are drawn are drawn by each with its own generator.
            settings: as for :class:`InverseFisher`.
        """
        kinds: dict[str, Any] = {"per_sample": per_sample, "fisher": fisher, "params": params}
        if ranks.size > 1 and streaming:
            raise ConfigurationError("blocks have nothing in common: let each process sum up its own")
        if ranks.size > 1:
            gradients = cut_gradients(shared_gradients(model, loss_fn, loader, m, ranks, **kinds), m, ranks)
        else:
            gradients = gradients_of(model, loss_fn, loader, m, vectorize=vectorize, **kinds)
        first = next(gradients)
        sink: GradientStore | FisherBlocks
        if streaming:
            if settings.get("structure") != "block" or settings.get("block_size") is None:
                raise ConfigurationError("streaming needs structure='block' and a block_size")
            plan = plan_fisher(m, first.numel(), structure="block", block_size=settings["block_size"], streaming=True)
            check_memory(plan.factor_bytes, f"the factors of {plan}", "use smaller blocks, or fewer parameters")
            sink = FisherBlocks(first.numel(), settings["block_size"], device=first.device)
            add: Callable[[Tensor], Any] = sink.add
        else:
            sink = GradientStore(m, first.numel(), dtype, device=first.device, ranks=ranks)
            add = sink.append
        add(first)
        for gradient in gradients:
            add(gradient)
        return cls(sink, **settings)
