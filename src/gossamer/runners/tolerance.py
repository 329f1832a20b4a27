"""Attention to long shared prefixes within a tolerance: what stands for their keys, and how it is kept within it.

Near keys of a node make blocks of 32, in a copy of keys and values. Rows that are multiplied together attend to the
blocks that seem to matter to them, and to the mean key and value of each of the others
(csrc/kernels/attention_within.h). What seems to matter is said by a threshold, one for each layer and head of each
node, which follows what is measured: in some of the steps some tokens are attended to exactly as well. With s the root
mean square of what a head's values are off their mean, the error of a row is

    sqrt(|out - exact|^2 / s^2 + (lse - exact lse)^2)

in its attention to the node, before this is merged with its attention to other keys. The threshold aims at a root mean
square over rows somewhat below the tolerance. A head that needs most of its blocks is attended to exactly.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.plan import StepPlan
from gossamer.engine.tree import Node

BLOCK = 32  # keys of a block
LEAST_KEYS = 1024  # of a node: there is not much to save with fewer
LEAST_ROWS = 2  # that attend to it, drafts aside: a single one is kept waiting by memory, and reads most of it
_PANEL = 32
_POWER_STEPS = 8
_FIRST, _EVERY = 16, 4  # steps at first that are checked, and one of how many later
_MEMORY = 0.8  # of what was measured before, at each check
_SETTLED = 24  # checks before a head may be found to need too many keys
_AIM = 0.7  # of the tolerance
_EXACT_FROM = 0.6  # share of the keys that a head needs, from which exact attention is not slower
REPORT = 7  # figures of a head and step


@dataclass
class Figures:
    """What was measured of some nodes."""

    total: np.ndarray  # (4): pairs of queries and keys that were computed, all pairs; squared errors, rows checked
    worst_square: float = 0.0  # of the heads' mean squared errors
    exact_heads: int = 0
    heads: int = 0
    nodes: int = 0

    def __add__(self, other: Figures) -> Figures:
        return Figures(
            self.total + other.total,
            max(self.worst_square, other.worst_square),
            self.exact_heads + other.exact_heads,
            self.heads + other.heads,
            self.nodes + other.nodes,
        )


class HeadTotals:
    """The same of one node, head by head; it outlives the node's means."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.total = np.zeros((*shape, 4))
        self.control = np.zeros((*shape, 2), np.float32)

    def figures(self) -> Figures:
        total = self.total.reshape(-1, 4)
        if not total[:, 1].any():
            return Figures(np.zeros(4))
        squares = total[:, 2] / total[:, 3].clip(1)
        return Figures(total.sum(0), squares.max(), int((self.control[..., 0] == 0).sum()), len(total), 1)


