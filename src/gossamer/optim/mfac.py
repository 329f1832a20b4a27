"""M-FAC: steps along the gradient times the inverse empirical Fisher matrix of the last m gradients.

Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (arXiv
2107.03356). The matrix is never built; see :mod:`gossamer.operators.sliding_fisher`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.operators.sliding_fisher import SlidingFisher

Compat = Literal["paper"] | None


class MFACPreconditioner:
    """Replaces gradients by their product with the inverse Fisher matrix, in front of any optimizer.

    Args:
        params: parameters, or a module.
        window: m, how many of the last gradients the matrix consists of.
        damping: lambda, above 0.
        momentum: beta of a moving average of the gradients that are multiplied; free of cost, see
            :meth:`~gossamer.operators.sliding_fisher.SlidingFisher.ema_weights`.
        clip: the longest step in the metric of the Fisher matrix, ``sqrt(u^T F u)``; longer ones are scaled down.
        history_dtype: of the stored gradients.
        compat: ``"paper"`` divides by the window before it is full, as the authors' code does.

    >>> layer = nn.Linear(2, 1)
    >>> preconditioner = MFACPreconditioner(layer, window=8, damping=1e-3)
    >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    >>> layer(torch.ones(1, 2)).square().sum().backward()
    >>> preconditioner.step()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor],
        *,
        window: int = 32,
        damping: float = 1e-6,
        momentum: float = 0.0,
        clip: float | None = None,
        history_dtype: torch.dtype = torch.float32,
        compat: Compat = None,
    ) -> None:
        self.params = list(params.parameters() if isinstance(params, nn.Module) else params)
        self.params = [p for p in self.params if p.requires_grad]
        if not self.params:
            raise ConfigurationError("there is no parameter that requires a gradient")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum must be at least 0 and below 1, got {momentum}")
        if clip is not None and not clip > 0:
            raise ConfigurationError(f"clip must be above 0, got {clip}")
        if compat not in (None, "paper"):
            raise ConfigurationError(f"compat is None or 'paper', got {compat!r}")
        self.momentum, self.clip = momentum, clip
        self.fisher = SlidingFisher(
            [p.shape for p in self.params],
            window,
            damping,
            dtype=history_dtype,
            device=self.params[0].device,
            scale="window" if compat == "paper" else "filled",
        )
        self._step = torch.empty(self.fisher.d, device=self.fisher.device)  # overwritten by the next one

    @torch.no_grad()
    def direction(self, gradients: dict[str, Tensor]) -> list[Tensor]:
        """Push the gradients (one for each parameter, in order). Returns their products, fp32, until the next call."""
        self.fisher.push(gradients)
        weights = self.fisher.ema_weights(self.momentum) if self.momentum else None
        direction = self.fisher.natural_gradient(weights, out=self._step)
        if self.clip is not None:
            length = math.sqrt(self.fisher.curvature()[0])
            if length > self.clip:
                torch._foreach_mul_(direction, self.clip / length)
        return direction

    @torch.no_grad()
    def step(self) -> None:
        """Rewrite the gradients. Parameters without one count as having zeros, and stay without.

        Raises:
            ConfigurationError: a gradient is not finite; all of them are as they were.
        """
        gradients = {f"parameter {i}": _gradient(p) for i, p in enumerate(self.params)}
        for parameter, part in zip(self.params, self.direction(gradients), strict=True):
            if parameter.grad is not None:
                parameter.grad.copy_(part)

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fisher.load_state_dict(state["fisher"])


