"""The contract of what runs a model for the engine: something that runs it over the packed tokens of one step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch import Tensor

from gossamer.engine.memory import KVLayout
from gossamer.engine.plan import StepPlan
from gossamer.errors import GossamerError


class RunnerEndedError(GossamerError):
    """A runner cannot compute any step any more. No request is to blame, and nothing is tried again."""


class Logits(NamedTuple):
    """The result of a step.

    Attributes:
        values: (rows, vocab) the logits of the plan's ``logit_rows``.
        largest: (rows) the index of the largest of each row, or -1 if there is a NaN or nothing finite; ``None`` if the
            runner leaves that to the sampler.
    """

    values: Tensor
    largest: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class RunnerReport:
    """A runner's choices and measurements.

    Attributes:
        sparse_weights: how many int8 layers are packed without their zeros, and what was measured to decide it;
            ``None`` if it does not pack weights.
        prefix_tolerance: what attention to long shared prefixes within a tolerance did so far; ``None`` if all of it is
            exact.
    """

    sparse_weights: dict[str, Any] | None = None
    prefix_tolerance: dict[str, Any] | None = None


class Runner(Protocol):
    """Runs a model.

    Attributes:
        layout: keys and values of one token.
        num_heads: query heads of a layer.
        max_model_len: positions the model was made for.
        vocab_size: width of the logits.
        adapters: names of the adapters that rows may have.
        shared_outliers: a layer whose products depend on all rows of a step; empty if there is none.
        in_turn: whether recurrent layers take the tokens of a text one by one, however many there are.
        num_ranks: processes that compute the model together. Each has an engine of its own, and all must plan the same
            steps; so with more than one, no decision may depend on time.
    """

    name: str
    in_turn: bool
    num_ranks: int
    shared_outliers: str
    layout: KVLayout
    num_heads: int
    max_model_len: int
    vocab_size: int
    adapters: tuple[str, ...]

    def forward(self, plan: StepPlan) -> Logits:
        """Compute the step: writes keys and values, returns the logits of ``plan.logit_rows``.

        Raises:
            RunnerEndedError: there can be no other step.
        """
        ...

    def report(self) -> RunnerReport:
        """The choices that were made, and the measurements so far."""
        ...

    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        """Median seconds of one layer's attention in a decoding step, measured here and now; for the cost model.

        Each of ``readers`` sequences attends to ``own`` keys in its slot and, if ``common`` is not 0, all of them to
        one segment of so many keys; merging the two is part of it.
        """
        ...
