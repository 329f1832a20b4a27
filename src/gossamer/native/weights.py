"""Layers of a PyTorch model, packed for the kernels.

Packing copies: a layer's tensors can be dropped afterwards. Layers that read the same input are packed as one weight
(queries, keys and values), and a gate and its factor with their columns side by side, so that their product is formed
while both are in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gguf
import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.kernels.library import core
from gossamer.nn import Int8Embedding, Int8Linear, Int8TiedHead, StoredEmbedding, StoredLinear
from gossamer.nn.int8_linear import Decomposition
from gossamer.nn.stored_matrix import StoredMatrix
from gossamer.ops.int8 import FLOAT_TYPES

# Numbers of csrc/kernels/block_types.h: those of GGUF, and two of our own.
_BLOCK_IDS = {name: kind.value for name, kind in gguf.GGMLQuantizationType.__members__.items()} | {
    "G4F16": 200,
    "G4BF16": 201,
}
_GROUP = 16  # outputs that have one type of blocks
MAX_INT8_INPUTS = 65_000  # more products of an unsigned and a signed byte might not fit into int32


@dataclass(frozen=True)
class PackedAdapters:
    """What each adapter adds to a product, ``x down^T up^T``; see :mod:`gossamer.native.adapters`.

    Attributes:
        downs, ups: native weights (r, K) and (N, r), of each adapter; ``None`` of one that leaves the product as it is.
        rank: the largest r.
        outputs: N, as the weight is packed.
    """

    downs: list[Any]
    ups: list[Any]
    rank: int
    outputs: int


@dataclass(frozen=True)
class PackedLinear:
    """A weight (N, K), ready for the kernels.

    Attributes:
        handle: the native object, which owns its memory.
        type: of the rows that it is multiplied with: ``"int8"``, ``"int8_blocks"``, ``"bfloat16"`` or ``"float32"``.
        decomposition: what is an outlier; int8 only.
        static_columns: (K) uint8, 1 where an input is always an outlier; for ``outliers="static"``.
        input_order: (K) int64, which input each column multiplies; in order by default.
        rows: (N, bytes) uint8 that the native object refers to, if it does not own its memory.
        block_types: of the quantized blocks that it multiplies as they are stored, sorted.
        adapters: what adapters add to its product, if any does.
    """

    handle: Any
    type: str
    outputs: int
    inputs: int
    decomposition: Decomposition | None = None
    static_columns: Tensor | None = None
    input_order: Tensor | None = None
    rows: Any = None
    block_types: tuple[str, ...] = ()
    adapters: PackedAdapters | None = None

    def outlier_rule(self) -> tuple[str, bool, float, int]:
        """The decomposition as the kernels take it: extent, relative, threshold, address of the static columns."""
        rule = self.decomposition
        if rule is None or rule.outliers is None:
            return "none", False, 0.0, 0
        columns = 0 if self.static_columns is None else self.static_columns.data_ptr()
        return rule.outliers, rule.criterion == "relative", float(rule.threshold), columns

    def __call__(self, x: Tensor, threads: int | None = None) -> Tensor:
        """``x W^T + b``, in one parallel region.

        Args:
            x: (..., K) fp32, bf16 or fp16, on the CPU.
            threads: PyTorch's number by default.

        Returns:
            (..., N) in the dtype of x; sums are in fp32.

        Raises:
            ConfigurationError: x is of another type, shape or device.
        """
        if x.dtype not in FLOAT_TYPES or x.device.type != "cpu" or x.dim() == 0 or x.shape[-1] != self.inputs:
            raise ConfigurationError(
                f"a packed weight multiplies (..., {self.inputs}) floating-point rows on the CPU, got "
                f"{x.dtype} {tuple(x.shape)} on {x.device}"
            )
        if self.input_order is not None:
            x = x[..., self.input_order]
        rows = x.detach().reshape(-1, self.inputs).float().contiguous()
        out = torch.empty(len(rows), self.outputs)
        if out.numel():
            self.handle.multiply(
                rows.data_ptr(), len(rows), out.data_ptr(), *self.outlier_rule(), threads or torch.get_num_threads()
            )
        return out.to(x.dtype).reshape(*x.shape[:-1], self.outputs)


def check_linear(layers: Sequence[Any]) -> None:
    """Whether layers that read the same input can be packed as one weight.

    Raises:
        UnsupportedModelError: says why not.
    """
    first = layers[0]
    if any(isinstance(layer, StoredLinear) for layer in layers):
        return _check_stored(layers)
    quantized = [isinstance(layer, (Int8Linear, Int8TiedHead)) for layer in layers]
    if any(quantized) != all(quantized):
        raise UnsupportedModelError("layers that read the same input are partly int8 and partly not")
    if not all(quantized) and any(type(layer) is not nn.Linear for layer in layers):
        raise UnsupportedModelError(f"a layer is a {type(first).__name__}, not a linear layer")
    if all(quantized) and first.in_features > MAX_INT8_INPUTS:
        raise UnsupportedModelError(
            f"an int8 layer has {first.in_features} inputs; at most {MAX_INT8_INPUTS} can be packed"
        )
    for layer in layers:
        _check_store(layer)
    columns = getattr(first, "outlier_columns", None)
    for layer in layers:
        others = getattr(layer, "outlier_columns", None)
        same = others is columns or (others is not None and columns is not None and torch.equal(others, columns))
        if not same or getattr(layer, "decomposition", None) != getattr(first, "decomposition", None):
            raise UnsupportedModelError("layers that read the same input do not agree on what is an outlier")


def _check_stored(layers: Sequence[Any]) -> None:
    if not all(isinstance(layer, StoredLinear) for layer in layers):
        raise UnsupportedModelError("layers that read the same input are partly in quantized blocks and partly not")
    order = layers[0].input_order
    for before, layer in itertools.pairwise(layers):
        same = layer.input_order is order
        if not same and (layer.input_order is None or order is None or not torch.equal(layer.input_order, order)):
            raise UnsupportedModelError("layers that read the same input take it in different orders")
        if layer.stored.type != before.stored.type and before.out_features % _GROUP:
            raise UnsupportedModelError(
                f"layers that read the same input have blocks of {before.stored.type} and of {layer.stored.type}, and "
                f"{before.out_features} outputs of the first are no multiple of {_GROUP}"
            )


def _check_store(layer: Any) -> None:
    """The kernels take numbers of columns at their word."""
    columns, store = getattr(layer, "outlier_columns", None), getattr(layer, "outlier_weight", None)
    if columns is None:
        return
    if store is None:
        raise UnsupportedModelError("a layer has numbers of outlier columns, but not their weights")
    outputs, inputs = layer.out_features, layer.in_features
    fits = columns.dtype == torch.int64 and columns.dim() == 1
    fits = fits and (not len(columns) or 0 <= int(columns.min()) <= int(columns.max()) < inputs)
    fits = fits and store.shape == (outputs, len(columns))
    if not fits or store.dtype not in (torch.float16, torch.bfloat16):
        raise UnsupportedModelError("a layer's outlier store does not fit its weight, or is not in 16 bit")


def decomposition_of(layer: Any) -> Decomposition | None:
    """What is an outlier of a layer; ``None`` if it is not int8, or a tied head whose static outliers have no store."""
    if not isinstance(layer, (Int8Linear, Int8TiedHead)):
        return None
    rule = layer.decomposition
    return None if isinstance(layer, Int8TiedHead) and rule.outliers == "static" else rule


def pack_linear(
    layers: Sequence[Any], isa: str, float_type: str, *, gated: bool = False, sparse: bool = False
) -> PackedLinear:
    """Pack layers with the same input as one weight, their outputs one after the other, or in turns if ``gated``.

    Args:
        layers: ``nn.Linear``, :class:`~gossamer.nn.Int8Linear` or a tied int8 head.
        isa: instruction set.
        float_type: of layers that are not int8: ``"bfloat16"`` or ``"float32"``.
        gated: two layers of the same size, the gate first.
        sparse: store int8 codes without those that are zero. The products are the same, to the bit.

    Raises:
        UnsupportedModelError: the layers cannot be one weight.
    """
    check_linear(layers)
    first = layers[0]
    if isinstance(first, StoredLinear):
        return _pack_stored(layers, isa, gated)
    type_ = "int8" if isinstance(first, (Int8Linear, Int8TiedHead)) else float_type
    sparse = sparse and type_ == "int8"
    outputs, inputs = sum(layer.out_features for layer in layers), first.in_features
    columns = getattr(first, "outlier_columns", None)
    parts = len(layers) if gated else 1
    padded = parts * -(-first.out_features // 16) * 16 if gated else outputs
    biased = any(layer.bias is not None for layer in layers)
    stored = 0 if columns is None else len(columns)
    stored_type = _name(first.outlier_weight) if stored else "float16"
    library = core()
    assert library is not None
    handle = library.Weight(isa, type_, padded, inputs, biased, stored, stored_type, sparse)
    row = 0
    for place, layer in enumerate(layers):
        count = layer.out_features
        where = (count, 0, place, parts) if gated else (count, row, 0, 1)
        _pack_rows(handle, layer, where)
        row += count
    if sparse:
        handle.drop_zeros()
    decomposition = decomposition_of(first)
    mask = None
    if decomposition is not None and decomposition.outliers == "static" and columns is not None:
        mask = torch.zeros(inputs, dtype=torch.uint8).index_fill_(0, columns.cpu(), 1)
    return PackedLinear(handle, type_, outputs // parts if gated else outputs, inputs, decomposition, mask)


def some_outputs(layer: Any, rows: Tensor) -> Any:
    """A layer with these outputs (n) of another one, in this order.

    Raises:
        UnsupportedModelError: it is no layer that can be packed.
    """
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach()[rows], requires_grad=False)
    if isinstance(layer, StoredLinear):
        stored = layer.stored
        matrix = StoredMatrix(stored.type, stored.shape[1], stored.rows()[rows.numpy()], input_order=stored.input_order)
        return StoredLinear(matrix, bias)
    if isinstance(layer, Int8Linear):
        part = Int8Linear(layer.in_features, len(rows), bias=False, decomposition=layer.decomposition, device="meta")
        part.weight, part.scale, part.bias = layer.weight[rows], layer.scale[rows], bias
        part.outlier_columns = layer.outlier_columns
        part.outlier_weight = None if layer.outlier_weight is None else layer.outlier_weight[rows]
        return part
    if type(layer) is not nn.Linear:
        raise UnsupportedModelError(f"a layer is a {type(layer).__name__}, not a linear layer")
    made = linear_of(layer.weight.detach()[rows])
    made.register_parameter("bias", bias)
    return made


def plain_linear(layer: Any) -> Any:
    """``layer`` itself, or if it is a ``Conv1D`` of transformers, whose weight is (K, N), the linear layer it is."""
    if type(layer).__name__ != "Conv1D":
        return layer
    return linear_of(layer.weight.detach().t(), layer.bias.detach())


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A layer of a weight (N, K) and a bias (N), which it refers to."""
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        made.register_parameter("bias", nn.Parameter(bias, requires_grad=False))
    return made


