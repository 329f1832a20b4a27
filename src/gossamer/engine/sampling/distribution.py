"""The distributions that tokens are drawn from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gossamer.engine.sampling.rows import CHUNK_ELEMENTS, chunks
from gossamer.engine.sampling.state import SamplingState

BLOCK = 256  # tokens whose probabilities are summed before the cumulative distribution is formed


@dataclass
class Draws:
    """The rows of a batch that are drawn at random (n,), and their parameters as columns (n, 1)."""

    rows: Tensor
    peak: Tensor  # the largest logit, finite
    temperature: Tensor
    top_k: Tensor  # 0: off
    top_p: Tensor  # above 1: off
    min_p: Tensor  # 0: off
    uniform: Tensor

    @classmethod
    def of(cls, rows: Tensor, peak: Tensor, states: list[SamplingState], vocabulary: int) -> Draws:
        """Read the parameters of ``states``, and the number that each is to be drawn with."""
        params = [state.params for state in states]
        tiny = torch.finfo(torch.float32).tiny  # a temperature below it would round to 0
        columns = (
            torch.tensor([max(p.temperature, tiny) for p in params]),
            torch.tensor([p.top_k if 0 < p.top_k < vocabulary else 0 for p in params]),
            torch.tensor([p.top_p if p.top_p < 1 else 2.0 for p in params], dtype=torch.float64),
            torch.tensor([p.min_p for p in params]),
            torch.tensor([state.uniform for state in states], dtype=torch.float64),
        )
        return cls(rows, peak, *(column[:, None].to(peak.device) for column in columns))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def truncated(self) -> Tensor:
        """Whether tokens are excluded (n, 1)."""
        return (self.top_k > 0) | (self.top_p <= 1) | (self.min_p > 0)

    def take(self, which: Tensor | slice) -> Draws:
        """Those at the positions ``which``."""
        return Draws(*(column[which] for column in self.columns()))

    def columns(self) -> tuple[Tensor, ...]:
        """All fields, in order."""
        return tuple(getattr(self, f.name) for f in fields(self))

    def mass(self, logits: Tensor) -> Tensor:
        """exp((logits - peak) / temperature) of ``logits`` (n, c): (n, c)."""
        # The maximum goes first: dividing by a tiny temperature may overflow, but only to -inf.
        return (logits - self.peak).div_(self.temperature).exp_()

    def probabilities(self, scores: Tensor, threshold: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
        """Softmax of the rows of ``scores`` (B, V) at their temperatures, a few rows at a time.

        They are padded with zeros to whole blocks of tokens. Logits below ``threshold`` (n, 1) get 0; the others are
        not rescaled. softmax is twice as fast as exp.
        """
        vocabulary = scores.shape[1]
        width = -(-vocabulary // BLOCK) * BLOCK
        scaled = scores.new_full((min(len(self), max(1, CHUNK_ELEMENTS // vocabulary)), width), -torch.inf)
        softmax = torch.empty_like(scaled)
        for part, chunk in chunks(scores, self.rows):
            size = len(chunk)
            torch.sub(chunk, self.peak[part], out=scaled[:size, :vocabulary]).div_(self.temperature[part])
            torch.softmax(scaled[:size], -1, out=softmax[:size])
            if threshold is not None:
                softmax[:size, :vocabulary].masked_fill_(chunk < threshold[part], 0.0)
            yield part, softmax[:size]
