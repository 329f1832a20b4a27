"""Changes to single logits before a token is chosen: bias, ban of stop tokens, penalties, grammars, forced tokens."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.sampling.state import SamplingState


def adjust_(scores: Tensor, states: list[SamplingState]) -> None:
    """Apply bias, ban, penalties and grammars to float32 logits (B, V), in place.

    Touches only the entries that change: a gather and a scatter for all rows, and rows of a grammar or a forced token.
    """
    biased = [(i, s.bias_tokens, s.bias_values) for i, s in enumerate(states) if len(s.bias_tokens)]
    banned = [(i, s.banned_tokens, s.banned_tokens) for i, s in enumerate(states) if s.bans]
    penalized = [(i, *s.counts.arrays(s.ahead)) for i, s in enumerate(states) if s.penalized]
    flat, vocabulary, device = scores.view(-1), scores.shape[1], scores.device
    if biased:
        _, index, values = _entries(biased, vocabulary)
        flat.index_add_(0, torch.from_numpy(index).to(device), torch.from_numpy(values).to(device))
    if banned:
        _, index, _ = _entries(banned, vocabulary)
        flat.index_fill_(0, torch.from_numpy(index).to(device), -torch.inf)
    if penalized:
        rows, index, counts = _entries(penalized, vocabulary)
        where = torch.from_numpy(index).to(device)
        # The few values are computed in numpy: a dozen operations that would each wake torch's threads.
        values = _penalize(flat.take(where).cpu().numpy(), counts, rows, states)
        flat.scatter_(0, where, torch.from_numpy(values).to(device))
    for number, state in enumerate(states):
        forced = state.forced
        if state.constraint is None and forced is None:
            continue
        row = scores[number]
        if state.constraint is not None:
            excluded = state.constraint.excluded(len(state.ahead))[:vocabulary]
            if device.type == "cpu":  # in numpy: torch would wake its threads for each row
                np.putmask(row.numpy(), excluded, -np.inf)
            else:
                row.masked_fill_(torch.from_numpy(excluded).to(device), -torch.inf)
        if forced is not None and forced < vocabulary and row[forced] > -torch.inf:  # a grammar may want another first
            row.fill_(-torch.inf)
            row[forced] = 0.0


def _entries(
    parts: list[tuple[int, np.ndarray, np.ndarray]], vocabulary: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows, indices into the flattened logits, and values of (row, tokens, values) parts."""
    rows = np.repeat([row for row, _, _ in parts], [len(tokens) for _, tokens, _ in parts])
    tokens = np.concatenate([tokens for _, tokens, _ in parts])
    values = np.concatenate([values for _, _, values in parts])
    inside = tokens < vocabulary
    return rows[inside], (rows * vocabulary + tokens)[inside], values[inside]


def _penalize(values: np.ndarray, counts: np.ndarray, rows: np.ndarray, states: list[SamplingState]) -> np.ndarray:
    """Penalised logits of tokens that were generated ``counts`` times in their row."""
    settings = [(s.params.repetition_penalty, s.params.frequency_penalty, s.params.presence_penalty) for s in states]
    repetition, frequency, presence = np.array(settings, dtype=np.float32).T[:, rows]
    values = np.where(values > 0, values / repetition, values * repetition)
    return values - frequency * counts - presence * (counts > 0)
