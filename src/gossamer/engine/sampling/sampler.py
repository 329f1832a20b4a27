"""One token per row of logits: the steps of a choice, in order."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.sampling.adjustments import adjust_
from gossamer.engine.sampling.distribution import Draws
from gossamer.engine.sampling.draw import draw
from gossamer.engine.sampling.logprobs import chosen_logprobs
from gossamer.engine.sampling.state import SamplingState
from gossamer.outputs import Logprob


@dataclass
class Sampled:
    """One entry per row of the logits.

    Attributes:
        token_ids: the chosen tokens; -1 where the logits hold NaN or leave no token to choose.
        logprobs: the chosen token first, then the most probable ones; ``None`` for rows that did not ask.
    """

    token_ids: list[int]
    logprobs: list[dict[int, Logprob] | None]


BLOCK = 256
_FEW = 4  # rows that are searched before torch's threads have woken up


class Sampler:
    """Chooses one token per row.

    >>> import random
    >>> from gossamer.sampling_params import SamplingParams
    >>> greedy = SamplingState(SamplingParams(temperature=0), [1], [], frozenset(), random.Random(0))
    >>> Sampler().sample(torch.tensor([[0.0, 2.0, 1.0]]), [greedy]).token_ids
    [1]
    """

    def __init__(self) -> None:
        self._scratch = torch.empty(0)

    def sample(self, logits: Tensor, states: list[SamplingState], largest: np.ndarray | None = None) -> Sampled:
        """Choose a token for each row of ``logits`` (B, V), which is left as it is.

        ``largest`` (B), if known, saves a search: the index of the largest logit of each row, as in ``token_ids``.

        Token ids of ``logit_bias``, prompt and stop tokens that are not below V have no effect.
        """
        plain = all(state.plain and not state.held for state in states)
        if plain and largest is not None:
            return Sampled(largest.tolist(), [None] * len(states))
        with torch.no_grad():
            return self._search(logits, states, plain)

    def _search(self, logits: Tensor, states: list[SamplingState], plain: bool) -> Sampled:
        adjusts = not plain and any(state.adjusts for state in states)
        scores = self._copy(logits) if adjusts or logits.dtype != torch.float32 else logits.detach()
        if plain:
            return Sampled(_argmax(scores).tolist(), [None] * len(states))
        if adjusts:
            adjust_(scores, states)
        tokens = _choose(scores, states).tolist()
        return Sampled(tokens, chosen_logprobs(logits, tokens, states))

    def _copy(self, logits: Tensor) -> Tensor:
        # The memory is kept: having the system map as many pages in each step costs more than the copy.
        if self._scratch.numel() < logits.numel() or self._scratch.device != logits.device:
            self._scratch = torch.empty(logits.numel(), device=logits.device)
        scores = self._scratch[: logits.numel()].view(logits.shape)
        if len(logits) <= _FEW and logits.dtype == torch.float32 and logits.device.type == "cpu":
            scores.numpy()[:] = logits.detach().numpy()
            return scores
        return scores.copy_(logits)


def _choose(scores: Tensor, states: list[SamplingState]) -> Tensor:
    if all(state.params.greedy for state in states):
        return _argmax(scores)
    peak = scores.amax(-1, keepdim=True)  # NaN if the row holds one
    # Rows without a finite maximum have nothing to draw from: argmax finds their +inf, or nothing at all.
    finite = peak.isfinite().flatten().tolist()
    drawn = [i for i, state in enumerate(states) if finite[i] and not state.params.greedy]
    if not drawn:
        return _argmax(scores)
    rows = torch.tensor(drawn, device=scores.device)
    tokens = draw(scores, Draws.of(rows, peak[rows], [states[i] for i in drawn], scores.shape[1]))
    return tokens if len(drawn) == len(states) else _argmax(scores).index_copy(0, rows, tokens)


def _argmax(scores: Tensor) -> Tensor:
    """Lowest index of the maximum of each row of ``scores`` (B, V), or -1 where it is NaN or -inf."""
    if scores.device.type == "cpu":
        return torch.from_numpy(_argmax_cpu(scores))
    tokens = scores.argmax(-1)
    chosen = scores.gather(1, tokens[:, None]).flatten()
    return tokens.masked_fill_(~(chosen > -torch.inf), -1)


def _argmax_cpu(scores: Tensor) -> np.ndarray:
    """torch's argmax on the CPU is not vectorised; its amax is, and runs on all cores. So: the block, then the place.

    numpy's argmax, vectorised too, does the rest. All of them return the first maximum, or the first NaN.
    """
    batch, vocabulary = scores.shape
    values, rows = scores.numpy(), np.arange(batch)
    if vocabulary % BLOCK or batch <= _FEW:
        tokens = values.argmax(-1)
    else:
        block = scores.view(batch, -1, BLOCK).amax(-1).numpy().argmax(-1)
        tokens = block * BLOCK + values.reshape(batch, -1, BLOCK)[rows, block].argmax(-1)
    tokens[~(values[rows, tokens] > -np.inf)] = -1
    return tokens
