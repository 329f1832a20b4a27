"""The experts of a mixture, as linear layers of their own.

transformers has the weights of all experts of a layer in two tensors, ``gate_up_proj`` (experts, 2 inner, hidden) and
``down_proj`` (experts, hidden, inner). What is made for linear layers does not see them: quantization, pruning, weights
as a file stores them. :func:`separate_experts` lets it: each expert gets three linear layers that are views of these
tensors, so that nothing is copied, and who changes a layer in place changes the tensors.

gpt-oss has them the other way round, (experts, hidden, 2 inner) with the columns of gate and factor in turns, with
biases and a gate of its own; its experts are only taken apart where a file stores each as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Expert(nn.Module):
    """``down_proj(glu(gate_proj(x), up_proj(x)))``, of any kind of linear layers."""

    def __init__(self, gate: nn.Module, up: nn.Module, down: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down


class SeparateExperts(nn.Module):
    """In the place of transformers' experts: called the same, and computes the same.

    Args:
        packed: transformers' module, see :func:`can_separate` and :func:`is_clamped`.

    Attributes:
        clamp: ``(alpha, limit)`` of gpt-oss's gate ``(u + 1) g sigmoid(alpha g)``, where g is at most ``limit`` and u
            within ``-limit`` and ``limit``; ``None``: the gate is ``act_fn(g) u``.
    """

    def __init__(self, packed: nn.Module) -> None:
        super().__init__()
        self.clamp: tuple[Any, Any] | None = (packed.alpha, packed.limit) if is_clamped(packed) else None
        self.act_fn: Any = getattr(packed, "act_fn", None)  # a module or a function
        self._count = 0
        for layers in _views(packed):
            self.add_module(str(self._count), Expert(*layers))
            self._count += 1

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Expert:
        expert: Expert = getattr(self, str(index))
        return expert

    def __iter__(self) -> Iterator[Expert]:
        return (self[index] for index in range(self._count))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The sum of the chosen experts' results, each times its share.

        Args:
            hidden_states: (rows, hidden).
            top_k_index: (rows, k) int64, the experts of each row.
            top_k_weights: (rows, k), their shares.

        Returns:
            (rows, hidden), in the dtype of ``hidden_states``.
        """
        total = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            row, place = torch.where(top_k_index == index)
            expert = self[index]
            x = hidden_states[row]
            inner = self._glu(expert.gate_proj(x), expert.up_proj(x))
            share = top_k_weights[row, place, None]
            total.index_add_(0, row, (expert.down_proj(inner) * share).to(total.dtype))
        return total

    def _glu(self, gate: Tensor, up: Tensor) -> Tensor:
        if self.clamp is None:
            result: Tensor = self.act_fn(gate) * up
            return result
        alpha, limit = self.clamp
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + 1) * gate * torch.sigmoid(gate * alpha)


def is_router(module: nn.Module) -> bool:
    """Whether a module of transformers chooses experts."""
    return type(module).__name__.endswith("Router")


def is_clamped(module: nn.Module) -> bool:
    """Whether a module is gpt-oss's experts."""
    names = {name for name, _ in module.named_parameters()}
    biases = {"gate_up_proj_bias", "down_proj_bias"}
    return type(module).__name__ == "GptOssExperts" and names == biases | {"gate_up_proj", "down_proj"}


def can_separate(module: nn.Module) -> bool:
    """Whether a module is transformers' experts without biases, with the gate in front of the other factor."""
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    if set(shapes) != {"gate_up_proj", "down_proj"} or not callable(getattr(module, "act_fn", None)):
        return False
    usual = {"is_transposed": False, "is_concatenated": True, "has_gate": True, "has_post_expert_norm": False}
    gate = getattr(type(module), "_apply_gate", None)
    if any(getattr(module, name, value) != value for name, value in usual.items()):
        return False
    if gate is not None and gate.__name__ != "_default_apply_gate":
        return False
    both, down = shapes["gate_up_proj"], shapes["down_proj"]
    return len(both) == len(down) == 3 and (both[0], both[2], both[1] // 2) == down


def separate_experts(
    model: nn.Module, only: Callable[[str], bool] = lambda name: True, *, clamped: bool = False
) -> dict[str, nn.Module]:
    """Put :class:`SeparateExperts` into the places of transformers' experts.

    Args:
        model: of transformers, on any device.
        only: whether experts of this name are meant.
        clamped: those of gpt-oss as well.

    Returns:
        What was there, by name.
    """
    known = ((name, module) for name, module in model.named_modules() if can_separate(module) or is_clamped(module))
    found = {name: module for name, module in known if only(name) and (clamped or not is_clamped(module))}
    for name, module in found.items():
        separate = SeparateExperts(module)
        separate.train(module.training)
        model.set_submodule(name, separate)
    return found


@contextmanager
def separated(model: nn.Module) -> Iterator[None]:
    """Experts are separate in the body, and what is changed of their weights in place has changed behind it."""
    found = separate_experts(model)
    try:
        yield
    finally:
        for name, module in found.items():
            model.set_submodule(name, module)


def _views(packed: nn.Module) -> Iterator[tuple[nn.Module, nn.Module, nn.Module]]:
    both: Tensor = packed.gate_up_proj  # type: ignore[assignment]  # a parameter
    last: Tensor = packed.down_proj  # type: ignore[assignment]  # a parameter
    if is_clamped(packed):
        biases: tuple[Tensor, Tensor] = packed.gate_up_proj_bias, packed.down_proj_bias  # type: ignore[assignment]  # parameters
        for gate_up, down, first, second in zip(both, last, *biases, strict=True):
            gate, up = (_layer(gate_up.t()[part::2], both, first[part::2]) for part in (0, 1))
            yield gate, up, _layer(down.t(), last, second)
        return
    for gate_up, down in zip(both, last, strict=True):
        gate, up = gate_up.chunk(2)
        yield _layer(gate, both), _layer(up, both), _layer(down, last)


def _layer(weight: Tensor, of: Tensor, bias: Tensor | None = None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=of.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=of.requires_grad)
    return layer
