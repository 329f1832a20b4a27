"""Reading some rows of a large matrix of logits without copying all of it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

STRIDE = 16  # tokens that compete for one place in the preselection of the largest
CHUNK_ELEMENTS = 1 << 20  # elements (4 MB) of a temporary over whole rows


def chunks(scores: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """``scores[rows]`` for ascending ``rows``, as many at a time as CHUNK_ELEMENTS allows."""
    if not len(rows):
        return
    first, step = int(rows[0]), max(1, CHUNK_ELEMENTS // scores.shape[1])
    consecutive = int(rows[-1]) - first + 1 == len(rows)
    for start in range(0, len(rows), step):
        part = slice(start, min(len(rows), start + step))
        yield part, scores[first + part.start : first + part.stop] if consecutive else scores[rows[part]]


def gather(scores: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``scores[rows[:, None], columns]`` for ``columns`` (n, c)."""
    return scores.take(rows[:, None] * scores.shape[1] + columns)


def largest(scores: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the ``count`` largest of ``rows`` (n,) of ``scores`` (B, V), descending: (n, count) each.

    ``topk`` copies the whole row into pairs. Here every 16 tokens, V / 16 apart, first elect their maximum: the
    ``count`` groups with the largest maxima hold the ``count`` largest tokens.
    """
    vocabulary = scores.shape[1]
    groups = vocabulary // STRIDE
    if groups < 2 * max(count, 1):
        values, indices = scores[rows].topk(count)
        return values, indices
    maxima = scores.new_empty(len(rows), groups)
    for part, chunk in chunks(scores, rows):
        torch.amax(chunk[:, : groups * STRIDE].unflatten(1, (STRIDE, groups)), 1, out=maxima[part])
    _, elected = largest(maxima, torch.arange(len(rows), device=scores.device), count)
    members = torch.arange(0, groups * STRIDE, groups, device=scores.device)
    remainder = torch.arange(groups * STRIDE, vocabulary, device=scores.device).expand(len(rows), -1)
    candidates = torch.cat([(members[:, None] + elected[:, None]).flatten(1), remainder], dim=1)
    values, position = gather(scores, rows, candidates).topk(count)
    return values, candidates.gather(1, position)
