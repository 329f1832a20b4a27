"""How long attention takes in PyTorch: what the cost model is calibrated with where PyTorch computes the model."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gossamer.engine.memory import KVLayout
from gossamer.ops.attention import AttentionState, attend_prefix, attend_ragged, merge_states


def attention_seconds(layout: KVLayout, num_heads: int, *, readers: int, own: int, common: int) -> float:
    """Median seconds of one layer's attention, the merging of its partial results included.

    Args:
        layout: keys and values of the model, of whose first layer the shapes are.
        num_heads: query heads.
        readers: sequences that decode, one row each.
        own: keys that each of them has for itself, at least 1.
        common: keys that all of them attend to as one segment; 0 for no segment.
    """
    layer = layout.layers[0]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=layout.dtype, device=layout.device)

    query = random(readers, num_heads, 1, layer.key_dim)
    key = random(readers, layer.num_kv_heads, own, layer.key_dim)
    value = random(readers, layer.num_kv_heads, own, layer.value_dim)
    bias = torch.zeros(readers, own, device=layout.device)
    common_key = random(layer.num_kv_heads, common, layer.key_dim)
    common_value = random(layer.num_kv_heads, common, layer.value_dim)

    def run() -> AttentionState:
        state = attend_ragged(query, key, value, bias)
        if not common:
            return state
        state = AttentionState(state.out.transpose(0, 2), state.lse.transpose(0, 2))
        return merge_states([state, attend_prefix(query.transpose(0, 2), common_key, common_value)])

    return _median_seconds(run)


def _median_seconds(run: Callable[[], object], repeats: int = 3) -> float:
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
