"""LoRA adapters, packed for the kernels: beside the layers that are packed as one weight, their factors as one pair.

Of layers that read the same input, the ranks are laid next to each other: ``down`` (r1 + r2 + ..., K) holds their first
factors below each other, and ``up`` their second ones, each in the rows of its layer and the columns of its rank. The
rows are in the order of the packed weight, so that the product can be added before an activation that is fused with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import UnsupportedModelError
from gossamer.kernels.library import core
from gossamer.models.lora import Adapter, LowRank
from gossamer.native.sparse_timing import SparsePacker
from gossamer.native.weights import PackedAdapters, PackedLinear

_GROUP = 16  # of a gated weight: so many outputs of the gate stand beside as many of the other layer


class AdaptedPacker:
    """Packs linear layers of a network, with what adapters add to them.

    Args:
        pack: packs the layers themselves.
        network: whose layers they are.
        adapters: of it.
    """

    def __init__(self, pack: SparsePacker, network: nn.Module, adapters: Sequence[Adapter]) -> None:
        self._pack = pack
        self.isa = pack.isa
        self._names = {module: name for name, module in network.named_modules()}
        self._adapters = adapters

    def check(self, layers: Sequence[Any]) -> None:
        """Whether all that adapters add to is among these layers, which will be packed.

        Raises:
            UnsupportedModelError: one adds to another layer, or to one that is taken apart or put in another order.
        """
        names = {self._names.get(layer) for layer in layers}
        for adapter in self._adapters:
            if others := sorted(set(adapter.layers) - names):
                raise UnsupportedModelError(f"an adapter adds to {others[0]}, which is not packed as it is")

    def __call__(self, layers: Sequence[Any], *, gated: bool = False) -> PackedLinear:
        """See :func:`~gossamer.native.weights.pack_linear`."""
        outputs, inputs = [layer.out_features for layer in layers], layers[0].in_features
        names = [self._names.get(layer, "") for layer in layers]
        found = [[adapter.layers.get(name) for name in names] for adapter in self._adapters]
        weight = self._pack(layers, gated=gated)
        if not any(each is not None for parts in found for each in parts):
            return weight
        return replace(weight, adapters=_pack_all(found, outputs, inputs, self._pack.isa, gated))


def _pack_all(
    found: list[list[LowRank | None]], outputs: list[int], inputs: int, isa: str, gated: bool
) -> PackedAdapters:
    padded = len(outputs) * -(-outputs[0] // _GROUP) * _GROUP if gated else sum(outputs)
    downs: list[Any] = []
    ups: list[Any] = []
    ranks = [sum(each.rank for each in parts if each is not None) for parts in found]
    for parts, rank in zip(found, ranks, strict=True):
        if not rank:
            downs.append(None)
            ups.append(None)
            continue
        down = _weight(isa, rank, inputs)
        _fill(down, torch.cat([each.down for each in parts if each is not None]), (rank, 0, 0, 1))
        up = _weight(isa, padded, rank)
        row = column = 0
        for place, (part, count) in enumerate(zip(parts, outputs, strict=True)):
            if part is not None:
                rows = torch.zeros(count, rank)
                rows[:, column : column + part.rank] = part.up
                _fill(up, rows, (count, 0, place, len(outputs)) if gated else (count, row, 0, 1))
                column += part.rank
            row += count
        downs.append(down)
        ups.append(up)
    return PackedAdapters(downs, ups, max(ranks), padded)


def _weight(isa: str, outputs: int, inputs: int) -> Any:
    library = core()
    assert library is not None
    return library.Weight(isa, "float32", outputs, inputs, False, 0, "float16", False)


def _fill(weight: Any, rows: Tensor, where: tuple[int, int, int, int]) -> None:
    rows = rows.contiguous()
    weight.pack(rows.data_ptr(), "float32", *where, 0)
