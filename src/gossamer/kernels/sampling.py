"""Tokens drawn at random by the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.kernels.library import core, instruction_set


def can_sample(scores: Tensor) -> bool:
    """Whether :func:`sample` takes these logits (B, V)."""
    return (
        scores.device.type == "cpu"
        and scores.dtype == torch.float32
        and scores.is_contiguous()
        and instruction_set() is not None
    )


def sample(
    scores: Tensor,
    rows: Tensor,
    peak: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniform: Tensor,
    *,
    isa: str | None = None,
    threads: int | None = None,
) -> Tensor:
    """Draw one token (n,) for each of n rows of ``scores`` (B, V), in one parallel region.

    The definition is that of :mod:`gossamer.engine.sampling`. Sums are in fp32 within 256 tokens, and in fp64 beyond.

    Args:
        scores: logits for which :func:`can_sample` holds.
        rows: (n,) which of them.
        peak: (n, 1) the largest logit of each row, finite.
        temperature: (n, 1) above 0.
        top_k: (n, 1) 0: off.
        top_p: (n, 1) above 1: off.
        min_p: (n, 1) 0: off.
        uniform: (n, 1) in [0, 1).
        isa: the instruction set in use by default.
        threads: PyTorch's number by default.
    """
    library = core()
    isa = isa or instruction_set()
    assert library is not None and isa is not None
    tokens = torch.empty(len(rows), dtype=torch.int64)
    columns = (  # which also keeps them alive
        rows.to(torch.int64).contiguous(),
        peak.to(torch.float32).contiguous(),
        temperature.to(torch.float32).contiguous(),
        top_k.to(torch.int64).contiguous(),
        top_p.to(torch.float64).contiguous(),
        min_p.to(torch.float32).contiguous(),
        uniform.to(torch.float64).contiguous(),
    )
    addresses = [column.data_ptr() for column in columns]
    library.sample(
        isa,
        scores.data_ptr(),
        scores.shape[1],
        len(rows),
        *addresses,
        tokens.data_ptr(),
        threads or torch.get_num_threads(),
    )
    return tokens