def pack_embedding(embedding: Any, isa: str, float_type: str) -> PackedLinear:
    """Pack a table of embeddings (V, D), to look rows up in, and to multiply with if it is tied to the output layer."""
    if isinstance(embedding, StoredEmbedding):
        return _pack_stored([StoredLinear(embedding.stored)], isa, gated=False)
    if isinstance(embedding, Int8Embedding):
        weight, scale, type_ = embedding.weight, embedding.scale, "int8"
    else:
        weight, scale, type_ = embedding.weight.detach(), None, float_type
    library = core()
    assert library is not None
    rows, inputs = weight.shape
    handle = library.Weight(isa, type_, rows, inputs, False, 0, "float16", False)
    _pack(handle, weight, scale, (rows, 0, 0, 1))
    return PackedLinear(handle, type_, rows, inputs)


def refer_to(stored: StoredMatrix, isa: str) -> PackedLinear:
    """A table in quantized blocks, to look rows up in where they are: those of a mapped file take no memory."""
    library = core()
    assert library is not None
    rows = stored.rows()
    outputs, inputs = stored.shape
    handle = library.Weight.of_rows(isa, _BLOCK_IDS[stored.type], outputs, inputs, rows.ctypes.data)
    return PackedLinear(handle, "int8_blocks", outputs, inputs, rows=rows)


