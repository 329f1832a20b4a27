"""Log-probabilities of tokens, from the model's logits as they are: before bias, penalties and temperature."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.engine.sampling.rows import chunks, largest
from gossamer.engine.sampling.state import SamplingState
from gossamer.outputs import Logprob


def token_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Natural log-probability of ``targets`` (T,) under ``logits`` (T, V), float32: (T,).

    >>> token_logprobs(torch.zeros(2, 4), torch.tensor([0, 3])).exp()
    tensor([0.2500, 0.2500])
    """
    everything = torch.arange(len(logits), device=logits.device)
    chosen = [
        chunk.float().log_softmax(-1).gather(1, targets[part, None].long()).flatten()
        for part, chunk in chunks(logits, everything)
    ]
    return torch.cat(chosen) if chosen else torch.empty(0, device=logits.device)


def top_logprobs(logits: Tensor, targets: Tensor, k: int) -> list[dict[int, Logprob]]:
    """Log-probabilities of ``targets`` (T,) and of the ``k`` most probable tokens under ``logits`` (T, V).

    The target comes first in each mapping. A token's rank is 1 plus the number of tokens more probable than it.

    >>> top_logprobs(torch.tensor([[0.0, 3.0, 3.0]]), torch.tensor([0]), 1)[0][0].rank
    3
    """
    return _logprobs(logits, torch.arange(len(logits), device=logits.device), targets, [k] * len(logits))


def _logprobs(logits: Tensor, rows: Tensor, targets: Tensor, counts: list[int]) -> list[dict[int, Logprob]]:
    results = []
    k = min(max(counts, default=0), logits.shape[1])
    for part, chunk in chunks(logits, rows):
        logprobs = chunk.float().log_softmax(-1)
        chosen = logprobs.gather(1, targets[part, None].long())
        ranks = (logprobs > chosen).sum(-1) + 1
        top, tokens = largest(logprobs, torch.arange(len(chunk), device=logits.device), k)
        columns = (targets[part], chosen[:, 0], ranks, top, tokens, _ranks(top))
        for count, (target, logprob, rank, values, indices, places) in zip(
            counts[part], zip(*(column.tolist() for column in columns), strict=True), strict=True
        ):
            row = {target: Logprob(logprob, rank)}
            for token, value, place in zip(indices[:count], values, places, strict=False):
                row.setdefault(token, Logprob(value, place))
            results.append(row)
    return results


def _ranks(values: Tensor) -> Tensor:
    """1 plus the number of larger values before each of descending ``values`` (n, k), int64: equal ones share a rank.

    >>> _ranks(torch.tensor([[3.0, 2.0, 2.0, 1.0]]))
    tensor([[1, 2, 2, 4]])
    """
    places = torch.arange(1, values.shape[1] + 1, device=values.device).expand_as(values)
    larger_before = torch.ones_like(values, dtype=torch.bool)
    larger_before[:, 1:] = values[:, 1:] < values[:, :-1]
    return (places * larger_before).cummax(-1).values if values.shape[1] else places


def chosen_logprobs(
    logits: Tensor, token_ids: list[int], states: list[SamplingState]
) -> list[dict[int, Logprob] | None]:
    counts = {i: s.params.logprobs for i, s in enumerate(states) if s.params.logprobs is not None and token_ids[i] >= 0}
    results: list[dict[int, Logprob] | None] = [None] * len(states)
    rows = torch.tensor(list(counts), dtype=torch.int64, device=logits.device)
    targets = torch.tensor([token_ids[i] for i in counts], dtype=torch.int64, device=logits.device)
    for i, row in zip(counts, _logprobs(logits, rows, targets, list(counts.values())), strict=True):
        results[i] = row
    return results
