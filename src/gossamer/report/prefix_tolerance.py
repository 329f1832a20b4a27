"""What attention to long prefixes within a tolerance does to perplexity.

Each window of text is a prefix and a continuation. The prefix is computed exactly, as for any requests that share it,
and the continuation's tokens are scored over it some at a time, with and without the tolerance: the tolerance has only
begun to follow what it measures when a window ends, as with a prefix that is new.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ConfigurationError, GossamerError
from gossamer.llm import LLM
from gossamer.report.quality import Interval, bootstrap_intervals
from gossamer.runners.tolerance import LEAST_KEYS

CONTINUATION = 256  # tokens of a window that are scored
STEP = 32  # of them at a time


@dataclass(frozen=True)
class ToleranceQuality:
    """What :func:`evaluate_tolerance` found.

    Attributes:
        windows, tokens: how many were scored.
        perplexity: of the continuations, within the tolerance.
        exact_perplexity: the same with exact attention.
        perplexity_ratio: the first over the second; 1.01 is one per cent worse.
        perplexity_ratio_interval: 95 %, from a bootstrap over windows; ``None`` for a single one.
        tolerance: see :meth:`gossamer.runners.tolerance.PrefixTolerance.summary`.
    """

    windows: int
    tokens: int
    perplexity: float
    exact_perplexity: float
    perplexity_ratio: float
    perplexity_ratio_interval: Interval | None
    tolerance: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def evaluate_tolerance(
    within: LLM,
    exact: LLM,
    windows: Sequence[Tensor],
    *,
    continuation: int = CONTINUATION,
    progress: Callable[[], None] = lambda: None,
) -> ToleranceQuality:
    """Scores the last ``continuation`` tokens of each window over the others.

    Args:
        within: loaded with a tolerance, and with steps of about :data:`STEP` tokens.
        exact: the same model without it.
        windows: each (T,) token ids.
        progress: called after each window.

    Raises:
        ConfigurationError: no windows, one that leaves no prefix long enough, or ``within`` is exact.
        GossamerError: a window could not be scored.
    """
    if within.stats().prefix_tolerance is None:
        raise ConfigurationError("the model was loaded without a tolerance of attention: there is nothing to measure")
    if not windows:
        raise ConfigurationError("there are no windows to evaluate; give at least one")
    shortest = min(map(len, windows))
    if shortest - continuation < LEAST_KEYS:
        raise ConfigurationError(
            f"a window of {shortest} tokens leaves {shortest - continuation} for the prefix; a tolerance is for "
            f"{LEAST_KEYS} tokens or more: give a window of at least {LEAST_KEYS + continuation}"
        )
    sums = torch.zeros(2, len(windows), dtype=torch.float64)
    for number, window in enumerate(windows):
        for row, llm in enumerate((within, exact)):
            sums[row, number] = -_log_likelihood(llm, window.tolist(), continuation)
        progress()
    tolerance = within.stats().prefix_tolerance
    assert tolerance is not None
    tokens = torch.full((len(windows),), float(continuation), dtype=torch.float64)
    means = sums.sum(1) / tokens.sum()
    (interval,) = bootstrap_intervals(sums[:1] - sums[1:], tokens, resamples=10_000, seed=0)
    return ToleranceQuality(
        windows=len(windows),
        tokens=len(windows) * continuation,
        perplexity=math.exp(means[0]),
        exact_perplexity=math.exp(means[1]),
        perplexity_ratio=math.exp(means[0] - means[1]),
        perplexity_ratio_interval=interval and (math.exp(interval[0]), math.exp(interval[1])),
        tolerance=tolerance,
    )


def _log_likelihood(llm: LLM, tokens: list[int], continuation: int) -> float:
    engine, prefix = llm.engine, tokens[:-continuation]
    engine.add_score("window", {"prompt_token_ids": prefix}, [(None, tokens[-continuation:])])
    (score,) = [output for output in _finished(engine) if output.request_id == "window"]
    if score.error is not None:
        raise GossamerError(f"a window could not be scored: {score.error}")
    engine.tree.evict(engine.budget.total)
    return float(score.continuations[0].logprob)


def _finished(engine: Any) -> list[Any]:
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs
