"""M-FAC: steps along the gradient times the inverse empirical Fisher matrix of the last m gradients.

Frantar, Kurtic and Alistarh, "M-FAC: Efficient Matrix-Free Approximations of Second-Order Information" (arXiv
2107.03356). The matrix is never built; see :mod:`gossamer.operators.sliding_fisher`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.ranks import Ranks
from gossamer.operators.sliding_fisher import SlidingFisher
from gossamer.optim.parts import dense, local, real
from gossamer.optim.preconditioner import Compat, MFACPreconditioner


class MFAC(torch.optim.Optimizer):
    r"""M-FAC as a PyTorch optimizer: ``p <- p - lr (F^-1 g + weight_decay p)``.

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
        group: the processes that train together with DDP or FSDP2 (``fully_shard``), as
            :class:`gossamer.distributed.fisher.Group`: each keeps a part of the window. See
            ``docs/explanation/distributed-fisher.md``.

    The window is in the state of the parameters from the beginning, as ``history`` (window, \*shape) and ``step``, so
    that ``torch.distributed.checkpoint.state_dict`` finds it.

    Raises:
        ConfigurationError: an argument out of its range; or, from a step, a gradient that is not finite: nothing has
            changed then.

    >>> x = torch.nn.Parameter(torch.tensor([3.0, 1.0]))
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
        group: Ranks | None = None,
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
            group=group,
        )
        self._show_history()

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
        """One step. Parameters without a gradient count as having zeros, and do not move, nor does their state."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        gradients = self._gradients()
        if not gradients:
            self.preconditioner.rest()
            return loss
        known = len(self.preconditioner.places)
        try:
            steps = self.preconditioner.direction(gradients)
        finally:
            if len(self.preconditioner.places) > known:
                self._show_history()
        self._pushed.fill_(self.fisher.count)
        places = itertools.count()
        for group in self.param_groups:
            # the parameters first: zip asks the second only where the first has one more
            moving = [(place, p) for p, place in zip(group["params"], places, strict=False) if place in steps]
            parts = [steps[place] for place, _ in moving]
            if self.compat == "paper" and self.momentum:
                parts = [self._average(p, part) for (_, p), part in zip(moving, parts, strict=True)]
            self._move(group, [self.preconditioner.parts.target(place) for place, _ in moving], parts)
        return loss

    def take_window(self, state: dict[str, Any]) -> None:
        """Goes on with the window of a :meth:`.MFACPreconditioner.state_dict`, and nothing else of it."""
        self.preconditioner.load_state_dict(state)
        self._show_history()

    def _show_history(self) -> None:
        """The window in the state of the parameters, as views of it."""
        self._pushed = torch.tensor(self.fisher.count)
        for place, history in self.preconditioner.history().items():
            self.state[self.preconditioner.params[place]] |= {"history": history, "step": self._pushed}

    def _gradients(self) -> dict[int, tuple[str, Tensor]]:
        """Of the parameters that have one, by place among all; with a name for messages."""
        gradients = {}
        place = 0
        for number, group in enumerate(self.param_groups):
            names = group.get("param_names") or [
                f"parameter {i} of group {number}" for i in range(len(group["params"]))
            ]
            for name, parameter in zip(names, group["params"], strict=True):
                if parameter.grad is not None:
                    gradient = dense(parameter.grad)
                    if group["maximize"]:
                        gradient = -gradient
                    if self.compat == "paper" and group["weight_decay"]:
                        gradient = gradient.add(parameter, alpha=group["weight_decay"])
                    gradients[place] = (name, gradient)
                place += 1
        return gradients

    def _average(self, parameter: Tensor, step: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(real(parameter.detach()), dtype=step.dtype)
        average: Tensor = local(state["momentum"])
        return average.mul_(self.momentum).add_(step, alpha=1 - self.momentum)

    def _move(self, group: dict[str, Any], parameters: list[Tensor], steps: list[Tensor]) -> None:
        if not parameters:
            return
        lr, decay = group["lr"], group["weight_decay"]
        steps = [step.to(parameter) for parameter, step in zip(parameters, steps, strict=True)]
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
        return super().state_dict() | self.preconditioner.state_dict() | {"momentum": self.momentum}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on as if there had been no pause, history in bf16 included.

        PyTorch's own part of a state dict is enough (``torch.distributed.checkpoint.state_dict`` saves no more): then
        products of the gradients are computed again, which may round differently.
        """
        own = dict(state_dict)
        window: dict[str, Any] = {name: own.pop(name) for name in ("fisher", "places") if name in own}
        momentum = own.pop("momentum", self.momentum)
        # by place, whatever the parameters are called there; PyTorch would give the history the type of the parameters
        order = [name for group in own["param_groups"] for name in group["params"]]
        shown = {
            place: own["state"][name] for place, name in enumerate(order) if "history" in own["state"].get(name, {})
        }
        own["state"] = {
            name: {key: value for key, value in state.items() if key not in ("history", "step")}
            for name, state in own["state"].items()
        }
        if not window and shown:
            counts = {int(state["step"]) for state in shown.values()}
            if len(counts) > 1:
                raise ConfigurationError(f"parameters saw {sorted(counts)} gradients: the states are of several times")
            histories = {place: state["history"] for place, state in shown.items()}
            window = self.preconditioner.gathered(histories, counts.pop())
        super().load_state_dict(own)
        self.take_window(window or self.preconditioner.state_dict())
        self.momentum = momentum
        if self.compat != "paper":
            self.preconditioner.momentum = momentum