class NodeMeans:
    """Means of the blocks of a node's keys and values, and what is known of the error they cause.

    Attributes:
        address: a ``Summary`` of csrc/runtime/program.h.
        tensors: keys and values, near ones next to each other; their means; the spread of the keys' blocks.
        variance: (layers, Hkv) fp64: mean square of what values are off their mean, s^2.
        control: (layers, Hkv, 2) fp32: threshold, 0 for exact; and log2 of what the weights of means are multiplied by.
        num_bytes: of all of it.
    """

    def __init__(self, node: Node, eps: float) -> None:
        assert node.keys is not None and node.values is not None
        self.eps = eps
        blocks, layers = len(node) // BLOCK, len(node.keys)
        heads, n, dim = node.keys[0].shape
        dtype = node.keys[0].dtype
        ordered = [torch.empty(layers, heads, n, dim, dtype=dtype) for _ in range(2)]
        means = [torch.empty(layers, heads, blocks, dim, dtype=dtype) for _ in range(2)]
        spread = torch.full((layers, heads, blocks + -blocks % _PANEL), -1e30)
        variance = torch.empty(layers, heads, dtype=torch.float64)  # s^2
        with torch.inference_mode():
            for layer, (keys, values) in enumerate(zip(node.keys, node.values, strict=True)):
                order = near_together(keys.float(), BLOCK)[..., None].expand(-1, -1, dim)
                for stored, near in zip((keys, values), ordered, strict=True):
                    torch.gather(stored, 1, order, out=near[layer])
                means[0][layer], spread[layer, :, :blocks] = _means(ordered[0][layer], blocks)
                means[1][layer], _ = _means(ordered[1][layer], blocks)
                variance[layer] = values.float().var(1, unbiased=False).sum(-1).clamp_min(1e-30)
        self.tensors = (*ordered, *means, spread)
        self.variance = variance.numpy()
        shape = self.variance.shape
        self.totals = HeadTotals(shape)
        self.control = self.totals.control
        self.control[..., 0] = eps / 2 / blocks**0.5
        self.checks = 0
        self.steps = 0
        self._square = np.zeros(shape)  # of the error, over the last checks
        self._exact_light, self._light = np.zeros(shape), np.zeros(shape)
        self._share = np.ones(shape)
        self.address = [*(t.data_ptr() for t in self.tensors), self.control.ctypes.data, blocks]
        self.num_bytes = sum(t.nbytes for t in self.tensors)

    @property
    def checked(self) -> bool:
        """Whether the next step is to be checked."""
        return self.steps < _FIRST or self.steps % _EVERY == 0

    def learn(self, report: np.ndarray) -> None:
        """From the report of a step, (layers, Hkv, 7); see KeyMeans in csrc/kernels/kernels.h."""
        computed, pairs, out, lse, rows, exact_light, light = np.moveaxis(report, -1, 0)
        self.steps += 1
        exact = self.control[..., 0] == 0  # nothing is reported of these: they compute all
        self.totals.total[..., 0] += np.where(exact, pairs.max(), computed)
        self.totals.total[..., 1] += np.where(exact, pairs.max(), pairs)
        if rows.any():
            self._follow(computed / pairs.clip(1), (out / self.variance + lse), rows, exact_light, light)

    def _follow(
        self, share: np.ndarray, squares: np.ndarray, rows: np.ndarray, exact_light: np.ndarray, light: np.ndarray
    ) -> None:
        measured = rows > 0  # heads that are attended to exactly are not
        self.totals.total[..., 2] += squares
        self.totals.total[..., 3] += rows
        memory = _MEMORY if self.checks else 0.0
        self.checks += 1
        threshold, gain = self.control[..., 0], self.control[..., 1]

        def remember(before: np.ndarray, found: np.ndarray) -> None:
            before[measured] = memory * before[measured] + (1 - memory) * (found / rows.clip(1))[measured]

        remember(self._square, squares)
        remember(self._exact_light, exact_light)
        remember(self._light, light * np.exp2(-gain))
        remember(self._share, share * rows)
        ratio = np.sqrt(self._square) / (_AIM * self.eps)
        moved = threshold * (1 / ratio.clip(1e-3)).clip(0.6, 1.25)
        known = measured & (self._light > 1e-6) & (self._exact_light > 1e-6)
        ideal = np.log2(self._exact_light, where=known, out=np.zeros_like(ratio))
        ideal -= np.log2(self._light, where=known, out=np.zeros_like(ratio))
        gain[known] = ideal.clip(-2, 6)[known]
        settled = self.checks >= _SETTLED
        threshold[:] = np.where(measured & ~(settled & (self._share > _EXACT_FROM)), moved, threshold * ~measured)


