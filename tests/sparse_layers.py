"""Pruned weights and int8 layers with a share of zeros, for the tests of sparse layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer.kernels.library import instruction_sets
from gossamer.nn import Int8Linear
from gossamer.nn.int8_linear import Decomposition

needs_native = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
ISAS = instruction_sets()


def codes_of(rows: int, columns: int, density: float) -> Tensor:
    """(rows, columns) int8, -128 included; about ``density`` of them are not zero."""
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return codes * (torch.rand(rows, columns) < density)


def prune(model: nn.Module, share: float = 0.5) -> None:
    """The smallest weights of every linear layer become zero."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                size = layer.weight.abs()
                layer.weight[size < size.flatten().kthvalue(max(1, int(share * size.numel()))).values] = 0


def dense_layer(
    outputs: int, inputs: int, density: float, *, bias: bool, stored: int, rule: Decomposition
) -> Int8Linear:
    columns = torch.randperm(inputs)[:stored].sort().values if stored else None
    layer = Int8Linear.from_linear(nn.Linear(inputs, outputs, bias), decomposition=rule, outlier_columns=columns)
    layer.weight = codes_of(outputs, inputs, density)
    return layer


def kinds(model: Any) -> set[type]:
    return {type(module) for module in model.modules() if isinstance(module, Int8Linear)}
