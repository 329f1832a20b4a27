"""Products with rows of gradients: native where they can be, otherwise PyTorch's.

Rows G are (m, d) fp32 or bf16. What is summed over d ends in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.library import core, instruction_set

_CHUNK_BYTES = 4 << 20  # of a chunk of columns in fp64
_TRIANGLE_ROWS = 64  # of a Gram matrix that are computed at a time; what is below the diagonal is mirrored
_NATIVE_TYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


def _native(rows: Tensor) -> str | None:
    """The instruction set that can multiply these rows where they are."""
    fits = rows.device.type == "cpu" and rows.stride(1) == 1 and rows.dtype in _NATIVE_TYPES and rows.numel() > 0
    return instruction_set() if fits else None


def dot_rows(rows: Tensor, x: Tensor) -> Tensor:
    """``G x`` for x (d) -> (m) fp64, summed in fp32 over some thousand columns and in fp64 over those.

    >>> dot_rows(torch.ones(2, 3), torch.tensor([1.0, 2.0, 3.0]))
    tensor([6., 6.], dtype=torch.float64)
    """
    narrow = x.float().contiguous()
    out = torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    if (isa := _native(rows)) and (library := core()):
        library.dot_rows(isa, *_address(rows), narrow.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out
    width = 4096
    for start in range(0, rows.shape[1], width):
        out += rows[:, start : start + width].float() @ narrow[start : start + width]
    return out


def combine_rows(rows: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
    """``G^T w`` for w (m) -> (d) fp32, summed in fp32; into ``out`` if it is given.

    >>> combine_rows(torch.ones(2, 3), torch.tensor([1.0, 2.0], dtype=torch.float64))
    tensor([3., 3., 3.])
    """
    narrow = weights.float().contiguous()
    if out is None:
        out = torch.empty(rows.shape[1], device=rows.device)
    if (isa := _native(rows)) and (library := core()):
        library.combine_rows(isa, *_address(rows), narrow.data_ptr(), out.data_ptr(), torch.get_num_threads())
        return out
    width = 1 << 15
    for start in range(0, rows.shape[1], width):
        columns = slice(start, start + width)
        torch.mv(rows[:, columns].float().T, narrow, out=out[columns])
    return out


def gram(rows: Tensor) -> Tensor:
    """``G G^T``, (m, m) fp64, every product and sum in fp64.

    >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
    tensor([[5., 2.],
            [2., 1.]], dtype=torch.float64)
    """
    m, d = rows.shape
    out = torch.zeros(m, m, dtype=torch.float64, device=rows.device)
    if (isa := _native(rows)) and (library := core()):
        library.gram(isa, *_address(rows), out.data_ptr(), torch.get_num_threads())
        return out
    width = min(d, max(64, _CHUNK_BYTES // (8 * m)))
    for start in range(0, d, width):
        chunk = rows[:, start : start + width].double()
        for first in range(0, m, _TRIANGLE_ROWS):
            part = slice(first, min(first + _TRIANGLE_ROWS, m))
            out[part, first:].addmm_(chunk[part], chunk[first:].T)
    return out.triu() + out.triu(1).T


def _address(rows: Tensor) -> tuple[str, int, int, int, int]:
    return _NATIVE_TYPES[rows.dtype], rows.data_ptr(), len(rows), rows.shape[1], rows.stride(0)