class PrefixTolerance:
    """Which nodes a step attends to within the tolerance, for a :class:`~gossamer.runners.native.NativeRunner`.

    Args:
        eps: the tolerance; see the module's documentation.
    """

    def __init__(self, eps: float) -> None:
        self.eps = eps
        self.steps = 0
        self._live: weakref.WeakSet[NodeMeans] = weakref.WeakSet()
        self._gone = Figures(np.zeros(4))  # of nodes that were evicted, split or moved

    def within(self, plan: StepPlan) -> list[Node | None]:
        """Of each segment of a plan: its node, if it is attended to within the tolerance.

        Keys that others will see are computed exactly: a step that computes a node attends exactly.
        """
        if any(isinstance(chunk.target, Node) for chunk in plan.chunks):
            return [None] * len(plan.segments)
        return [
            segment.source
            if isinstance(segment.source, Node)
            and segment.source.complete
            and segment.length == len(segment.source) >= LEAST_KEYS
            and not segment.per_row
            and segment.certain >= LEAST_ROWS
            and (segment.source.means is None or segment.source.means.control[..., 0].any())
            else None
            for segment in plan.segments
        ]

    def means_of(self, node: Node) -> NodeMeans:
        """Made when it is asked for first, and again when the node's keys have moved."""
        if node.means is None:
            means = node.means = NodeMeans(node, self.eps)
            self._live.add(means)
            weakref.finalize(means, self._retire, means.totals).atexit = False
        found: NodeMeans = node.means
        return found

    def _retire(self, totals: HeadTotals) -> None:
        self._gone += totals.figures()

    def summary(self) -> dict[str, Any]:
        """What it did so far, over all nodes.

        ``computed``: share of the pairs of queries and keys that were computed, where nodes were attended to within the
        tolerance, exact heads included; ``error``: root mean square of the errors measured; ``worst_head``: the largest
        of these among layers, heads and nodes; ``exact_heads`` of ``heads`` needed too many keys; ``bytes``: of the
        copies that are held now.
        """
        found = sum((means.totals.figures() for means in self._live), self._gone)
        computed, pairs, squares, rows = found.total.tolist()
        return {
            "eps": self.eps,
            "prefixes": found.nodes,
            "steps": self.steps,
            "computed": computed / pairs if pairs else None,
            "error": (squares / rows) ** 0.5 if rows else None,
            "worst_head": float(found.worst_square) ** 0.5 if rows else None,
            "exact_heads": found.exact_heads,
            "heads": found.heads,
            "bytes": sum(means.num_bytes for means in self._live),
        }


def near_together(keys: Tensor, size: int) -> Tensor:
    """An order of keys (H, n, D) of each head, (H, n) int64, such that near ones make blocks of ``size``.

    The first block and what is left after the last whole one stay where they are: the first tokens of a text draw
    attention unlike any others. The others are cut in two along the direction in which they differ most, again and
    again; all heads at once, since the cuts are at the same places.
    """
    heads, n, _ = keys.shape
    order = torch.arange(n).repeat(heads, 1)
    directions = torch.randn(heads, keys.shape[2], 1, generator=torch.Generator().manual_seed(0))
    todo = [(1, n // size)]
    while todo:
        first, last = todo.pop()
        if last - first < 2:
            continue
        middle, part = (first + last) // 2, slice(first * size, last * size)
        x = keys.gather(1, order[:, part, None].expand(-1, -1, keys.shape[2]))
        x = x - x.mean(1, keepdim=True)
        direction = directions
        square = x.transpose(1, 2) @ x
        for _ in range(_POWER_STEPS):
            direction = torch.nn.functional.normalize(square @ direction, dim=1)
        order[:, part] = order[:, part].gather(1, (x @ direction)[..., 0].argsort(1))
        todo += [(first, middle), (middle, last)]
    return order


def _means(keys: Tensor, blocks: int) -> tuple[Tensor, Tensor]:
    """Of keys (Hkv, n, D) the means of blocks (Hkv, blocks, D), and their spread (Hkv, blocks)."""
    parts = keys[:, : blocks * BLOCK].float().unflatten(1, (-1, BLOCK))
    mean = parts.mean(2)
    return mean, (parts - mean[:, :, None]).square().mean((2, 3))
