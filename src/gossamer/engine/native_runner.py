"""Runs a decoder through its native program: one call, and one parallel region, per step."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.memory import KVLayout
from gossamer.engine.plan import Rows, StepPlan
from gossamer.engine.prefix_means import REPORT, NodeMeans, PrefixTolerance
from gossamer.engine.runner import TransformersRunner
from gossamer.engine.slots import Bucket, Slot
from gossamer.engine.tree import Node
from gossamer.errors import UnsupportedModelError
from gossamer.native.attention_timing import attention_seconds
from gossamer.native.decoder import pack_decoder, record, unsupported
from gossamer.native.library import instruction_set
from gossamer.native.recorder import EXACT, Recorder, rotary_tables
from gossamer.native.sparse_timing import SparsePacker
from gossamer.nn import Int8Linear
from gossamer.options import RunnerOptions

_FIRST_POSITIONS = 1024  # rows of a rotary table at first; it doubles when positions go beyond


def why_not_native(network: Any) -> str:
    """Why a model cannot run natively here; an empty string if it can, as far as its configuration tells."""
    if instruction_set() is None:
        return "the native kernels are not installed, or switched off"
    if network.device.type != "cpu":
        return f"the model is on {network.device}"
    return unsupported(network.config.get_text_config())


class NativeRunner:
    """A supported decoder on the CPU.

    Weights that are not int8, and keys and values, are fp32 if the whole model is; in a model with int8 layers, or of a
    16-bit type, they are bf16. Sums are in fp32 throughout, and so is what goes from layer to layer.

    Args:
        network: a model of transformers, loaded with ``attn_implementation="gossamer"``. Its weights are taken over:
            it is empty afterwards.
        options: what is asked of it. Int8 keys and values have a scale each, for half the memory of bf16; pruned layers
            are packed without their zeros or with them, with the same results; and attention to long shared prefixes
            may have a tolerance, see :mod:`gossamer.engine.prefix_means`.
        max_rows: most tokens of a step.
        threads: of a step; PyTorch's number by default.
        max_seqs: most sequences that decode together, which the choice of how to pack pruned layers measures with;
            ``max_rows`` by default.

    Attributes:
        sparse_weights: what was chosen, and what was measured for it; see :meth:`SparsePacker.summary`.

    Raises:
        UnsupportedModelError: says why the model cannot run natively.
    """

    name = "native"

    def __init__(
        self,
        network: Any,
        options: RunnerOptions = RunnerOptions(),
        *,
        max_rows: int,
        threads: int | None = None,
        max_seqs: int | None = None,
    ) -> None:
        if reason := why_not_native(network):
            raise UnsupportedModelError(f"{type(network).__name__} cannot run natively: {reason}")
        isa = instruction_set()
        assert isa is not None
        probe = TransformersRunner(network)
        self.num_heads, self.max_model_len, self.vocab_size = probe.num_heads, probe.max_model_len, probe.vocab_size
        shape = probe.layout.layers[0]
        if (
            any(layer != shape for layer in probe.layout.layers)
            or shape.key_dim != shape.value_dim
            or shape.key_dim % 2
        ):
            raise UnsupportedModelError(f"{type(network).__name__} cannot run natively: its heads are not all alike")
        quantized = any(isinstance(module, Int8Linear) for module in network.modules())
        float_type = "bfloat16" if quantized or network.dtype == torch.bfloat16 else "float32"
        self.kv_type = float_type if options.kv_dtype == "auto" else options.kv_dtype
        self.layout = KVLayout(probe.layout.layers, getattr(torch, self.kv_type), probe.layout.device)
        self.threads = threads or torch.get_num_threads()
        self.isa, self.float_type, self.max_rows = isa, float_type, max_rows
        attention = [(s.scale or shape.key_dim**-0.5, s.window) for s in probe.attention]
        pack = SparsePacker(isa, float_type, self.threads, options.sparse_weights, max_seqs or max_rows)
        self.decoder = pack_decoder(network, pack, attention)
        self.sparse_weights = pack.summary()
        recorder = Recorder(
            isa,
            layers=len(self.layout.layers),
            heads=self.num_heads,
            kv_heads=shape.num_kv_heads,
            dim=shape.key_dim,
            kv=self.kv_type,
            max_rows=max_rows,
        )
        record(recorder, self.decoder)
        self._program = recorder.native
        self.tolerance = None if options.exact else PrefixTolerance(options.prefix_eps)
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._table_length = 0
        self._arrays: _Arrays | None = None  # of the last plan, which the next one may go on from
        self._logits = torch.empty(0, self.vocab_size)
        self._largest = np.empty(0, np.int64)
        self.largest: np.ndarray | None = None
        self._results, self._addresses = (self._logits, self._largest), (0, 0)  # of the last plan's rows

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self._program.bytes)

    def profile(self) -> dict[str, float]:
        """Seconds of the last step, by kind of op."""
        return dict(self._program.profile())

    def forward(self, plan: StepPlan) -> Tensor:
        """See :class:`~gossamer.engine.runner.Runner`. The result is overwritten by the next call."""
        arrays = self._arrays
        if arrays is None or arrays.plan is not plan:
            arrays = self._arrays = _Arrays(plan, self.layout)
            rows, wanted = len(arrays.tokens), len(plan.logit_rows)
            assert rows <= self.max_rows, f"a step of {rows} tokens; the runner was made for {self.max_rows}"
            if len(self._logits) < wanted:
                self._logits = torch.empty(wanted, self.vocab_size)
                self._largest = np.empty(wanted, np.int64)
            self._results = self._logits[:wanted], self._largest[:wanted]
            self._addresses = self._logits.data_ptr(), self._largest.ctypes.data
        arrays.catch_up()
        within = self._within_of(plan, arrays)
        self._program.step(
            *arrays.addresses,
            self._rotary(arrays.last_position + 1),
            *self._addresses,
            *(EXACT if within is None else within.addresses),
            self.threads,
        )
        if within is not None:
            within.learn()
        logits, self.largest = self._results
        return logits

    def _within_of(self, plan: StepPlan, arrays: _Arrays) -> _Within | None:
        """What the step attends to within the tolerance, if there is anything."""
        if self.tolerance is None:
            return None
        nodes = self.tolerance.within(plan)
        if all(node is None for node in nodes):
            return None
        self.tolerance.steps += 1
        return _Within(nodes, self.tolerance, arrays)

    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        """See :class:`~gossamer.engine.runner.Runner`. A program of nothing but attention is made for it."""
        shape = self.layout.layers[0]
        return attention_seconds(
            self.isa,
            self.decoder.embedding,
            heads=self.num_heads,
            kv_heads=shape.num_kv_heads,
            dim=shape.key_dim,
            kv=self.kv_type,
            width=self.layout.width(shape.key_dim),
            threads=self.threads,
            readers=readers,
            own=own,
            common=common,
        )

    def _rotary(self, length: int) -> int:
        """Address of the addresses of the rotary tables, which are long enough for ``length`` positions."""
        if length > self._table_length:
            self._table_length = max(_FIRST_POSITIONS, 1 << (length - 1).bit_length())
            self._tables = [rotary_tables(*table, self._table_length) for table in self.decoder.tables]
            addresses = [[cosine.data_ptr(), sine.data_ptr()] for cosine, sine in self._tables]
            self._table_addresses = np.array(addresses, np.int64)
            self._table_address = self._table_addresses.ctypes.data
        return self._table_address


class _Within:
    """Attention within a tolerance as the program reads it; see ``StepInput`` in csrc/program.h."""

    def __init__(self, nodes: list[Node | None], tolerance: PrefixTolerance, arrays: _Arrays) -> None:
        self.means: list[NodeMeans] = []
        self._item = np.full(len(arrays.items), -1, np.int64)
        for item, node in zip(arrays.segment_items, nodes, strict=True):
            if node is not None:
                self._item[item] = len(self.means)
                self.means.append(tolerance.means_of(node))
        self._summary = np.array([means.address for means in self.means], np.int64)
        self._report = np.zeros((len(self.means), *self.means[0].control.shape[:2], REPORT))
        check = tolerance.steps if any(means.checked for means in self.means) else -1
        self.addresses = (
            self._item.ctypes.data, len(self.means), self._summary.ctypes.data, check, self._report.ctypes.data
        )  # fmt: skip

    def learn(self) -> None:
        """From what the step reported."""
        for means, report in zip(self.means, self._report, strict=True):
            means.learn(report)


class _Arrays:
    """A plan as the arrays that the program reads, which go on with it; see ``StepInput`` in csrc/program.h.

    Attributes:
        tokens, positions: (rows).
        place: (rows, 2) target of each row's key and value, and the entry of it where they go.
        targets: (n, 2 layers + 1) addresses of keys, of values, and the entries from one head to the next.
        items: (m, 6) target, first entry, number of keys, position of the first, first of ``item_rows``, their number.
        item_rows: the rows that attend to each item, one item after the other.
        logit_rows: the rows whose logits are needed.
        last_position: the highest of the step.
        addresses: of all of these, and their lengths, in the order in which the program takes them.
    """

    def __init__(self, plan: StepPlan, layout: KVLayout) -> None:
        self.plan, self._reached = plan, plan.ahead
        self.tokens = np.array(plan.token_ids, np.int64)
        self.positions = plan.positions.numpy().copy()
        self.logit_rows = plan.logit_rows.contiguous()
        self.last_position = int(self.positions.max())
        self._width = layout.width(layout.layers[0].key_dim)
        self._index: dict[Node | Bucket, int] = {}
        self._owners: list[Node | Bucket] = []
        items: list[np.ndarray] = []
        rows: list[np.ndarray] = []
        filled = made_items = 0
        self.place = np.zeros((len(self.tokens), 2), np.int64)

        def add(fields: Any, members: np.ndarray, each: bool = False) -> None:
            """One item for all members, or one for each."""
            nonlocal filled, made_items
            made = np.zeros((len(members) if each else 1, 6), np.int64)
            for column, value in enumerate(fields):
                made[:, column] = value
            made[:, 4] = filled + np.arange(len(made)) * each
            made[:, 5] = 1 if each else len(members)
            items.append(made)
            rows.append(members)
            filled += len(members)
            made_items += len(made)

        self.segment_items: list[int] = []  # the first item of each
        for segment in plan.segments:
            self.segment_items.append(made_items)
            target, entry = self._locate(segment.source)
            add((target, entry, segment.length, segment.start), _numbers(segment.rows), segment.per_row)
        for chunk in plan.chunks:
            target, entry = self._locate(chunk.target)
            entry += chunk.offset * self._width
            members = _numbers(chunk.rows)
            self.place[members, 0] = target
            self.place[members, 1] = entry + np.arange(len(members)) * self._width
            add((target, entry, len(members), chunk.position), members)
        computed = made_items
        for group in plan.groups:
            target, stride = self._bucket(group.bucket)
            members, offsets = _numbers(group.rows), group.offsets.numpy()
            entries = group.slots.numpy() * stride
            self.place[members, 0] = target
            self.place[members, 1] = entries + offsets * self._width
            add((target, entries, offsets + 1, self.positions[members] - offsets), members, each=True)
        self.items = np.concatenate(items)
        self.item_rows = np.concatenate(rows).astype(np.int32)
        self._growing = self.items[computed:, 2]  # keys of the groups: one more with every step
        self._tables: list[object] = [None] * len(self._owners)
        self.targets = np.zeros((len(self._owners), 2 * len(layout.layers) + 1), np.int64)
        arrays = (self.tokens, self.positions, self.place, self.targets, self.items, self.item_rows)
        tokens, positions, place, targets, item, item_rows = (array.ctypes.data for array in arrays)
        logit_rows = (len(self.logit_rows), self.logit_rows.data_ptr())
        self.addresses = (
            len(self.tokens), tokens, positions, place, targets, len(self.items), item, item_rows, *logit_rows
        )  # fmt: skip

    def catch_up(self) -> None:
        """To how far the plan is ahead now, and to where its keys and values are."""
        if steps := self.plan.ahead - self._reached:
            self._reached = self.plan.ahead
            self.tokens[:] = self.plan.token_ids
            self.positions += steps
            self.last_position += steps
            self._growing += steps
            self.place[:, 1] += steps * self._width
        for index, owner in enumerate(self._owners):
            if owner.addresses is None:
                assert owner.keys is not None and owner.values is not None
                tensors = (*owner.keys, *owner.values)
                owner.addresses = [*(t.data_ptr() for t in tensors), owner.keys[0].stride(-3)]
            if self._tables[index] is not owner.addresses:
                self._tables[index] = owner.addresses
                self.targets[index] = owner.addresses

    def _locate(self, source: Node | Slot) -> tuple[int, int]:
        """Target and first entry."""
        if isinstance(source, Slot):
            target, stride = self._bucket(source.bucket)
            return target, source.index * stride
        return self._target(source), 0

    def _bucket(self, bucket: Bucket) -> tuple[int, int]:
        """Target, and entries from slot to slot."""
        return self._target(bucket), bucket.keys[0].stride(0)

    def _target(self, owner: Node | Bucket) -> int:
        if owner not in self._index:
            self._index[owner] = len(self._owners)
            self._owners.append(owner)
        return self._index[owner]


def _numbers(rows: Rows) -> np.ndarray:
    return np.arange(rows.start, rows.stop) if isinstance(rows, slice) else rows.numpy()
