"""Attention of many sequences to one shared prefix, natively and otherwise, beside the machine's own limits.

**What is computed.** Every sequence has one new token, whose queries all attend to the same keys and values (arXiv
2402.05099, section 3.2). The query heads that share a key/value head, of all sequences, are the *rows* of one product:
64 sequences of a model with 3 query heads per key/value head make 192 rows.

**Caches are cold**, as in decoding, where a layer's keys and values come from memory each time: there are 30 layers,
and at least so many that their keys and values are 64 MB, and a contestant walks through all of them before it is at
the first again. Figures are those of one layer: of a walk, over the number of layers.

**Interleaved.** In every round each contestant makes one walk, and the machine's ceilings are measured: a large bf16
product of PyTorch, and reading 256 MB. Contestants are shown by their median round. For the ceilings the best round
counts, because whatever else the machine does can only make them look lower than they are.

**What is timed** is attention alone, with the merge of its partial results. The native kernels run as they do in a
step, in a recorded program, whose profile says how long each kind of op took
(:class:`~gossamer.bench.attention_contestants.Native`). On PyTorch it is one call per layer.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.bench.attention_contestants import CONTESTANTS, Contestant, Problem, random_problem
from gossamer.bench.machine import Ceilings, best_of, describe
from gossamer.errors import ConfigurationError

ROWS = (3, 24, 192)
KEYS = (2048,)
MINIMUM_LAYERS = 30
COLD_BYTES = 64 * 10**6  # of keys and values, at least: more than a processor's caches usually hold
WARM_UP_ROUNDS = 2


@dataclass
class AttentionResult:
    """One contestant at one shape: ``rows`` of each of ``kv_heads`` attend to (``keys``, ``dim``) keys and values.

    Attributes:
        rows: sequences times ``group``, the query heads per key/value head.
        layers: how many were walked through.
        ms: median time of a layer; ``ms_range`` that of the fastest and the slowest walk.
        gflops: billions of multiplications and additions per second, the two products counted.
        gb_per_s: keys and values, each read once, per second.
        gemm_share: ``gflops`` over the ceiling; ``read_share``: ``gb_per_s`` over the ceiling.
        ceilings: the best of the rounds, ``gemm_gflops`` and ``read_gb_per_s``.
        relative_error: ``|y - exact| / |exact|``, of the last layer.
        error: why there is no result.
    """

    contestant: str
    rows: int
    keys: int
    dim: int
    kv_heads: int
    group: int
    layers: int
    ms: float | None = None
    ms_range: tuple[float, float] | None = None
    gflops: float | None = None
    gb_per_s: float | None = None
    gemm_share: float | None = None
    read_share: float | None = None
    ceilings: dict[str, float] | None = None
    relative_error: float | None = None
    error: str | None = None


@dataclass
class _Entry:
    """A contestant at one shape, and the time of a layer in each round."""

    result: AttentionResult
    contestant: Contestant | None = None
    seconds: list[float] = field(default_factory=list)


def bench_attention(
    *,
    rows: tuple[int, ...] = ROWS,
    keys: tuple[int, ...] = KEYS,
    dim: int = 64,
    kv_heads: int = 3,
    group: int = 3,
    repeats: int = 9,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure every shape with every contestant. Returns ``{"machine": {...}, "results": [...]}``.

    See :class:`AttentionResult`; ``machine`` has the best ceilings of the whole run.

    Args:
        rows: multiples of ``group``.
        keys: tokens of the prefix.
        dim: entries of a head; even.
        kv_heads: key/value heads.
        group: query heads per key/value head.
        repeats: rounds that count.
        progress: told what is being measured.

    Raises:
        ConfigurationError: sizes out of range.
    """
    sizes = (min(rows, default=0), min(keys, default=0), kv_heads, group, repeats)
    if min(sizes) < 1 or dim < 2 or dim % 2:
        raise ConfigurationError("sizes and repeats must be at least 1, and dim an even number")
    for count in rows:
        if count % group:
            raise ConfigurationError(
                f"rows are sequences times query heads per key/value head: {count} is not a multiple of {group}"
            )
    ceilings = Ceilings(torch.bfloat16)
    results: list[AttentionResult] = []
    with torch.inference_mode():
        for length in keys:
            for count in rows:
                progress(f"{count} rows x {length} keys")
                layers = max(MINIMUM_LAYERS, math.ceil(COLD_BYTES / _bytes(length, dim, kv_heads)))
                problem = random_problem(count // group, length, dim, kv_heads, group, layers)
                entries = _prepare(problem, AttentionResult("", count, length, dim, kv_heads, group, layers))
                reached = _race(entries, ceilings, repeats)
                results += [_evaluate(entry, reached) for entry in entries]
                del problem, entries
                gc.collect()  # the next shape needs the memory
    return {"machine": describe() | ceilings.best, "results": [asdict(result) for result in results]}


def _bytes(keys: int, dim: int, kv_heads: int) -> int:
    """Keys and values of a layer, in bf16."""
    return 2 * keys * dim * kv_heads * 2


def exact_attention(problem: Problem) -> Tensor:
    """The last layer's result in double precision, (B, Hq, D)."""
    batch, heads, dim = problem.query.shape
    key, value = problem.keys[-1].double(), problem.values[-1].double()
    rows = problem.query.double().view(batch, len(key), -1, dim).transpose(0, 1)
    scores = rows @ key.transpose(-1, -2)[:, None] * problem.scale
    return (scores.softmax(-1) @ value[:, None]).transpose(0, 1).reshape(batch, heads, dim)


def _prepare(problem: Problem, shape: AttentionResult) -> list[_Entry]:
    """The contestants, and their first walks."""
    exact = exact_attention(problem)
    entries = []
    for kind in CONTESTANTS:
        entry = _Entry(AttentionResult(**(asdict(shape) | {"contestant": kind.name})))
        entries.append(entry)
        try:
            entry.contestant = kind(problem)
        except ConfigurationError as error:
            entry.result.error = str(error)
            continue
        _, found = entry.contestant.walk()
        entry.result.relative_error = float((found.double() - exact).norm() / exact.norm())
    return entries


def _race(entries: list[_Entry], ceilings: Ceilings, repeats: int) -> dict[str, float]:
    """Rounds of one walk each; returns the machine's ceilings, the best of all rounds."""
    reached = []
    for number in range(WARM_UP_ROUNDS + repeats):
        reached.append(ceilings.measure())
        for entry in entries:
            if entry.contestant is not None:
                seconds, _ = entry.contestant.walk()
                if number >= WARM_UP_ROUNDS:
                    entry.seconds.append(seconds / entry.result.layers)
    return best_of(reached)


def _evaluate(entry: _Entry, ceilings: dict[str, float]) -> AttentionResult:
    result, own = entry.result, entry.seconds
    if not own:
        return result
    middle = statistics.median(own)
    result.ms, result.ms_range = middle * 1e3, (min(own) * 1e3, max(own) * 1e3)
    # two products, of a multiplication and an addition for each row, key and dimension
    result.gflops = 4 * result.rows * result.kv_heads * result.keys * result.dim / middle / 1e9
    result.gb_per_s = _bytes(result.keys, result.dim, result.kv_heads) / middle / 1e9
    result.ceilings = ceilings
    result.gemm_share = result.gflops / ceilings["gemm_gflops"]
    result.read_share = result.gb_per_s / ceilings["read_gb_per_s"]
    return result
