"""What LoRA adapters add to the linear layers of a model of transformers, row by row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from gossamer.engine.plan import AdapterRun
from gossamer.models.lora import Adapter, LowRank


class AddedByAdapters:
    """Hooks behind the layers that adapters adapt; without rows that have an adapter they do nothing.

    Args:
        model: whose layers they are.
        adapters: of it; their factors go where the layer is.
    """

    def __init__(self, model: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._runs: Sequence[AdapterRun] = ()
        for layer in dict.fromkeys(layer for adapter in adapters for layer in adapter.layers):
            module = model.get_submodule(layer)
            factors = {adapter.name: found for adapter in adapters if (found := adapter.layers.get(layer)) is not None}
            module.register_forward_hook(partial(self._add, _beside(module, factors)))

    @contextmanager
    def to(self, runs: Sequence[AdapterRun]) -> Iterator[None]:
        """Passes inside have rows with these adapters."""
        self._runs = runs
        try:
            yield
        finally:
            self._runs = ()

    def _add(self, factors: dict[str, LowRank], module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Any:
        """``x W^T + x down^T up^T``, the sum of the second in fp32, for x (..., K) whose rows are those of the step."""
        if not self._runs:
            return output
        x, out = inputs[0].flatten(0, -2), output.flatten(0, -2)
        for run in self._runs:
            if (low_rank := factors.get(run.adapter or "")) is not None:
                rows = slice(run.first, run.stop)
                out[rows] += (x[rows].float() @ low_rank.down.T @ low_rank.up.T).to(out.dtype)
        return out.view(output.shape)


def _beside(module: nn.Module, factors: dict[str, LowRank]) -> dict[str, LowRank]:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    if not tensors or tensors[0].is_cpu:
        return factors
    device = tensors[0].device
    return {name: LowRank(each.down.to(device), each.up.to(device)) for name, each in factors.items()}
