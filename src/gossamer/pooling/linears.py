"""Linear layers of a network, as functions: packed for the kernels of csrc/ where there are any."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedModelError
from gossamer.native.weights import pack_linear
from gossamer.nn import Int8Linear
from gossamer.nn.int8_linear import Decomposition

Linear = Callable[[Tensor], Tensor]


class LinearPacker:
    """Makes one function of layers that read the same input: ``x -> x W^T + b``, their outputs one after the other.

    Args:
        isa: instruction set; ``None`` computes with PyTorch.
        dtype: of weights that stay in floating point, ``"float32"`` or ``"bfloat16"``.
        decomposition: makes the weights int8, with these outliers; ``None`` leaves them in floating point.
    """

    def __init__(self, isa: str | None, dtype: str = "float32", decomposition: Decomposition | None = None) -> None:
        self.isa, self.dtype, self.decomposition = isa, dtype, decomposition

    def __call__(self, layers: Sequence[nn.Module]) -> Linear:
        """The function; the layers may be dropped afterwards.

        Raises:
            UnsupportedModelError: a layer is of a kind that cannot be packed.
        """
        made: list[Any] = [self._quantized(layer) for layer in layers] if self.decomposition else list(layers)
        if self.isa is not None:
            return pack_linear(made, self.isa, self.dtype)
        if len(made) == 1:
            only: Linear = made[0]
            return only
        return lambda x: torch.cat([layer(x) for layer in made], dim=-1)

    def _quantized(self, layer: nn.Module) -> nn.Module:
        if type(layer) is not nn.Linear:
            raise UnsupportedModelError(f"a layer is a {type(layer).__name__}, not a linear layer")
        return Int8Linear.from_linear(layer, decomposition=self.decomposition)


class Packed(nn.Module):
    """A module that calls such a function, in the place of a linear layer."""

    def __init__(self, function: Linear) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """x (..., K) -> (..., N)."""
        return self.function(x)


def replace_linears(network: nn.Module, pack: LinearPacker) -> None:
    """Puts packed layers in the place of all ``nn.Linear`` of a network, one at a time.

    A layer whose weight something else reads too, such as an embedding, keeps it.
    """
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, Packed(pack([child])))
