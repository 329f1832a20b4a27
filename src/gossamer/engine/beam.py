"""Beam search: which hypotheses of a prompt live on.

All hypotheses share the prompt through the prefix tree; a hypothesis that splits copies only its own slot. The
selection is transformers' ``generate(num_beams=..., early_stopping=False)``, so that the results agree: of the best
``(1 + number of end tokens) * width`` continuations, the ``width`` best that have not ended live on; those that have
ended, and are among the ``width`` best of all, are kept with the score ``sum of logprobs / length ** length_penalty``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.sampling_params import BeamSearchParams

if TYPE_CHECKING:
    from gossamer.engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """A finished hypothesis."""

    output_ids: list[int]
    logprob: float
    score: float
    finish_reason: str


@dataclass(frozen=True, slots=True)
class Branch:
    """A living hypothesis goes on with ``token``; ``logprob`` is the sum so far, ``token`` included."""

    parent: Sequence
    token: int
    logprob: float


@dataclass
class BeamSearch:
    """The search of one prompt."""

    params: BeamSearchParams
    end_ids: frozenset[int]
    max_new_tokens: int
    finished: list[Hypothesis] = field(default_factory=list)
    _sums: dict[Sequence, float] = field(default_factory=dict)
    _candidates: dict[Sequence, tuple[list[float], list[int]]] = field(default_factory=dict)

    def start(self, sequence: Sequence) -> None:
        """The prompt, of which all hypotheses descend."""
        self._sums[sequence] = 0.0

    @property
    def ready(self) -> bool:
        """Whether all living hypotheses know their continuations. (One that was preempted arrives later.)"""
        return self._sums.keys() <= self._candidates.keys()

    def push(self, sequence: Sequence, logits: Tensor) -> None:
        """The logits (vocab,) behind a living hypothesis."""
        count = min((1 + len(self.end_ids)) * self.params.beam_width, len(logits))
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        values, ids = logprobs.topk(count)
        self._candidates[sequence] = values.tolist(), ids.tolist()

    def advance(self) -> list[Branch]:
        """The hypotheses that live on; none when the search is over."""
        branches = [
            Branch(sequence, token, total + logprob)
            for sequence, total in self._sums.items()
            for logprob, token in zip(*self._candidates[sequence], strict=True)
        ]
        branches.sort(key=lambda branch: -branch.logprob)
        width = self.params.beam_width
        branches = branches[: (1 + len(self.end_ids)) * width]
        length = len(branches[0].parent.output_ids) + 1
        for branch in branches[:width]:
            if branch.token in self.end_ids or length == self.max_new_tokens:
                self._finish(branch, length)
        living = [b for b in branches if b.token not in self.end_ids][:width]
        self._candidates.clear()
        if length == self.max_new_tokens or not self._can_improve(living, length):
            return []
        return living

    def descend(self, children: dict[Sequence, float]) -> None:
        """The sequences that now stand for the branches, with their sums of log-probabilities."""
        self._sums = children

    def _finish(self, branch: Branch, length: int) -> None:
        reason = "stop" if branch.token in self.end_ids else "length"
        score = branch.logprob / length**self.params.length_penalty
        self.finished.append(Hypothesis([*branch.parent.output_ids, branch.token], branch.logprob, score, reason))
        self.finished.sort(key=lambda hypothesis: -hypothesis.score)
        del self.finished[self.params.beam_width :]

    def _can_improve(self, living: list[Branch], length: int) -> bool:
        if not living or len(self.finished) < self.params.beam_width:
            return bool(living)
        return living[0].logprob / length**self.params.length_penalty > self.finished[-1].score
