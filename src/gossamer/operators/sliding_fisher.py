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

_LARGEST = 1e18  # length of a gradient whose products fit into fp32
_MOST_JITTER = 1e-3  # relative to the mean of the Gram matrix's diagonal


class SlidingFisher:
    r"""``F^-1`` for ``F = lambda I + (1/n) sum_k g_k g_k^T`` over a window of gradients.

    With the gradients as rows of G and ``K = n lambda I + G G^T``, whatever lies in their span has an exact product
    without 1 / lambda, and without a difference of nearly equal vectors:

        F^-1 G^T w = n G^T K^-1 w

    The newest gradient is ``w = e_newest``; momentum over gradients is another w, at no cost. (The identity follows
    from ``G^T K^-1 G G^T w = G^T w - n lambda G^T K^-1 w``; the published recursion computes the same product.)

    A push reads G once, a product once more. What is m x m is in fp64.

    Args:
        shapes: of the tensors that a gradient consists of.
        window: m, most gradients.
        damping: lambda, above 0.
        dtype: of the stored gradients, ``torch.float32`` or ``torch.bfloat16``.
        device: where they are.
        scale: n is the number of gradients so far (``"filled"``), or the window from the beginning (``"window"``), as
            in the authors' code.

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
    ) -> None:
        self.shapes = [tuple(shape) for shape in shapes]
        self.sizes = [math.prod(shape) for shape in self.shapes]
        self.d = sum(self.sizes)
        if self.d < 1 or window < 1:
            raise ConfigurationError(f"a window needs gradients of at least one number, got {self.d} x {window}")
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

    def push(self, gradient: Gradient) -> int:
        """Store a gradient, in place of the oldest if the window is full. O(d m). Returns its slot.

        Raises:
            ConfigurationError: a number is not finite or far too large (the tensor is named), or a size is wrong;
                nothing has changed.
        """
        parts = named_parts(gradient)
        sizes = [part.numel() for _, part in parts]
        if sum(sizes) != self.d:
            raise ConfigurationError(f"a gradient of {self.d:,} numbers is expected, got {sum(sizes):,}")
        for name, part in parts:
            if part.is_complex() or not float(part.detach().float().norm()) < _LARGEST:
                check_finite(part, name)
                raise ConfigurationError(f"{name} is longer than {_LARGEST:g}, so that its products would overflow")
        slot = self.count % self.window
        row, rounded = self.rows[slot], self._rounded
        for (_, part), own in zip(parts, row.split(sizes), strict=True):
            own.copy_(part.detach().reshape(-1))
        self.count += 1
        products = self._dot(rounded.copy_(row) if row.dtype != torch.float32 else row)
        self.gram[slot, : len(self)] = products
        self.gram[: len(self), slot] = products
        self._cholesky = None
        return slot

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
        self._solution = self.n * torch.cholesky_solve(wide[:, None], self._factor())[:, 0]
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
        inner = torch.cholesky_solve(self._dot(wide)[:, None], self._factor())[:, 0]
        return (wide - combine_rows(self.rows[: len(self)], inner)) / self.damping

    def split(self, flat: Tensor) -> list[Tensor]:
        """(d) -> views in the shapes of the tensors."""
        return [part.view(shape) for part, shape in zip(flat.split(self.sizes), self.shapes, strict=True)]

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

    def _dot(self, x: Tensor) -> Tensor:
        """``G x``, (len) fp64."""
        return dot_rows(self.rows[: len(self)], x)

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
