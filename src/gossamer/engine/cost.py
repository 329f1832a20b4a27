"""When does a tree node deserve its own segment? A cost model with coefficients measured at start-up.

Attending to a node as a segment costs a call, and reads each key once; its partial results must be merged. Copying the
node's keys into each reader's private slot ("folding") costs every reader a read of every key at every step:

    segment(readers, keys) = call + per_key * keys + per_pair * readers * keys
    folded(readers, keys)  = per_private_pair * readers * keys

Small nodes are cheaper folded (DeFT, arXiv 2404.00242, and FastTree found the same on GPUs).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from gossamer.engine.memory import KVLayout, LayerShape
from gossamer.ops.attention import AttentionState, attend_prefix, attend_ragged, merge_states

MAX_FOLDED = 128  # tokens; longer private copies would cost the memory that sharing is to save


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds per layer. See the module's documentation."""

    call: float
    per_key: float
    per_pair: float
    per_private_pair: float

    def worth_segment(self, readers: int, keys: int) -> bool:
        """Whether ``readers`` sequences should attend to a node of ``keys`` tokens as one segment.

        >>> model = CostModel(call=1e-4, per_key=1e-8, per_pair=2e-8, per_private_pair=1e-7)
        >>> model.worth_segment(readers=64, keys=2048), model.worth_segment(readers=2, keys=10)
        (True, False)
        """
        if keys > MAX_FOLDED:
            return True
        segment = self.call + self.per_key * keys + self.per_pair * readers * keys
        return segment < self.per_private_pair * readers * keys


def calibrate(layout: KVLayout, num_heads: int) -> CostModel:
    """Measure the coefficients for a model's head shapes on this machine; takes some tens of milliseconds."""
    layer = layout.layers[0]
    few = _segment_seconds(layout, layer, num_heads, readers=1, keys=16)
    one = _segment_seconds(layout, layer, num_heads, readers=1, keys=1024)
    many = _segment_seconds(layout, layer, num_heads, readers=32, keys=1024)
    short = _ragged_seconds(layout, layer, num_heads, readers=32, keys=16)
    long = _ragged_seconds(layout, layer, num_heads, readers=32, keys=128)
    per_pair = max(many - one, 0.0) / (31 * 1024)
    return CostModel(
        call=few,
        per_key=max((one - few) / 1008 - per_pair, 0.0),
        per_pair=per_pair,
        per_private_pair=max(long - short, 0.0) / (32 * 112),
    )


def _segment_seconds(layout: KVLayout, layer: LayerShape, num_heads: int, readers: int, keys: int) -> float:
    query = _random(layout, 1, num_heads, readers, layer.key_dim)
    key = _random(layout, layer.num_kv_heads, keys, layer.key_dim)
    value = _random(layout, layer.num_kv_heads, keys, layer.value_dim)

    def run() -> AttentionState:
        state = attend_prefix(query, key, value)
        return merge_states([state, state])

    return _median_seconds(run)


def _ragged_seconds(layout: KVLayout, layer: LayerShape, num_heads: int, readers: int, keys: int) -> float:
    query = _random(layout, readers, num_heads, 1, layer.key_dim)
    key = _random(layout, readers, layer.num_kv_heads, keys, layer.key_dim)
    value = _random(layout, readers, layer.num_kv_heads, keys, layer.value_dim)
    bias = torch.zeros(readers, keys, device=layout.device)
    return _median_seconds(lambda: attend_ragged(query, key, value, bias))


def _random(layout: KVLayout, *shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=layout.dtype, device=layout.device)


def _median_seconds(run: Callable[[], object], repeats: int = 7) -> float:
    def finish() -> None:
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a GPU's kernels are queued, not done, when a call returns

    finish()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        finish()
        times.append(time.perf_counter() - start)
    return statistics.median(times)