class MFAC(torch.optim.Optimizer):
    """M-FAC as a PyTorch optimizer: ``p <- p - lr (F^-1 g + weight_decay p)``.

    All parameters together make one matrix; learning rate and weight decay may differ between groups.

    Args:
        params: parameters, named parameters or groups.
        lr: learning rate; a tensor works too.
        window: m, how many of the last gradients the matrix consists of. Memory: window times the parameters.
        damping: lambda. The larger, the closer to plain gradient descent with a rate of ``lr / damping``.
        momentum: beta of a moving average of the gradients before they are multiplied (free of cost); with
            ``compat="paper"`` of the products after it (one more vector).
        weight_decay: decoupled from the gradient (arXiv 1711.05101); with ``compat="paper"`` added to it.
        clip: see :class:`MFACPreconditioner`.
        maximize: ascend instead.
        foreach: update all tensors of a group in one call; by default where there are several.
        history_dtype: of the stored gradients, ``torch.float32`` or ``torch.bfloat16``.
        compat: ``"paper"`` takes exactly the steps of the authors' code.

    Raises:
        ConfigurationError: an argument out of its range; or, from a step, a gradient that is not finite: nothing has
            changed then.

    >>> x = nn.Parameter(torch.tensor([3.0, 1.0]))
    >>> optimizer = MFAC([x], lr=0.5, damping=1e-3)
    >>> for _ in range(20):
    ...     optimizer.zero_grad()
    ...     (x.square() * torch.tensor([100.0, 1.0])).sum().backward()
    ...     _ = optimizer.step()
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        *,
        window: int = 32,
        damping: float = 1e-6,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        clip: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        history_dtype: torch.dtype = torch.float32,
        compat: Compat = None,
    ) -> None:
        if not float(lr) >= 0 or not weight_decay >= 0:
            raise ConfigurationError(f"lr and weight_decay must be at least 0, got {lr} and {weight_decay}")
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "foreach": foreach})
        self.compat = compat
        self.momentum = momentum
        every = [p for group in self.param_groups for p in group["params"]]
        self.preconditioner = MFACPreconditioner(
            every,
            window=window,
            damping=damping,
            momentum=0.0 if compat == "paper" else momentum,
            clip=clip,
            history_dtype=history_dtype,
            compat=compat,
        )

    @property
    def fisher(self) -> SlidingFisher:
        """The window of gradients."""
        return self.preconditioner.fisher

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if hasattr(self, "preconditioner"):
            raise ConfigurationError("all parameters make one matrix: pass every group when MFAC is made")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step. Parameters without a gradient count as having zeros, and do not move."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients, moving = self._gradients()
        if not any(moving):
            return loss
        parts = iter(zip(self.preconditioner.direction(gradients), moving, strict=True))
        for group in self.param_groups:
            parameters, steps = [], []
            for parameter in group["params"]:
                if not parameter.requires_grad:
                    continue
                part, moves = next(parts)
                if self.compat == "paper" and self.momentum:
                    part = self._average(parameter, part)
                if moves:
                    parameters.append(parameter)
                    steps.append(part.to(parameter.dtype))
            self._move(group, parameters, steps)
        return loss

    def _gradients(self) -> tuple[dict[str, Tensor], list[bool]]:
        """Of all parameters, by a name for messages; and which parameters have one."""
        gradients, moving = {}, []
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"parameter {i} of group {number}" for i in range(len(group["params"]))
            ]
            for name, parameter in zip(names, group["params"], strict=True):
                if not parameter.requires_grad:
                    continue
                moving.append(parameter.grad is not None)
                gradient = _gradient(parameter)
                if group["maximize"]:
                    gradient = -gradient
                if self.compat == "paper" and group["weight_decay"] and moving[-1]:
                    gradient = gradient.add(parameter, alpha=group["weight_decay"])
                gradients[name if name not in gradients else f"{name} of group {number}"] = gradient
        return gradients, moving

    def _average(self, parameter: Tensor, step: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(step)
        average: Tensor = state["momentum"]
        return average.mul_(self.momentum).add_(step, alpha=1 - self.momentum)

    def _move(self, group: dict[str, Any], parameters: list[Tensor], steps: list[Tensor]) -> None:
        lr, decay = group["lr"], group["weight_decay"]
        if decay and self.compat != "paper":
            for parameter in parameters:
                parameter.mul_(1 - lr * decay)
        if group["foreach"] or (group["foreach"] is None and len(parameters) > 1):
            torch._foreach_add_(parameters, torch._foreach_mul(steps, -lr))
        else:
            for parameter, step in zip(parameters, steps, strict=True):
                parameter.add_(step * -lr)

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's, and the window of gradients."""
        return super().state_dict() | {"fisher": self.fisher.state_dict(), "momentum": self.momentum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on as if there had been no pause, history in bf16 included."""
        own = dict(state_dict)
        fisher, momentum = own.pop("fisher"), own.pop("momentum")
        super().load_state_dict(own)
        self.fisher.load_state_dict(fisher)
        self.momentum = momentum
        if self.compat != "paper":
            self.preconditioner.momentum = momentum


def _gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros_like(parameter)
    if parameter.grad.is_sparse:
        return parameter.grad.to_dense()
    return parameter.grad
