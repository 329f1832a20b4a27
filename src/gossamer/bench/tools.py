"""What it costs to keep calls valid: time per token with the grammar of ten tools, and without.

One answer at a time, drawn at temperature 1, as many tokens of each as the model gives up to a limit. ``none`` offers
the tools and allows no call, so the prompt is the same and nothing is enforced; ``auto`` waits for the beginning of a
call; ``required`` masks every token.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from gossamer.bench.machine import describe
from gossamer.chat import Tool, ToolUse
from gossamer.errors import ConfigurationError
from gossamer.llm import LLM
from gossamer.sampling_params import SamplingParams

TOOLS = 10
FEWEST = 16  # tokens of an answer that counts
_QUESTION = "Write a long story about a lighthouse and its keeper, of at least ten paragraphs, or call what helps you."
_FIELDS = {
    "text": {"type": "string"},
    "count": {"type": "integer", "minimum": 0, "maximum": 1000},
    "names": {"type": "array", "items": {"type": "string"}, "maxItems": 8},
    "kind": {"enum": ["small", "medium", "large"]},
    "place": {"type": "object", "properties": {"x": {"type": "number"}, "y": {"type": "number"}}, "required": ["x"]},
}


def bench_tools(
    llm: LLM, *, new: int = 128, repeats: int = 5, progress: Callable[[str], None] = lambda note: None
) -> dict[str, Any]:
    """Measure the three in turn. Returns ``{"machine": {...}, "model": ..., "results": [...]}``.

    Each result has the ``tool_choice``, the median ``ms_per_token`` between the first and the last token of an answer,
    that of all ``rounds``, and ``over_none``, the ratio to the median of ``none``.

    Args:
        llm: a model that generates text.
        new: tokens of an answer at most.
        repeats: rounds.
        progress: called with what happens now.

    Raises:
        ConfigurationError: there are no rounds, or answers would be too short to count.
    """
    if repeats < 1 or new < FEWEST:
        raise ConfigurationError(f"repeats must be at least 1, and new at least {FEWEST}; got {repeats} and {new}")
    tools = [
        Tool(
            f"tool_{number}",
            {"type": "object", "properties": _FIELDS, "required": ["text", "kind"], "additionalProperties": False},
            description=f"Does something of kind {number}.",
        )
        for number in range(TOOLS)
    ]
    uses = {"none": ToolUse(tools, []), "auto": ToolUse(tools), "required": ToolUse(tools, required=True)}
    rounds: dict[str, list[float]] = {name: [] for name in uses}
    for number in range(-1, repeats):  # the first one warms up
        for name, use in uses.items():
            progress(f"round {number + 1} of {repeats}, {name}")
            milliseconds = _time(llm, use, new, seed=number + 1)
            if number >= 0 and milliseconds is not None:
                rounds[name].append(milliseconds)
    medians = {name: statistics.median(times) if times else None for name, times in rounds.items()}
    return {
        "machine": describe(),
        "model": llm.model_name,
        "weights": llm.weights,
        "tools": TOOLS,
        "results": [
            {
                "tool_choice": name,
                "ms_per_token": value,
                "over_none": value / medians["none"] if value and medians["none"] else None,
                "rounds": rounds[name],
            }
            for name, value in medians.items()
        ],
    }


def _time(llm: LLM, use: ToolUse, new: int, seed: int) -> float | None:
    """Milliseconds per token; ``None`` for an answer of too few."""
    params = SamplingParams(temperature=1, seed=seed, max_tokens=new, speculation=False)
    (output,) = llm.chat([{"role": "user", "content": _QUESTION}], params, use_tqdm=False, tools=use)
    tokens, metrics = len(output.outputs[0].token_ids), output.metrics
    if tokens < FEWEST or metrics is None or metrics.first_token is None or metrics.last_token is None:
        return None
    return (metrics.last_token - metrics.first_token) / (tokens - 1) * 1e3
