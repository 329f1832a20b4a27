"""Runs a decoder through its native program: one call, and one parallel region, per step."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.memory import KVLayout
from gossamer.engine.plan import StepPlan
from gossamer.engine.runner import Logits, RunnerReport
from gossamer.engine.states import State, StateMemory
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.kernels.library import instruction_set
from gossamer.models.lora import Adapter
from gossamer.native.attention_timing import attention_seconds
from gossamer.native.decoder import Attention, record
from gossamer.native.few_rows import choose_few_rows
from gossamer.native.packing import pack_decoder, unsupported
from gossamer.native.recorder import Recorder
from gossamer.native.sparse_timing import SparsePacker
from gossamer.nn import Int8Linear, StoredLinear
from gossamer.options import RunnerOptions
from gossamer.runners.step_input import StepArrays, WithinTolerance
from gossamer.runners.tolerance import PrefixTolerance
from gossamer.runners.transformers import TransformersRunner

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
            may have a tolerance, see :mod:`gossamer.runners.tolerance`.
        max_rows: most tokens of a step.
        threads: of a step; PyTorch's number by default.
        max_seqs: most sequences that decode together, which the choice of how to pack pruned layers measures with;
            ``max_rows`` by default.
        adapters: that rows of a step may have. Their factors, and what they add, are in fp32.

    Attributes:
        batch_invariant: whether the bits of a token's results are the same whatever other tokens a step has.
        few_rows: up to how many rows are multiplied with quantized blocks as they are packed, by mixture of types.
        tolerance: what keeps attention to long shared prefixes within what was asked for, or ``None``.

    Raises:
        ConfigurationError: results should not depend on the batch, but the model's outliers are found in it.
        UnsupportedModelError: says why the model cannot run natively.
    """

    name = "native"
    in_turn = True
    num_ranks = 1

    def __init__(
        self,
        network: Any,
        options: RunnerOptions = RunnerOptions(),
        *,
        max_rows: int,
        threads: int | None = None,
        max_seqs: int | None = None,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        if reason := why_not_native(network):
            raise UnsupportedModelError(f"{type(network).__name__} cannot run natively: {reason}")
        isa = instruction_set()
        assert isa is not None
        probe = TransformersRunner(network)
        self.num_heads, self.max_model_len, self.vocab_size = probe.num_heads, probe.max_model_len, probe.vocab_size
        shapes = probe.layout.layers
        if any(shape.key_dim != shape.value_dim or shape.key_dim % 2 for shape in shapes):
            raise UnsupportedModelError(
                f"{type(network).__name__} cannot run natively: its keys have other sizes than its values, or odd ones"
            )
        quantized = any(isinstance(module, Int8Linear | StoredLinear) for module in network.modules())
        float_type = "bfloat16" if quantized or network.dtype == torch.bfloat16 else "float32"
        self.kv_type = float_type if options.kv_dtype == "auto" else options.kv_dtype
        self.threads = threads or torch.get_num_threads()
        self.isa, self.float_type, self.max_rows = isa, float_type, max_rows
        self.batch_invariant = options.batch_invariant
        self.shared_outliers = probe.shared_outliers
        if options.batch_invariant and self.shared_outliers:
            raise ConfigurationError(
                f"batch_invariant cannot be kept: {self.shared_outliers} takes the outlier columns of all tokens of a "
                "step out of the int8 product (int8_outliers 'batch'); 'token' and 'static' do not look at other tokens"
            )
        attention = [(s.scale or x.key_dim**-0.5, s.window) for s, x in zip(probe.attention, shapes, strict=True)]
        pack = SparsePacker(isa, float_type, self.threads, options.sparse_weights, max_seqs or max_rows)
        self.decoder = pack_decoder(network, pack, attention, adapters)
        stores = [mixer.stores for each in self.decoder.layers if isinstance(mixer := each.mixer, Attention)]
        self.layout = KVLayout(
            tuple(itertools.compress(shapes, stores)),
            getattr(torch, self.kv_type),
            probe.layout.device,
            state_bytes=4 * self.decoder.state_size,
        )
        self._states = StateMemory(self.decoder.state_size)
        self.adapters = tuple(adapter.name for adapter in adapters)
        self._sparse_weights = pack.summary()
        self.few_rows = choose_few_rows(self.decoder.weights(), isa, self.threads)
        recorder = Recorder(
            isa,
            heads=self.num_heads,
            layers=[(shape.num_kv_heads, shape.key_dim) for shape in self.layout.layers],
            kv=self.kv_type,
            max_rows=max_rows,
            invariant=options.batch_invariant,
        )
        record(recorder, self.decoder)
        self._program = recorder.native
        if not options.exact and self.decoder.score_cap:
            raise ConfigurationError("prefix_eps cannot be used: the model caps its scores, which no bound holds for")
        if not options.exact and len(set(self.layout.layers)) > 1:
            raise ConfigurationError("prefix_eps cannot be used: the heads of the model's layers differ")
        self.tolerance = None if options.exact else PrefixTolerance(options.prefix_eps)
        self._tables: list[tuple[Tensor, Tensor]] = []
        self._table_length = 0
        self._arrays: StepArrays | None = None  # of the last plan, which the next one may go on from
        self._logits = torch.empty(0, self.vocab_size)
        self._largest = np.empty(0, np.int64)
        self._results, self._addresses = Logits(self._logits, self._largest), (0, 0)  # of the last plan's rows

    @property
    def weight_bytes(self) -> int:
        """Bytes of the packed weights."""
        return int(self._program.bytes)

    def profile(self) -> dict[str, float]:
        """Seconds of the last step, by kind of op."""
        return dict(self._program.profile())

    @property
    def experts_read(self) -> int:
        """Experts whose weights the last step has read, in all layers."""
        return int(self._program.experts_read)

    def forward(self, plan: StepPlan) -> Logits:
        """See :class:`~gossamer.engine.runner.Runner`. The result is overwritten by the next call."""
        arrays = self._arrays
        if arrays is None or arrays.plan is not plan:
            arrays = self._arrays = StepArrays(plan, self.layout, self.adapters)
            rows, wanted = len(arrays.tokens), len(plan.logit_rows)
            assert rows <= self.max_rows, f"a step of {rows} tokens; the runner was made for {self.max_rows}"
            if len(self._logits) < wanted:
                self._logits = torch.empty(wanted, self.vocab_size)
                self._largest = np.empty(wanted, np.int64)
            self._results = Logits(self._logits[:wanted], self._largest[:wanted])
            self._addresses = self._logits.data_ptr(), self._largest.ctypes.data
        arrays.catch_up()
        step = arrays.input
        step.tables = self._rotary(arrays.last_position + 1)
        step.logits, step.best = self._addresses
        states = self._make_states(plan, step)
        within = self._within_of(plan, arrays)
        if within is None:
            step.attend_exactly()
        self._program.step(step, self.threads)
        for run, (after, kept) in zip(plan.state_runs, states, strict=True):
            run.after, run.kept = after, kept
        if within is not None:
            within.learn()
        return self._results

    def _make_states(self, plan: StepPlan, step: Any) -> list[tuple[State, State | None]]:
        """Room for the states behind the rows of each run, and behind its certain ones, which the step is told of."""
        states = []
        self._states.spare = max(self._states.spare, len(plan.state_runs))
        self._state_runs = np.empty((len(plan.state_runs), 6), np.int64)
        for index, run in enumerate(plan.state_runs):
            before, after, kept = run.before, self._states.take(), self._states.take() if run.drafted else None
            states.append((after, kept))
            addresses = [0 if state is None else state.batch[0].data_ptr() for state in (before, after, kept)]
            self._state_runs[index] = run.rows.start, run.rows.stop, *addresses[:2], run.certain, addresses[2]
        step.state_runs, step.state_run = len(states), self._state_runs.ctypes.data
        return states

    def report(self) -> RunnerReport:
        """See :class:`~gossamer.engine.runner.Runner`; the summaries of the packer and of the tolerance."""
        tolerance = None if self.tolerance is None else self.tolerance.summary()
        return RunnerReport(self._sparse_weights, tolerance)

    def _within_of(self, plan: StepPlan, arrays: StepArrays) -> WithinTolerance | None:
        """What the step attends to within the tolerance, if there is anything."""
        if self.tolerance is None:
            return None
        nodes = self.tolerance.within(plan)
        if all(node is None for node in nodes):
            return None
        self.tolerance.steps += 1
        return WithinTolerance(nodes, self.tolerance, arrays)

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
            self._tables = [table.tables(self._table_length) for table in self.decoder.tables]
            addresses = [[cosine.data_ptr(), sine.data_ptr()] for cosine, sine in self._tables]
            self._table_addresses = np.array(addresses, np.int64)
            self._table_address = self._table_addresses.ctypes.data
        return self._table_address
