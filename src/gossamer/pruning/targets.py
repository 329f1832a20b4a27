"""Which weights of a model are pruned, each seen as a matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import ConfigurationError
from gossamer.nn.int8_weight import is_conv1d
from gossamer.nn.quantize import SKIP, matches

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class Target:
    """A weight that is pruned, as the matrix (N, K) that its layer multiplies with: ``y = x W^T``.

    The columns of a convolution are its kernel's positions, and for each of them the input channels: so what N:M takes
    for neighbours are channels, as run times for sparse convolutions do.

    Attributes:
        name: of the parameter in the model.
        parameter: it.
        modules: the layers that use it; several, if they share it.
    """

    name: str
    parameter: nn.Parameter
    modules: tuple[nn.Module, ...]

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.to_matrix(self.parameter.detach()).shape
        return outputs, inputs

    def read(self) -> Tensor:
        """(N, K) fp32, a copy on the CPU, where pruning is computed whatever the model's device is."""
        return self.to_matrix(self.parameter.detach()).to("cpu", torch.float32, copy=True)

    def write(self, matrix: Tensor) -> None:
        """Replaces the weight by (N, K)."""
        with torch.no_grad():
            self.parameter.copy_(self.from_matrix(matrix))

    def to_matrix(self, values: Tensor) -> Tensor:
        """(N, K) from a tensor of the parameter's shape, such as its gradient."""
        if is_conv1d(self.modules[0]):
            return values.t()
        if values.dim() > 2:
            return values.movedim(1, -1).flatten(1)
        return values

    def from_matrix(self, matrix: Tensor) -> Tensor:
        """A tensor of the parameter's shape from (N, K)."""
        shape = self.parameter.shape
        if is_conv1d(self.modules[0]):
            return matrix.t()
        if len(shape) > 2:
            return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return matrix

    def inputs(self, module: nn.Module, x: Tensor) -> Tensor:
        """What the matrix is multiplied with, (T, K), when ``module`` is called with x.

        A row for each token of a linear layer, and for each position of the output of a convolution.
        """
        if not isinstance(module, _CONVOLUTIONS):
            return x.reshape(-1, x.shape[-1])
        return _patches(module, x)


def find_targets(model: nn.Module, params: Sequence[str] = (".*",), exclude: Sequence[str] = SKIP) -> dict[str, Target]:
    """The weights of linear layers and convolutions by name, in the order of the model.

    Args:
        model: of any kind; the weights of ``nn.Linear``, transformers' ``Conv1D`` and convolutions (not transposed
            ones) are found.
        params: names of modules: a whole path, its first or last parts, or a regular expression.
        exclude: names of modules that are left, in the same way; a weight that is tied to one of theirs is left too.

    Raises:
        ConfigurationError: there is none.

    >>> list(find_targets(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), exclude=["2"]))
    ['0.weight']
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    users: dict[int, list[nn.Module]] = {}
    kept: set[int] = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        known = isinstance(module, (nn.Linear, *_CONVOLUTIONS)) or is_conv1d(module)
        if known and matches(name, params) and not matches(name, exclude):
            users.setdefault(id(weight), []).append(module)
        else:
            kept.add(id(weight))
    targets = {}
    for key, modules in users.items():
        shared: Any = modules[0].weight
        if key not in kept and shared.is_floating_point() and shared.numel():
            targets[names[key]] = Target(names[key], shared, tuple(modules))
    if not targets:
        raise ConfigurationError(
            f"{type(model).__name__} has no weight to prune: no linear layer or convolution with floating-point "
            f"weights matches {list(params)} without {list(exclude)}"
        )
    return targets


def _patches(layer: Any, x: Tensor) -> Tensor:
    """(T, K) of a convolution with one group: for each output position, the kernel's positions x channels."""
    if layer.groups != 1:
        raise ConfigurationError(
            "the inputs of a grouped convolution are no matrix; exclude it, or choose a curvature of gradients"
        )
    spatial = len(layer.kernel_size)
    if x.dim() == spatial + 1:
        x = x[None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    for axis in range(spatial):
        # (..., positions, ..., taps): a window of (k - 1) d + 1 positions, of which every d-th counts
        reach = (layer.kernel_size[axis] - 1) * layer.dilation[axis] + 1
        x = x.unfold(2 + axis, reach, layer.stride[axis])[..., :: layer.dilation[axis]]
    # (batch, channels, positions..., taps...) -> (batch, positions..., taps..., channels)
    return x.movedim(1, -1).flatten(-spatial - 1).flatten(0, -2)
