"""Seconds of attention in a native program: what the engine's cost model is calibrated with."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import torch

from gossamer.native.recorder import Recorder, step_input
from gossamer.native.weights import PackedLinear

_LAYERS = 8  # each with keys and values of its own: between two visits to a layer, a step reads all of the others
_BYTES = 32 << 20  # of all keys and values, beyond which there are fewer layers


def attention_seconds(
    isa: str,
    embedding: PackedLinear,
    *,
    heads: int,
    kv_heads: int,
    dim: int,
    kv: str,
    width: int,
    threads: int,
    readers: int,
    own: int,
    common: int,
    repeats: int = 3,
) -> float:
    """Median seconds of one layer's attention, the merging of its partial results included.

    Args:
        isa: instruction set.
        embedding: any table with at least one row: a program begins with one.
        heads, kv_heads, dim, kv: see :class:`~gossamer.native.recorder.Recorder`.
        width: elements of that type in which a key is stored.
        threads: of a step.
        readers: sequences that decode, one row each.
        own: keys that each of them has for itself, at least 1.
        common: keys that all of them attend to as one segment; 0 for no segment.
        repeats: how many steps are timed.
    """
    dtype: torch.dtype = getattr(torch, kv)
    entries = kv_heads * (readers * own + common) * width
    layers = max(1, min(_LAYERS, _BYTES // (2 * entries * dtype.itemsize)))
    program = _program(isa, embedding, layers, heads, kv_heads, dim, kv, readers)
    # written, since pages of zeros might all be the same one; four bytes of 60 are a plain scale too, 0.0115
    stored = torch.full((2 * layers, entries), 60, dtype=dtype)

    first_common = kv_heads * readers * own * width
    targets = np.empty((2, 2 * layers + 1), np.int64)  # everybody's own, then the common ones
    targets[:, :-1] = [row.data_ptr() for row in stored]
    targets[1, :-1] += first_common * dtype.itemsize
    targets[:, -1] = own, common  # tokens from one head to the next
    rows = np.arange(readers)
    items = np.zeros((readers, 7), np.int64)  # see StepInput in csrc/runtime/program.h
    items[:, 1], items[:, 3], items[:, 4], items[:, 5], items[:, 6] = rows, own, common, rows, 1
    item_rows = rows
    if common:
        items = np.concatenate([items, np.array([[1, 0, 0, common, 0, readers, readers]])])
        item_rows = np.concatenate([rows, rows])
    item_rows = item_rows.astype(np.int32)
    tokens, positions = np.zeros(readers, np.int64), np.full(readers, common + own - 1, np.int64)
    place = np.zeros((readers, 3), np.int64)
    step = step_input(
        rows=readers,
        items=len(items),
        tokens=tokens.ctypes.data,
        positions=positions.ctypes.data,
        place=place.ctypes.data,
        target=targets.ctypes.data,
        item=items.ctypes.data,
        item_rows=item_rows.ctypes.data,
    )

    times = []
    for _ in range(1 + repeats):
        program.step(step, threads)
        profile = program.profile()
        times.append((profile["attention"] + profile["merge"]) / layers)
    return statistics.median(times[1:])  # the first one maps memory


def _program(
    isa: str, embedding: PackedLinear, layers: int, heads: int, kv_heads: int, dim: int, kv: str, rows: int
) -> Any:
    recorder = Recorder(isa, heads=heads, layers=[(kv_heads, dim)] * layers, kv=kv, max_rows=rows)
    recorder.embed(embedding, into="residual")
    for layer in range(layers):
        recorder.attention_alone(layer)
    return recorder.native
