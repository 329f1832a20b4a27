"""Products of pruned int8 weights with and without their zeros: measured on this machine, for each shape.

One row is what a step of a single sequence multiplies: its time is that of reading the weight, of which there is less
without zeros. More rows are multiplied after each panel was expanded, which takes time and saves little; with a few of
them it is the largest part. So one row, a few and many are measured, on copies of the weight that do not fit into the
processor's caches together, as those of a model do not.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.native.weights import PackedLinear, pack_linear
from gossamer.nn.sparse_int8_linear import SparseInt8Linear
from gossamer.options import SparseWeights

FEW_ROWS = 9  # more than one register tile has, on any instruction set: expanding costs the most there
MANY_ROWS = 64
GAIN = 1.02  # of one row, at least, for a weight to be stored without its zeros
LOSS = 1.03  # of more rows, at most
_SMALL = 256 << 10  # bytes of a dense weight below which the call takes as long as the product
_COPIES_BYTES = 48 << 20  # of dense copies; with the sparse ones beside them more than most caches hold
_GROUP_BYTES = 4 << 20  # timed at a time: so short that other programs leave some of the times alone
_BUDGET = 0.1  # seconds for each number of rows, but for one group: on a busy machine a product may take 10 ms
_ROUNDS = 5
_MANY_ROUNDS = 3


@dataclass(frozen=True)
class SparseTiming:
    """How much faster a shape is multiplied without its zeros: the time with them over the time without.

    Attributes:
        outputs, inputs: N and K of the packed weight.
        nonzeros: share of its codes.
        one_row, few_rows, many_rows: with one row, with :data:`FEW_ROWS` or as many as there can be sequences, and with
            :data:`MANY_ROWS`.
    """

    outputs: int
    inputs: int
    nonzeros: float
    one_row: float
    few_rows: float
    many_rows: float

    @property
    def faster(self) -> bool:
        """Whether the zeros are worth leaving out."""
        return self.one_row >= GAIN and min(self.few_rows, self.many_rows) * LOSS >= 1


# Measurements of this process.
_measured: dict[tuple[Any, ...], SparseTiming] = {}


class SparsePacker:
    """Packs the linear layers of a model, pruned ones with or without their zeros.

    Args:
        isa: instruction set.
        float_type: of layers that are not int8.
        threads: of a step.
        choice: ``"auto"`` measures each shape, ``"on"`` leaves the zeros of all sparse layers out, ``"off"`` of none.
        max_seqs: most sequences that decode together.

    Attributes:
        timings: what was measured, for each shape of the model.
        sparse, dense: how many weights without zeros the model has that are packed without them, and with them.
    """

    def __init__(
        self, isa: str, float_type: str, threads: int, choice: SparseWeights = "auto", max_seqs: int = MANY_ROWS
    ) -> None:
        self.few = max(1, min(FEW_ROWS, max_seqs))
        self.isa, self.float_type, self.threads, self.choice = isa, float_type, threads, choice
        self.timings: dict[tuple[Any, ...], SparseTiming] = {}
        self.sparse = self.dense = 0

    def __call__(self, layers: Sequence[Any], *, gated: bool = False) -> PackedLinear:
        """See :func:`~gossamer.native.weights.pack_linear`."""
        pack = _Pack(layers, self.isa, self.float_type, gated)
        if not all(isinstance(layer, SparseInt8Linear) for layer in layers):
            return pack(sparse=False)
        sparse = self.choice == "on" or (self.choice == "auto" and pack.weights >= _SMALL and self._timing(pack).faster)
        self.sparse += sparse
        self.dense += not sparse
        return pack(sparse=sparse)

    def _timing(self, pack: _Pack) -> SparseTiming:
        key = (self.isa, self.threads, self.few, *pack.shape)
        if key not in _measured:
            _measured[key] = _measure(pack, self.threads, self.few)
        self.timings[key] = _measured[key]
        return _measured[key]

    def summary(self) -> dict[str, Any]:
        """For statistics and reports."""
        return {
            "choice": self.choice,
            "sparse": self.sparse,
            "dense": self.dense,
            "timings": [
                {
                    "outputs": t.outputs,
                    "inputs": t.inputs,
                    "nonzeros": t.nonzeros,
                    "one_row": round(t.one_row, 3),
                    "few_rows": round(t.few_rows, 3),
                    "many_rows": round(t.many_rows, 3),
                }
                for t in self.timings.values()
            ],
        }


@dataclass(frozen=True)
class _Pack:
    """Layers to pack as one weight."""

    layers: Sequence[Any]
    isa: str
    float_type: str
    gated: bool

    @property
    def weights(self) -> int:
        """The number of entries, zeros included."""
        return sum(layer.in_features * layer.out_features for layer in self.layers)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What the time of a product depends on."""
        nonzeros = sum(len(layer.weight_codes) for layer in self.layers) / max(1, self.weights)
        first = self.layers[0]
        columns = 0 if first.outlier_columns is None else len(first.outlier_columns)
        outputs = sum(layer.out_features for layer in self.layers)
        return outputs, first.in_features, columns, self.gated, first.decomposition, round(nonzeros, 1)

    def __call__(self, *, sparse: bool) -> PackedLinear:
        return pack_linear(self.layers, self.isa, self.float_type, gated=self.gated, sparse=sparse)


def _measure(pack: _Pack, threads: int, few: int) -> SparseTiming:
    outputs, inputs, *_, nonzeros = pack.shape
    weights = pack(sparse=False), pack(sparse=True)
    per_group = max(1, _GROUP_BYTES // weights[0].handle.bytes)
    groups = max(2, _COPIES_BYTES // (per_group * weights[0].handle.bytes))
    copies = [[[w.handle.copy() for _ in range(per_group)] for w in weights] for _ in range(groups)]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(MANY_ROWS, inputs, generator=generator)
    y = torch.empty(MANY_ROWS, sum(layer.out_features + 31 for layer in pack.layers))

    def ratio(count: int, groups: list[list[list[Any]]], rounds: int) -> float:
        """The ratio of the sums of the shortest times of each group."""
        best = torch.full((2, len(groups)), torch.inf, dtype=torch.float64)
        enough = time.perf_counter() + _BUDGET
        for number, group in itertools.chain.from_iterable([enumerate(groups)] * rounds):
            if time.perf_counter() > enough and best[:, 0].isfinite().all():
                break
            for form, handles in enumerate(group):
                run = _multiply(handles, weights[form].outlier_rule(), x, y, count, threads)
                best[form, number] = min(float(best[form, number]), _seconds(run))
        dense, sparse = best[:, best.isfinite().all(0)].sum(1).tolist()
        return float(dense / sparse)

    one = ratio(1, copies, _ROUNDS)
    some = one if few == 1 else ratio(few, copies[:2], _MANY_ROUNDS)
    many = ratio(MANY_ROWS, [[handles[:1] for handles in group] for group in copies[:1]], _MANY_ROUNDS)
    return SparseTiming(outputs, inputs, nonzeros, one, some, many)


def _multiply(
    handles: list[Any], rule: tuple[str, bool, float, int], x: Tensor, y: Tensor, rows: int, threads: int
) -> Callable[[], None]:
    def run() -> None:
        for handle in handles:
            handle.multiply(x.data_ptr(), rows, y.data_ptr(), *rule, threads)

    return run


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start