def _pack_stored(layers: Sequence[StoredLinear], isa: str, gated: bool) -> PackedLinear:
    """See :func:`pack_linear`. The pages of a mapped file are given back once they are packed."""
    library = core()
    assert library is not None
    outputs, inputs = sum(layer.out_features for layer in layers), layers[0].in_features
    parts = len(layers) if gated else 1
    groups = [-(-layer.out_features // _GROUP) for layer in layers]
    if gated:
        kinds = [layer.stored.type for _ in range(groups[0]) for layer in layers]
    else:
        kinds = [kind for layer in layers for kind in [layer.stored.type] * layer.out_features][::_GROUP]
    padded = len(kinds) * _GROUP if gated else outputs
    kinds += kinds[-1:] * (len(kinds) % 2)
    biased = any(layer.bias is not None for layer in layers)
    handle = library.Weight.of_blocks(isa, [_BLOCK_IDS[kind] for kind in kinds], padded, inputs, biased)
    row = 0
    for place, layer in enumerate(layers):
        where = (layer.out_features, 0, place, parts) if gated else (layer.out_features, row, 0, 1)
        rows = layer.stored.rows()
        handle.pack_blocks(rows.ctypes.data, *where, torch.get_num_threads())
        layer.stored.release()
        if layer.bias is not None:
            bias = layer.bias.detach().float().contiguous()
            handle.set_bias(bias.data_ptr(), *where)
        row += layer.out_features
    made = outputs // parts if gated else outputs
    order, types = layers[0].input_order, tuple(sorted(set(kinds)))
    return PackedLinear(handle, "int8_blocks", made, inputs, input_order=order, block_types=types)


def _pack_rows(handle: Any, layer: Any, where: tuple[int, int, int, int]) -> None:
    _pack(handle, layer.weight.detach(), getattr(layer, "scale", None), where)
    if layer.bias is not None:
        bias = layer.bias.detach().float().contiguous()
        handle.set_bias(bias.data_ptr(), *where)
    if getattr(layer, "outlier_columns", None) is not None and len(layer.outlier_columns):
        columns, store = layer.outlier_columns.contiguous(), layer.outlier_weight.contiguous()
        handle.set_store(columns.data_ptr(), store.data_ptr(), *where)


def _pack(handle: Any, weight: Tensor, scale: Tensor | None, where: tuple[int, int, int, int]) -> None:
    weight = weight.contiguous()
    scale = None if scale is None else scale.float().contiguous()
    handle.pack(weight.data_ptr(), _name(weight), *where, 0 if scale is None else scale.data_ptr())


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
