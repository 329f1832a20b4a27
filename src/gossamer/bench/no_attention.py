"""A model without its attention: the upper bound of what sharing can reach (arXiv 2402.05099, section 4.1)."""

from __future__ import annotations

from torch import Tensor

from gossamer.engine.plan import StepPlan
from gossamer.runners.planned_step import AttentionSettings, Step
from gossamer.runners.transformers import TransformersRunner


class NoAttention:
    """Answers queries with themselves, in the shape of values."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        return query[..., : value.shape[3]].transpose(1, 2)


class RunnerWithoutAttention(TransformersRunner):
    """The tokens are meaningless."""

    def step_of(self, plan: StepPlan) -> Step:
        return NoAttention()
