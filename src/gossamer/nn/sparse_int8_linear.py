"""An int8 linear layer that stores no zeros: a bit for every weight, and the codes of those that are not zero.

With half of the weights pruned that is 5/8 of a byte per weight in the place of one. What is computed is the same, to
the bit: the codes are those of the dense layer.
"""

from __future__ import annotations

from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.nn.int8_linear import Decomposition, Int8Linear
from gossamer.nn.int8_weight import Int8Weight
from gossamer.ops.int8 import piece_rows

WORTH = 0.9  # of the bytes of dense codes, at most: rounding makes 2 to 5 % of the codes of any model zero
SPARSE_TENSORS = ("weight_codes", "weight_mask", "weight_shape")


class SparseInt8Linear(Int8Linear):
    """:class:`Int8Linear` without the codes that are zero.

    ``weight`` is expanded whenever it is asked for, also by every call. The native runner takes the layer as it is;
    :func:`dense` makes ordinary layers where memory is not what counts.

    Args:
        in_features, out_features, bias, decomposition, num_outlier_columns, device, dtype: see :class:`Int8Linear`.
        nonzeros: how many codes are not zero.

    Attributes:
        weight_codes: buffer (nonzeros) int8, row by row.
        weight_mask: buffer (N, ceil(K / 8)) uint8; bit j of byte i, the lowest first, is set where the code in column
            8 i + j is not zero.
        weight_shape: buffer (2) int64: N and K, since a mask alone does not tell K.

    >>> linear = nn.Linear(16, 4)
    >>> linear.weight.data.fill_(0.5)[:, ::2] = 0
    >>> layer = Int8Linear.from_linear(linear)
    >>> sparse = SparseInt8Linear.from_int8(layer)
    >>> sparse.weight_codes.shape, sparse.weight_mask.shape, torch.equal(sparse.weight, layer.weight)
    (torch.Size([32]), torch.Size([4, 2]), True)
    """

    weight_codes: Tensor
    weight_mask: Tensor
    weight_shape: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        decomposition: Decomposition | None = None,
        num_outlier_columns: int = 0,
        nonzeros: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._nonzeros = nonzeros
        super().__init__(
            in_features,
            out_features,
            bias,
            decomposition=decomposition,
            num_outlier_columns=num_outlier_columns,
            device=device,
            dtype=dtype,
        )

    def _register_codes(self, device: torch.device | str | None) -> None:
        shape = self.out_features, self.in_features
        mask = torch.zeros(shape[0], mask_bytes(shape[1]), dtype=torch.uint8, device=device)
        self.register_buffer("weight_codes", torch.zeros(self._nonzeros, dtype=torch.int8, device=device))
        self.register_buffer("weight_mask", mask)
        self.register_buffer("weight_shape", torch.tensor(shape, device=device))

    @classmethod
    def from_weight(cls, quantized: Int8Weight, bias: nn.Parameter | None = None, **settings: Any) -> Self:
        """See :meth:`Int8Linear.from_weight`."""
        return cls.from_int8(Int8Linear.from_weight(quantized, bias, **settings))

    @classmethod
    def from_int8(cls, layer: Int8Linear) -> Self:
        """The same layer without its zeros; what both hold besides codes is shared."""
        sparse = cls(
            layer.in_features, layer.out_features, bias=False, decomposition=layer.decomposition, device="meta"
        )
        sparse.weight_codes, sparse.weight_mask = pack_codes(layer.weight)
        sparse.weight_shape = torch.tensor(layer.weight.shape, device=layer.weight.device)
        sparse._take_rest(layer)
        return sparse.train(layer.training)

    def to_int8(self) -> Int8Linear:
        """The same layer with its zeros."""
        layer = Int8Linear(
            self.in_features, self.out_features, bias=False, decomposition=self.decomposition, device="meta"
        )
        layer.weight = self.weight
        layer._take_rest(self)
        return layer.train(self.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # computed, not stored
        """The codes (N, K) int8, in new memory."""
        codes = unpack_codes(self.weight_codes, self.weight_mask, self.in_features)
        codes._is_hf_initialized = True  # type: ignore[attr-defined]  # or transformers fills it with random numbers
        return codes

    def check(self, name: str) -> None:
        """Whether mask, shape and codes agree, as far as a checkpoint called the layer ``name``.

        Raises:
            CheckpointError: names the tensor, what it holds and what it should.
        """
        check_codes(name, self.weight_codes, self.weight_mask, self.weight_shape)
        if tuple(self.weight_shape.tolist()) != (self.out_features, self.in_features):
            raise CheckpointError(
                f"{name}.weight_shape says {self.weight_shape.tolist()}; the model needs "
                f"{[self.out_features, self.in_features]}. The checkpoint is of another model, or damaged."
            )

    def extra_repr(self) -> str:
        share = len(self.weight_codes) / max(1, self.in_features * self.out_features)
        return f"{super().extra_repr()}, nonzeros={share:.0%}"


def mask_bytes(columns: int) -> int:
    """Bytes of the mask of a row.

    >>> mask_bytes(9)
    2
    """
    return -(-columns // 8)


def pack_codes(codes: Tensor) -> tuple[Tensor, Tensor]:
    """Drop the zeros of a matrix, about 1 MB at a time.

    Args:
        codes: (N, K) int8.

    Returns:
        The codes that are not zero, row by row, and the mask (N, ceil(K / 8)) uint8 of where they stand.

    >>> pack_codes(torch.tensor([[0, 5, 0], [-1, 0, 7]], dtype=torch.int8))
    (tensor([ 5, -1,  7], dtype=torch.int8), tensor([[2],
            [5]], dtype=torch.uint8))
    """
    rows, columns = codes.shape
    mask = np.zeros((rows, mask_bytes(columns)), np.uint8)
    kept = [np.zeros(0, np.int8)]
    for start in range(0, rows, step := piece_rows(columns)):
        piece = codes[start : start + step].cpu().numpy()
        there = piece != 0
        kept.append(piece[there])
        mask[start : start + step] = np.packbits(there, axis=1, bitorder="little")
    return torch.from_numpy(np.concatenate(kept)).to(codes.device), torch.from_numpy(mask).to(codes.device)


def unpack_codes(codes: Tensor, mask: Tensor, columns: int) -> Tensor:
    """The matrix (N, K) int8 that :func:`pack_codes` was given, about 1 MB at a time.

    Args:
        codes: (nonzeros) int8.
        mask: (N, ceil(K / 8)) uint8.
        columns: K.

    >>> unpack_codes(torch.tensor([5, -1], dtype=torch.int8), torch.tensor([[2], [1]], dtype=torch.uint8), 3)
    tensor([[ 0,  5,  0],
            [-1,  0,  0]], dtype=torch.int8)
    """
    result = torch.zeros(len(mask), columns, dtype=torch.int8, device=mask.device)
    if mask.is_meta:
        return result
    first = 0
    for start in range(0, len(mask), step := piece_rows(columns)):
        there = _unpack_bits(mask[start : start + step], columns)
        last = first + _count(there)
        result[start : start + step].masked_scatter_(there, codes[first:last])
        first = last
    return result


def check_codes(name: str, codes: Tensor, mask: Tensor, shape: Tensor) -> None:
    """Whether the tensors of a sparse weight agree.

    Raises:
        CheckpointError: names the tensor, what was found and what was expected.
    """
    damaged = "The checkpoint is damaged; copy or make it again."
    numbers = shape.tolist() if shape.shape == (2,) and shape.dtype == torch.int64 else []
    if len(numbers) != 2 or min(numbers) < 0:
        raise CheckpointError(f"{name}.weight_shape holds {shape.tolist()}, not the two sizes of a matrix. {damaged}")
    expected = (numbers[0], mask_bytes(numbers[1]))
    if mask.dtype != torch.uint8 or tuple(mask.shape) != expected:
        raise CheckpointError(
            f"{name}.weight_mask is {mask.dtype} {list(mask.shape)}; a weight of {numbers} needs uint8 "
            f"{list(expected)}. {damaged}"
        )
    if codes.dtype != torch.int8 or codes.dim() != 1:
        raise CheckpointError(f"{name}.weight_codes is {codes.dtype} {list(codes.shape)}, not a row of int8. {damaged}")
    if numbers[1] % 8 and bool((mask[:, -1] >> numbers[1] % 8).any()):
        raise CheckpointError(f"{name}.weight_mask has bits set beyond the {numbers[1]} columns there are. {damaged}")
    marked = sum(_count(_unpack_bits(piece, numbers[1])) for piece in mask.split(piece_rows(numbers[1])))
    if marked != len(codes):
        raise CheckpointError(
            f"{name}.weight_mask marks {marked} codes, but {name}.weight_codes holds {len(codes)}. {damaged}"
        )


def sparse_if_smaller(layer: Int8Linear) -> Int8Linear:
    """The layer without its zeros if that saves a tenth of the bytes of its codes; otherwise the layer itself."""
    nonzeros = sum(_count(piece) for piece in layer.weight.split(piece_rows(layer.in_features)))
    small = nonzeros + layer.out_features * mask_bytes(layer.in_features) <= WORTH * layer.weight.numel()
    return SparseInt8Linear.from_int8(layer) if small and not isinstance(layer, SparseInt8Linear) else layer


def dense(model: nn.Module) -> None:
    """Give the sparse int8 layers of a model their zeros back, in place: for whoever multiplies with PyTorch.

    >>> layer = Int8Linear.from_linear(nn.Linear(16, 4))
    >>> model = nn.Sequential(SparseInt8Linear.from_int8(layer))
    >>> dense(model)
    >>> type(model[0]).__name__
    'Int8Linear'

    Raises:
        ConfigurationError: the model is a sparse layer itself, which cannot be replaced in place.
    """
    if isinstance(model, SparseInt8Linear):
        raise ConfigurationError("the model is a sparse layer itself; its to_int8() makes a dense one")
    for name, module in list(model.named_modules()):
        if isinstance(module, SparseInt8Linear):
            model.set_submodule(name, module.to_int8())


def _count(entries: Tensor) -> int:
    """How many are not zero."""
    # PyTorch's threads take longer to wake up than NumPy to count
    return int(np.count_nonzero(entries.numpy()) if entries.device.type == "cpu" else entries.count_nonzero())


def _unpack_bits(mask: Tensor, columns: int) -> Tensor:
    """(n, bytes) uint8 -> (n, columns) bool."""
    if mask.device.type == "cpu":  # a hundred times as fast as shifting
        bits = np.unpackbits(mask.numpy(), axis=1, count=columns, bitorder="little")
        return torch.from_numpy(bits).view(torch.bool)
    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return ((mask[:, :, None] >> places) & 1).view(len(mask), -1)[:, :columns].bool()
