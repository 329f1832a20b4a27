"""Gradients times the inverse empirical Fisher matrix of the last m gradients, in front of any optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.kernels.gradients import gram as gram_of
from gossamer.operators.ranks import ALONE, Ranks
from gossamer.operators.sliding_fisher import SlidingFisher
from gossamer.optim.parts import Parts, local, real, slices

Compat = Literal["paper"] | None


class MFACPreconditioner:
    """Replaces gradients by their product with the inverse Fisher matrix, in front of any optimizer.

    Parameters without a gradient are left as they are, and count as having zeros, as torch's optimizers have it. One
    that was frozen so far joins the matrix with its first gradient. Complex ones are pairs of real ones.

    Args:
        params: parameters, or a module.
        window: m, how many of the last gradients the matrix consists of.
        damping: lambda, above 0.
        momentum: beta of a moving average of the gradients that are multiplied; free of cost, see
            :meth:`~gossamer.operators.sliding_fisher.SlidingFisher.ema_weights`.
        clip: the longest step in the metric of the Fisher matrix, ``sqrt(u^T F u)``; longer ones are scaled down.
        history_dtype: of the stored gradients.
        compat: ``"paper"`` divides by the window before it is full, as the authors' code does.
        group: the processes that share the window, :class:`gossamer.distributed.fisher.Group`; see
            :mod:`~gossamer.optim.parts`. All of them have to take each step.

    Raises:
        ConfigurationError: an argument out of its range, or not the same in all processes.

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
        group: Ranks | None = None,
    ) -> None:
        self.params = list(params.parameters() if isinstance(params, nn.Module) else params)
        self._places = [place for place, parameter in enumerate(self.params) if parameter.requires_grad]
        if not self._places:
            raise ConfigurationError("there is no parameter that requires a gradient")
        if not 0 <= momentum < 1:
            raise ConfigurationError(f"momentum must be at least 0 and below 1, got {momentum}")
        if clip is not None and not clip > 0:
            raise ConfigurationError(f"clip must be above 0, got {clip}")
        if compat not in (None, "paper"):
            raise ConfigurationError(f"compat is None or 'paper', got {compat!r}")
        self.momentum, self.clip = momentum, clip
        ranks: Ranks = group or ALONE
        self.parts = Parts(self.params, ranks)
        lines = [f"{place}: {tuple(p.shape)} {p.dtype} {p.requires_grad}" for place, p in enumerate(self.params)]
        ranks.add(torch.zeros(0), agreed="\n".join(["parameters", *lines, f"momentum {momentum}", f"clip {clip}"]))
        self._settings: dict[str, Any] = {
            "window": window,
            "damping": damping,
            "dtype": history_dtype,
            "device": self.params[self._places[0]].device,
            "scale": "window" if compat == "paper" else "filled",
            "ranks": ranks,
        }
        self.fisher = self._make_fisher(self._places)
        self._step = torch.empty(self.fisher.d, device=self.fisher.device)  # overwritten by the next one

    def _make_fisher(self, places: list[int]) -> SlidingFisher:
        return SlidingFisher([self.parts.shape(place) for place in places], **self._settings)

    @property
    def places(self) -> list[int]:
        """Of the parameters that are in the matrix, in the order of its columns."""
        return list(self._places)

    def history(self) -> dict[int, Tensor]:
        """The window of each parameter in the matrix, by place: views (m, *shape) of it, slots along m.

        Where several processes keep it, a DTensor of the whole with the part that this one keeps.
        """
        columns = self.fisher.rows.split(self.fisher.sizes, 1)
        cut = zip(self._places, columns, self.fisher.shapes, strict=True)
        return {place: self.parts.spread(place, part.unflatten(1, shape)) for place, part, shape in cut}

    @torch.no_grad()
    def direction(self, gradients: Mapping[int, tuple[str, Tensor]]) -> dict[int, Tensor]:
        """Push the gradients of a step, and multiply them.

        Args:
            gradients: by the parameter's place among all: a name for messages, and the gradient.

        Returns:
            The products by place, fp32, complex ones as pairs, those of DTensors as the local part; valid until the
            next call.

        Raises:
            ConfigurationError: a gradient is not finite; nothing has changed.
        """
        if late := [place for place in gradients if place not in self._places]:
            self.fisher.skip(f"parameters join: {late}")
            self.fisher.widen([self.parts.shape(place) for place in late])
            self._places += late
            self._step = torch.empty(self.fisher.d, device=self.fisher.device)
        row: dict[str, Tensor] = {}
        for place in self._places:
            name, gradient = gradients.get(place, (f"parameter {place}", None))
            own = torch.zeros_like(self.params[place]) if gradient is None else gradient
            row[name if name not in row else f"{name}, number {place}"] = self.parts.of(place, own)
        self.fisher.push(row, f"gradients of parameters {sorted(gradients)}")
        weights = self.fisher.ema_weights(self.momentum) if self.momentum else None
        direction = self.fisher.natural_gradient(weights, out=self._step)
        if self.clip is not None:
            length = math.sqrt(self.fisher.curvature()[0])
            if length > self.clip:
                torch._foreach_mul_(direction, self.clip / length)
        found = {place: part for place, part in zip(self._places, direction, strict=True) if place in gradients}
        return self.parts.steps(found)

    def rest(self) -> None:
        """A step without any gradient, which changes nothing.

        Raises:
            ConfigurationError: another process has some.
        """
        self.fisher.skip("no gradients")

    @torch.no_grad()
    def step(self) -> None:
        """Rewrite the gradients that there are.

        Raises:
            ConfigurationError: a gradient is not finite; all of them are as they were.
        """
        gradients = {
            place: (f"parameter {place}", parameter.grad)
            for place, parameter in enumerate(self.params)
            if parameter.grad is not None
        }
        if not gradients:
            self.rest()
            return
        for place, part in self.direction(gradients).items():
            gradient = self.params[place].grad
            assert gradient is not None
            if gradient.is_sparse:
                self.params[place].grad = part.to(gradient.dtype)
            else:
                real(local(gradient)).copy_(part)

    def gathered(self, histories: Mapping[int, Tensor], count: int) -> dict[str, Any]:
        """A state for :meth:`load_state_dict` from what :meth:`history` gave, and how many gradients were pushed.

        Args:
            histories: by place, tensors or DTensors (m, *shape).
            count: of gradients ever pushed.

        Raises:
            ConfigurationError: a history is of another window, shape or type.
        """
        m, dtype, columns = self.fisher.window, self.fisher.rows.dtype, []
        for place, history in histories.items():
            if (tuple(history.shape), history.dtype) != ((m, *self.parts.whole(place)), dtype):
                raise ConfigurationError(
                    f"the history of parameter {place} is {tuple(history.shape)} in {history.dtype}; here it is "
                    f"{(m, *self.parts.whole(place))} in {dtype}"
                )
            part = local(history)
            if part.shape[1:] != self.parts.shape(place):  # each process was given all of it
                part = part[:, slices(part.shape[1], self.parts.ranks.rank, self.parts.ranks.size)]
            columns.append(part.reshape(m, -1))
        rows = torch.cat(columns, 1).to(self.fisher.device)
        filled = rows[: min(count, m)]
        products = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
        if filled.numel():
            products[: len(filled), : len(filled)] = gram_of(filled)
        fisher = {"rows": rows, "gram": self.parts.ranks.add(products), "count": count}
        return {"fisher": self.fisher.state_dict() | fisher, "places": list(histories)}

    def state_dict(self) -> dict[str, Any]:
        return {"fisher": self.fisher.state_dict(), "places": list(self._places)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where :meth:`state_dict` was taken.

        Raises:
            ConfigurationError: the state is of other parameters, or another window or type of the history.
        """
        places = list(state.get("places", self._places))
        if unknown := [place for place in places if not 0 <= place < len(self.params)]:
            raise ConfigurationError(f"the state knows a parameter {unknown[0]}; here are {len(self.params)}")
        fisher = self.fisher if places == self._places else self._make_fisher(places)
        fisher.load_state_dict(state["fisher"])
        self.fisher, self._places = fisher, places
        self._step = torch.empty(fisher.d, device=fisher.device)
