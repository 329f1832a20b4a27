"""One token from each row's distribution.

A token is drawn by inverting the cumulative distribution, in the order of the vocabulary, at one uniform number per
row. So a sequence's tokens depend on its own logits and its own random stream alone, and when a different batch size
perturbs the logits in the last bit, the boundaries of the distribution move by as little. Sorted by probability, two
nearly equal tokens could swap places.

On a CPU, a kernel does all of this (csrc/kernels/sample.h). What follows is its reference, and for other devices and
types.
Where a row is truncated, the threshold is looked for among a few candidates; only a row whose threshold lies below
them is sorted, and only a row of which that much is left is drawn from the whole vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.engine.sampling.distribution import BLOCK, Draws
from gossamer.engine.sampling.rows import gather, largest
from gossamer.engine.sampling.truncation import sorted_threshold, totals, truncation_threshold
from gossamer.kernels.sampling import can_sample, sample

CANDIDATES = (64, 256, 1024)  # how many of the largest logits to look at before sorting a row


def draw(scores: Tensor, draws: Draws) -> Tensor:
    """Draw one token for each of ``draws`` from its row of ``scores`` (B, V); returns (n,)."""
    if can_sample(scores):
        return sample(scores, *draws.columns())
    return reference_draw(scores, draws)


def reference_draw(scores: Tensor, draws: Draws) -> Tensor:
    """:func:`draw` in PyTorch."""
    vocabulary = scores.shape[1]
    tokens = torch.empty_like(draws.rows)
    threshold = torch.full_like(draws.peak, -torch.inf)
    pending, whole = _split(torch.arange(len(draws), device=scores.device), draws.truncated)
    total = totals(scores, draws)
    for count in CANDIDATES:
        fits, pending = _split(pending, (draws.top_k[pending] < count) & (count < vocabulary))
        if not len(fits):
            continue
        part = draws.take(fits)
        values, indices = largest(scores, part.rows, count)
        limit = truncation_threshold(values, part, total[fits])
        found = (limit > values[:, -1:]).flatten()  # strictly: what ties with the last candidate may be outside
        tokens[fits] = _draw_candidates(values, indices, limit, part)  # the others are drawn again
        pending = torch.cat([pending, fits[~found]]).sort().values
    if len(pending):
        threshold[pending] = sorted_threshold(scores, draws.take(pending))
    whole = torch.cat([whole, pending]).sort().values
    if len(whole):
        tokens[whole] = _draw_vocabulary(scores, draws.take(whole), threshold[whole])
    return tokens


def _split(positions: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
    condition = condition.flatten()
    return positions[condition], positions[~condition]


def _draw_candidates(values: Tensor, indices: Tensor, limit: Tensor, draws: Draws) -> Tensor:
    """Draw from the descending ``values`` (n, c) not below ``limit`` (n, 1); returns their ``indices``, (n,)."""
    kept = values >= limit
    width = int(kept.sum(-1).max())  # no row keeps more
    indices, order = indices[:, :width].sort(-1)
    mass = (draws.mass(values) * kept)[:, :width].gather(1, order)
    position, _ = _invert(mass, draws.uniform)
    return indices.gather(1, position).flatten()


def _draw_vocabulary(scores: Tensor, draws: Draws, threshold: Tensor) -> Tensor:
    """Draw from the logits not below ``threshold`` (n, 1): first a block of tokens, then a token of the block."""
    vocabulary = scores.shape[1]
    truncated = threshold if bool((threshold > -torch.inf).any()) else None
    blocks = [p.unflatten(1, (-1, BLOCK)).sum(-1) for _, p in draws.probabilities(scores, truncated)]
    block, uniform = _invert(torch.cat(blocks), draws.uniform)
    columns = block * BLOCK + torch.arange(BLOCK, device=scores.device)
    logits = gather(scores, draws.rows, columns.clamp_max(vocabulary - 1))
    kept = (columns < vocabulary) & (logits >= threshold)
    position, _ = _invert(draws.mass(logits) * kept, uniform)
    return (block * BLOCK + position).flatten()


def _invert(mass: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Invert the cumulative distribution of ``mass`` (n, m) at ``uniform`` (n, 1), in [0, 1].

    Returns:
        The position (n, 1), never one without mass, and how far into its mass ``uniform`` falls, in [0, 1].
    """
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.minimum(uniform * total, total.nextafter(torch.zeros_like(total)))
    position = (cumulative <= target).sum(-1, keepdim=True)
    inside = mass.gather(1, position).double()
    into = (target - (cumulative.gather(1, position) - inside)) / inside
    return position, into.clamp(0.0, 1.0)
