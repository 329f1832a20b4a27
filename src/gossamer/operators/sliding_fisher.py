"""The inverse Fisher matrix of the last m gradients (M-FAC's dynamic algorithm, arXiv 2107.03356)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.kernels.gradients import combine_rows, dot_rows
from gossamer.operators.fisher_plan import check_memory
from gossamer.operators.gradient_store import STORE_TYPES, Gradient, check_finite, named_parts
from gossamer.operators.ranks import ALONE, Ranks, from_first

_LARGEST = 1e18  # length of a gradient whose products fit into fp32
_WIDTH = 1 << 14  # columns that are converted to fp64 at a time
_MOST_JITTER = 1e-3  # relative to the mean of the Gram matrix's diagonal


class SlidingFisher:
    r"""``F^-1`` for ``F = lambda I + (1/n) sum_k g_k g_k^T`` over a window of gradients.

    With the gradients as rows of G and ``K = n lambda I + G G^T``, whatever lies in their span has an exact product
    without 1 / lambda, and without a difference of nearly equal vectors:

        F^-1 G^T w = n G^T K^-1 w

    The newest gradient is ``w = e_newest``; momentum over gradients is another w, at no cost. (The identity follows
    from ``G^T K^-1 G G^T w = G^T w - n lambda G^T K^-1 w``; the published recursion computes the same product.)

    A push reads G once, a product once more. What is m x m is in fp64.

    Several processes may keep the columns of one window, each the tensors, or parts of tensors, whose shapes it gives.
    Gradients and products are of these then, and weights, ``gram`` and ``solve`` of all, equal everywhere. A push and a
    product sum a vector of m numbers over the processes each; all of them have to call the same methods.

    Args:
        shapes: of the tensors that a gradient consists of.
        window: m, most gradients.
        damping: lambda, above 0.
        dtype: of the stored gradients, ``torch.float32`` or ``torch.bfloat16``.
        device: where they are.
        scale: n is the number of gradients so far (``"filled"``), or the window from the beginning (``"window"``), as
            in the authors' code.
        ranks: the processes that keep columns.

    Raises:
        ConfigurationError: an argument out of its range, or more memory than the system has.

    >>> fisher = SlidingFisher([(2,), (1,)], window=4, damping=1.0)
    >>> _ = fisher.push([torch.tensor([1.0, 0.0]), torch.tensor([0.0])])
    >>> fisher.natural_gradient()       # F = diag(2, 1, 1)
    [tensor([0.5000, 0.0000]), tensor([0.])]
    """

    def __init__(
        self,
        shapes: Sequence[Sequence[int]],
        window: int,
        damping: float,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        scale: Literal["filled", "window"] = "filled",
        ranks: Ranks = ALONE,
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.d, self.ranks = sum(self.sizes), ranks
        settings = f"window {window}\ndamping {damping!r}\nhistory in {dtype}\nscale {scale}"
        total = int(ranks.add(torch.tensor([float(self.d)], dtype=torch.float64), agreed=settings))
        if total < 1 or window < 1:
            raise ConfigurationError(f"a window needs gradients of at least one number, got {total} x {window}")
        if not 0 < damping < math.inf:
            raise ConfigurationError(f"damping must be a finite number above 0, got {damping}")
        if dtype not in STORE_TYPES:
            raise ConfigurationError(f"gradients are stored in float32 or bfloat16, got {dtype}")
        if scale not in ("filled", "window"):
            raise ConfigurationError(f"scale is 'filled' or 'window', got {scale!r}")
        self.window, self.damping, self.scale = window, damping, scale
        self.device = torch.device(device)
        if self.device.type == "cpu":
            wanted = window * self.d * dtype.itemsize
            check_memory(wanted, f"{window} gradients of {self.d:,} numbers", "take a smaller window, or bfloat16")
        self.rows = torch.zeros(window, self.d, dtype=dtype, device=self.device)
        self.gram = torch.zeros(window, window, dtype=torch.float64, device=self.device)
        self._rounded = torch.empty(self.d if dtype != torch.float32 else 0, device=self.device)
        self.count = 0  # of gradients ever pushed
        self.jitter = 0.0
        self._weights = torch.empty(0)
        self._solution = torch.empty(0)
        self._cholesky: Tensor | None = None

    def __len__(self) -> int:
        return min(self.count, self.window)

    @property
    def n(self) -> int:
        """What the sum of F is divided by."""
        return self.window if self.scale == "window" else len(self)

    @property
    def newest(self) -> int:
        """The slot of the last gradient."""
        if not self.count:
            raise ConfigurationError("no gradient was pushed yet")
        return (self.count - 1) % self.window

    @property
    def ages(self) -> Tensor:
        """(len) int64: how many gradients came after that of each slot."""
        return (self.newest - torch.arange(len(self), device=self.device)) % self.window

    def push(self, gradient: Gradient, agreed: str = "") -> int:
        """Store a gradient, in place of the oldest if the window is full. O(d m). Returns its slot.

        Args:
            gradient: its tensors, or the parts of them that this process keeps.
            agreed: what has to be the same in all processes.

        Raises:
            ConfigurationError: a number is not finite or far too large (the tensor is named), or a size is wrong;
                nothing has changed.
        """
        parts = named_parts(gradient)
        fault = self._fault(parts)
        if fault is not None and self.ranks.size == 1:
            raise fault
        count, slot = self.count, self.count % self.window
        row = self.rows[slot]
        oldest = row.clone() if self.ranks.size > 1 else None  # to be put back if another process has a fault
        self.count += 1
        try:
            products = torch.zeros(self.window, dtype=torch.float64, device=self.device)
            if fault is None:
                for (_, part), own in zip(parts, row.split([part.numel() for _, part in parts]), strict=True):
                    own.copy_(part.detach().reshape(-1))
                wide = self._rounded.copy_(row) if row.dtype != torch.float32 else row
                products[: len(self)] = self._dot(wide)
            products = self.ranks.add(products, fault, f"gradient {count}\n{agreed}")[: len(self)]
        except BaseException:
            self.count = count
            if oldest is not None:
                row.copy_(oldest)
            raise
        self.gram[slot, : len(self)] = products
        self.gram[: len(self), slot] = products
        self._cholesky = None
        return slot

    def skip(self, agreed: str) -> None:
        """Pushes nothing, and changes nothing; with several processes all have to skip, with the same ``agreed``.

        Raises:
            ConfigurationError: another process does something else.
        """
        self.ranks.add(torch.zeros(0), agreed=agreed)

    def _fault(self, parts: list[tuple[str, Tensor]]) -> ConfigurationError | None:
        """Why a gradient cannot be stored."""
        size = sum(part.numel() for _, part in parts)
        if size != self.d:
            return ConfigurationError(f"a gradient of {self.d:,} numbers is expected, got {size:,}")
        for name, part in parts:
            if part.is_complex() or not float(part.detach().float().norm()) < _LARGEST:
                try:
                    check_finite(part, name)
                except ConfigurationError as error:
                    return error
                text = f"{name} is longer than {_LARGEST:g}, so that its products would overflow"
                return ConfigurationError(text)
        return None

    def widen(self, shapes: Sequence[Sequence[int]]) -> None:
        """Further tensors, of which the gradients so far have zeros: products among them stay as they are.

        Raises:
            ConfigurationError: more memory than the system has; nothing has changed.

        >>> fisher = SlidingFisher([(1,)], window=2, damping=1.0)
        >>> _ = fisher.push([torch.ones(1)])
        >>> fisher.widen([(2,)])
        >>> fisher.natural_gradient()
        [tensor([0.5000]), tensor([0., 0.])]
        """
        more = [tuple(shape) for shape in shapes]
        sizes = [math.prod(shape) for shape in more]
        if self.device.type == "cpu":
            wanted = self.window * (self.d + sum(sizes)) * self.rows.dtype.itemsize
            check_memory(wanted, f"{self.window} gradients of {self.d + sum(sizes):,} numbers", "take a smaller window")
        self.rows = torch.nn.functional.pad(self.rows, (0, sum(sizes)))
        self.shapes += more
        self.sizes += sizes
        self.d += sum(sizes)
        self._rounded = torch.empty(self.d if len(self._rounded) else 0, device=self.device)

    def ema_weights(self, beta: float) -> Tensor:
        """(len) fp64: weights of the gradients in their moving average, ``beta^age`` with a sum of 1.

        >>> fisher = SlidingFisher([(1,)], window=2, damping=1.0)
        >>> _ = [fisher.push(torch.ones(1)) for _ in range(3)]
        >>> fisher.ema_weights(0.5)      # slot 0 holds the newest one
        tensor([0.6667, 0.3333], dtype=torch.float64)
        """
        if not 0 <= beta < 1:
            raise ConfigurationError(f"beta must be at least 0 and below 1, got {beta}")
        weights = beta ** self.ages.to(torch.float64)
        return weights / weights.sum()

    def solve(self, weights: Tensor | None = None) -> Tensor:
        """``n K^-1 w``, (len) fp64: the weights of the gradients in ``F^-1 G^T w``. ``None`` is the newest gradient."""
        if weights is None:
            weights = torch.zeros(len(self), dtype=torch.float64, device=self.device)
            weights[self.newest] = 1
        if weights.shape != (len(self),):
            raise ConfigurationError(f"there are {len(self)} gradients, and weights of shape {tuple(weights.shape)}")
        wide = weights.to(self.device, torch.float64)
        self._weights = wide
        self._solution = self.n * self._through(wide)
        return self._solution

    def natural_gradient(self, weights: Tensor | None = None, *, out: Tensor | None = None) -> list[Tensor]:
        """``F^-1 G^T w``, fp32, in the shapes of the tensors; of the newest gradient by default. One pass over G.

        Args:
            weights: w, (len).
            out: (d) fp32, which the result is written to and consists of views of; fresh memory costs the system time.
        """
        return self.split(combine_rows(self.rows[: len(self)], self.solve(weights), out))

    def curvature(self) -> tuple[float, float]:
        """``u^T F u`` and ``|u|`` of the last product ``u = F^-1 G^T w``, in O(m).

        ``u^T F u = n w^T (w - n lambda K^-1 w)`` and ``|u|^2 = n^2 a^T (w - n lambda a)`` for ``a = K^-1 w``.
        """
        rest = self._weights - self.damping * self._solution
        quadratic, square = self.n * (self._weights @ rest), self.n * (self._solution @ rest)
        return float(quadratic.clamp(min=0)), float(square.clamp(min=0).sqrt())

    def mv(self, x: Tensor) -> Tensor:
        """``F^-1 x`` for any x (d), fp32: ``(x - G^T K^-1 G x) / lambda``. Two passes over G.

        For small damping this is a difference of nearly equal vectors: for what lies in the span of the gradients use
        :meth:`natural_gradient`.
        """
        if x.shape != (self.d,) or x.is_complex():
            raise ConfigurationError(f"expected ({self.d}) real numbers, got {tuple(x.shape)} {x.dtype}")
        wide = x.detach().to(self.device, torch.float32)
        if not len(self):
            return wide / self.damping
        inner = self._through(self.ranks.add(self._dot(wide)))
        return (wide - combine_rows(self.rows[: len(self)], inner)) / self.damping

    def split(self, flat: Tensor) -> list[Tensor]:
        """(d) -> views in the shapes of the tensors."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def _dot(self, x: Tensor) -> Tensor:
        """``G x`` over the columns of this process, (len) fp64.

        One process sums some thousand columns in fp32. Several sum in fp64 only: to which of them a column belongs
        makes a difference of 1e-16 then, and not of 1e-8, which small damping would magnify.
        """
        rows = self.rows[: len(self)]
        if self.ranks.size == 1:
            return dot_rows(rows, x)
        out = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        for start in range(0, self.d, _WIDTH):
            out += rows[:, start : start + _WIDTH].double() @ x[start : start + _WIDTH].double()
        return out

    def _through(self, weights: Tensor) -> Tensor:
        """``K^-1 w``, computed by the first process."""

        def make() -> Tensor:
            found = torch.cholesky_solve(weights[:, None], self._factor())[:, 0]
            return torch.cat([found, found.new_tensor([self.jitter])])

        found = from_first(self.ranks, make, len(self) + 1, f"damping {self.damping!r}")
        self.jitter = float(found[-1])
        return found[:-1].to(self.device)

    def _factor(self) -> Tensor:
        if self._cholesky is None:
            n = len(self)
            kernel = self.gram[:n, :n].clone()
            kernel.diagonal().add_(self.n * self.damping)
            mean, self.jitter = float(kernel.diagonal().mean()), 0.0
            while True:
                self._cholesky, info = torch.linalg.cholesky_ex(kernel)
                if not int(info):
                    break
                more = max(10 * self.jitter, 1e-15 * mean)
                if more > _MOST_JITTER * mean:
                    raise ConfigurationError(f"damping {self.damping:g} is too small for these gradients")
                kernel.diagonal().add_(more - self.jitter)
                self.jitter = more
        return self._cholesky

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on as if it had never stopped; tensors are not copied."""
        return {
            "rows": self.rows,
            "gram": self.gram,
            "count": self.count,
            "damping": self.damping,
            "scale": self.scale,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave.

        Raises:
            ConfigurationError: the window, the number of parameters or the type of the rows is another one.
        """
        rows = state["rows"]
        if rows.shape != self.rows.shape or rows.dtype != self.rows.dtype:
            raise ConfigurationError(
                f"the state has gradients of {tuple(rows.shape)} in {rows.dtype}, this window of "
                f"{tuple(self.rows.shape)} in {self.rows.dtype}"
            )
        self.rows.copy_(rows)
        self.gram.copy_(state["gram"])
        self.count, self.damping, self.scale = int(state["count"]), float(state["damping"]), state["scale"]
        self._cholesky = None
