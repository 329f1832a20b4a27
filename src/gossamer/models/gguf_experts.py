"""The experts of a GGUF file, as transformers has them or each by itself.

A file has three tensors for the experts of a layer, ``blk.N.ffn_gate_exps.weight`` and the like, (experts, outputs,
inputs), or two, where ``gate_up`` has the rows of both, one after the other; and gpt-oss three of biases, (experts,
outputs).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError
from gossamer.models.gguf_file import GGUFTensor
from gossamer.nn.experts import is_clamped
from gossamer.nn.stored_matrix import Mapped, StoredMatrix

_NAME = re.compile(r"blk\.(\d+)\.ffn_(gate|up|gate_up|down)_exps\.(weight|bias)")


def is_of_experts(tensor: GGUFTensor) -> bool:
    """Whether a tensor holds something of each expert of a layer, other than a number."""
    return _NAME.fullmatch(tensor.name) is not None


class ExpertTensors:
    """Those of one layer.

    Args:
        path: of the experts in the model of transformers.
        module: these, without weights.
        tensors: by what follows ``blk.N.ffn_``, such as ``gate_exps.weight``.
    """

    def __init__(self, path: str, module: nn.Module, tensors: Mapping[str, GGUFTensor]) -> None:
        self._path, self._clamped, self._tensors = path, is_clamped(module), tensors
        self._joined = "gate_up_exps.weight" in tensors
        for layer in ("gate_up", "down") if self._joined else ("gate", "up", "down"):
            for kind in ("weight", "bias") if self._clamped else ("weight",):
                if f"{layer}_exps.{kind}" not in tensors:
                    some = next(iter(tensors.values()))
                    raise CheckpointError(f"{some.path}: beside {some.name} there is no {layer}_exps.{kind}")

    def whole(self) -> dict[str, Any]:
        """The weights as transformers has them, dequantized when they are asked for."""
        names = {"gate_up_proj": ("gate_up",) if self._joined else ("gate", "up"), "down_proj": ("down",)}
        weights: dict[str, Any] = {}
        for name, layers in names.items():
            tensors = [self._tensors[f"{layer}_exps.weight"] for layer in layers]
            weights[f"{self._path}.{name}"] = _Whole(tensors, transposed=self._clamped)
            if self._clamped:
                biases = [self._tensors[f"{layer}_exps.bias"] for layer in layers]
                weights[f"{self._path}.{name}_bias"] = _Whole(biases, transposed=False, in_turns=True)
        return weights

    def separate(self) -> dict[str, Any]:
        """Each matrix as it is stored, by the names of :class:`~gossamer.nn.experts.SeparateExperts`."""
        weights: dict[str, Any] = {}
        for layer in ("gate", "up", "down"):
            joined = self._joined and layer != "down"
            tensor = self._tensors["gate_up_exps.weight" if joined else f"{layer}_exps.weight"]
            size = tensor.mapped.size // tensor.shape[0]  # bytes of an expert
            for index, rows in enumerate(tensor.data):
                begin, length = tensor.mapped.offset + index * size, size
                if joined:  # gate, and then as many rows of the other factor
                    length, half = size // 2, len(rows) // 2
                    begin += length if layer == "up" else 0
                    rows = rows[half:] if layer == "up" else rows[:half]
                mapped = Mapped(tensor.mapped.file, begin, length)
                matrix = StoredMatrix(tensor.type.name, tensor.shape[2], rows, None, mapped)
                weights[f"{self._path}.{index}.{layer}_proj.weight"] = matrix
            if self._clamped:
                for index, bias in enumerate(self._tensors[f"{layer}_exps.bias"].dequantize()):
                    weights[f"{self._path}.{index}.{layer}_proj.bias"] = torch.tensor(bias)
        return weights


class _Whole:
    """Tensors with as many outputs as one, gate and up one after the other, or row by row in turns; ``[...]`` reads."""

    def __init__(self, tensors: Sequence[GGUFTensor], *, transposed: bool, in_turns: bool = False) -> None:
        self._tensors, self._transposed, self._in_turns = tensors, transposed, in_turns or transposed

    def __getitem__(self, rows: Any) -> Tensor:
        parts = [torch.from_numpy(np.array(tensor.dequantize())) for tensor in self._tensors]
        joined = torch.stack(parts, 2).flatten(1, 2) if self._in_turns else torch.cat(parts, 1)
        return joined.mT.contiguous() if self._transposed else joined


def find_experts(tensors: Sequence[GGUFTensor], model: nn.Module) -> list[ExpertTensors]:
    """The experts of all layers.

    Args:
        tensors: those of experts.
        model: of transformers, without weights.

    Raises:
        CheckpointError: the model has no place for a tensor, or a layer lacks some of its experts' tensors.
    """
    places = {}
    for path, module in model.named_modules():
        number = re.search(r"\.(\d+)\.", path)
        if number and hasattr(module, "gate_up_proj") and hasattr(module, "down_proj") and path.endswith("experts"):
            places[number[1]] = path, module
    layers: dict[str, dict[str, GGUFTensor]] = {}
    for tensor in tensors:
        found = _NAME.fullmatch(tensor.name)
        if found is None or found[1] not in places:
            raise CheckpointError(f"{tensor.path}: the model has no experts that {tensor.name} could belong to")
        layers.setdefault(found[1], {})[tensor.name.partition(".ffn_")[2]] = tensor
    return [ExpertTensors(*places[layer], found) for layer, found in layers.items()]
