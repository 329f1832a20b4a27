"""Which tokens ``top_k``, ``top_p`` and ``min_p`` leave to be drawn.

Each of the three keeps the tokens whose logit reaches some threshold, so a row is truncated by the largest of three
thresholds. Tokens that tie with it are all kept: which of them a sort puts first would be chance.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.sampling.distribution import Draws
from gossamer.engine.sampling.rows import chunks


def truncation_threshold(values: Tensor, draws: Draws, total: Tensor) -> Tensor:
    """The smallest logit (n, 1) that ``top_k``, ``top_p`` and ``min_p`` keep among descending ``values`` (n, c).

    ``total`` (n, 1) is the mass of all logits of the row; it matters where ``top_p`` is on and ``top_k`` off.
    """
    kth = values.gather(1, (draws.top_k - 1).clamp_min(0))
    within_k = (draws.top_k == 0) | (values >= kth)
    mass = draws.mass(values) * within_k
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    total = torch.where(draws.top_k > 0, cumulative[:, -1:], total)
    kept = within_k & (cumulative - mass < draws.top_p * total) & (mass >= draws.min_p)
    return values.gather(1, kept.sum(-1, keepdim=True) - 1)


def totals(scores: Tensor, draws: Draws) -> Tensor:
    """Mass (n, 1) of the logits of each row, float64; inf where no threshold depends on it."""
    total = torch.full_like(draws.uniform, torch.inf)
    which = ((draws.top_p <= 1) & (draws.top_k == 0)).flatten().nonzero().flatten()
    if len(which):
        # The softmax of the largest logit is 1 / total.
        part = [softmax.amax(-1) for _, softmax in draws.take(which).probabilities(scores)]
        total[which] = torch.cat(part).double().reciprocal()[:, None]
    return total


def sorted_threshold(scores: Tensor, draws: Draws) -> Tensor:
    """:func:`truncation_threshold` from all logits of the rows."""
    thresholds = []
    for part, chunk in chunks(scores, draws.rows):
        if chunk.device.type == "cpu":
            values = torch.from_numpy(np.sort(chunk.numpy(), -1)).flip(-1)  # half the time of torch.sort
        else:
            values = chunk.sort(-1, descending=True).values
        some = draws.take(part)
        total = some.mass(values).sum(-1, keepdim=True, dtype=torch.float64)
        thresholds.append(truncation_threshold(values, some, total))
    return torch.cat(thresholds)
