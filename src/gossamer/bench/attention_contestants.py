"""What ``gossamer bench attention`` compares: ways to attend to a prefix that many sequences share, layer by layer.

All of them read the same keys and values. A contestant walks through all layers as a step of decoding does, so that a
layer's keys and values have left the caches when it is back at the first.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from gossamer.engine.large_pages import zeros
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import instruction_set
from gossamer.native.recorder import Recorder, Rotary, step_input
from gossamer.native.weights import pack_embedding, pack_linear
from gossamer.ops.attention import attend_prefix


@dataclass(frozen=True)
class Problem:
    """One shape, and its numbers.

    Attributes:
        query: (B, Hq, D) bf16: one token of each of B sequences; the same in all layers.
        keys, values: of each layer, (Hkv, n, D) bf16.
    """

    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]

    @property
    def scale(self) -> float:
        return float(self.query.shape[-1] ** -0.5)


def random_problem(sequences: int, keys: int, dim: int, kv_heads: int, group: int, layers: int) -> Problem:
    """Normal numbers; keys and values of all layers stand in large pages, as the engine's do."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(kv_heads, keys, dim)] * (2 * layers)
    tensors = [t.normal_(generator=generator) for t in zeros(shapes, torch.bfloat16, torch.device("cpu"))]
    query = torch.randn(sequences, kv_heads * group, dim, generator=generator).bfloat16()
    return Problem(query, tensors[:layers], tensors[layers:])


class Contestant(ABC):
    """A way to attend, made for one problem."""

    name: str

    @abstractmethod
    def __init__(self, problem: Problem) -> None: ...

    @abstractmethod
    def walk(self) -> tuple[float, Tensor]:
        """Attends in every layer. Returns the seconds that took, and the last layer's result (B, Hq, D)."""


class Native(Contestant):
    """The compiled kernels, in a program with the ops that a decoder of these layers has around its attention.

    A task of the kernels has at most 96 rows and runs on one thread: what a shape takes depends on how the program
    divides it. So it is a program that is timed, through the profile it keeps: its ops ``attention`` (all layers), and
    ``merge``, which makes one normalized result of what the tasks left, as other contestants return it. The ops between
    them (the rotation of queries, by no angle here; a product with what was attended, of one column) are not counted.
    """

    name = "gossamer"

    def __init__(self, problem: Problem) -> None:
        isa = instruction_set()
        if isa is None:
            raise ConfigurationError("the native kernels are not installed, or switched off")
        batch, heads, dim = problem.query.shape
        kv_heads, length, _ = problem.keys[0].shape
        layers, width = len(problem.keys), heads * dim
        recorder = Recorder(isa, heads=heads, layers=[(kv_heads, dim)] * layers, kv="bfloat16", max_rows=batch)
        # token i is sequence i: its "embedding" is its query, and a key and value of its own, which nobody reads
        table = torch.zeros(batch, width + 2 * kv_heads * dim)
        table[:, :width] = problem.query.reshape(batch, width)
        qkv = recorder.embed(pack_embedding(torch.nn.Embedding.from_pretrained(table), isa, "float32"), into="qkv")
        narrow = pack_linear([_linear(torch.ones(1, width))], isa, "float32")
        same = pack_linear([_linear(torch.eye(width))], isa, "float32")  # the last layer's result, as logits
        for layer in range(layers):
            attended = recorder.attention(qkv, layer, table=(0, dim), scale=problem.scale, window=None)
            if layer + 1 < layers:
                recorder.linear(attended, narrow, into="narrow")
        recorder.logits(attended, same)
        self._program = recorder.native

        own = torch.zeros(2, kv_heads, batch, dim, dtype=torch.bfloat16)
        own_addresses = [own[0].data_ptr()] * layers + [own[1].data_ptr()] * layers
        rotary = Rotary(torch.zeros(dim // 2), 1.0).tables(length + 1)
        addresses = [t.data_ptr() for t in (*problem.keys, *problem.values)]
        tokens = np.arange(batch)
        # all rows stand right behind the prefix, and attend to it alone; see StepInput in csrc/runtime/program.h
        arrays = {
            "tokens": tokens,
            "positions": np.full(batch, length),
            "place": np.stack([tokens * 0 + 1, tokens * 0, tokens], axis=1),  # a row's own key goes to target 1
            "target": np.array([[*addresses, length], [*own_addresses, batch]]),
            "item": np.array([[0, 0, 0, length, 0, 0, batch]]),  # one: the prefix, for all rows
            "item_rows": tokens.astype(np.int32),
            "logit_row": tokens,
            "tables": np.array([[table.data_ptr() for table in rotary]]),
        }
        self._out = torch.empty(batch, width)
        fields = {name: array.ctypes.data for name, array in arrays.items()}
        self._step = step_input(rows=batch, items=1, logit_rows=batch, logits=self._out.data_ptr(), **fields)
        self._alive = problem, arrays, own, rotary
        self._shape = problem.query.shape

    def walk(self) -> tuple[float, Tensor]:
        self._program.step(self._step, torch.get_num_threads())
        profile = self._program.profile()
        return profile["attention"] + profile["merge"], self._out.view(self._shape)


def _linear(weight: Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


class _OnTorch(Contestant):
    """One call per layer, timed with what Python needs to make it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    @abstractmethod
    def _attend(self, key: Tensor, value: Tensor) -> Tensor:
        """(B, Hq, D)."""

    def walk(self) -> tuple[float, Tensor]:
        start = time.perf_counter()
        for key, value in zip(self._problem.keys, self._problem.values, strict=True):
            out = self._attend(key, value)
        return time.perf_counter() - start, out


class Reference(_OnTorch):
    """:func:`~gossamer.ops.attention.attend_prefix`, which the engine uses where it runs on PyTorch."""

    name = "gossamer-torch"

    def _attend(self, key: Tensor, value: Tensor) -> Tensor:
        return attend_prefix(self._problem.query[:, :, None], key, value, scale=self._problem.scale).out[:, :, 0]


class TorchAttention(_OnTorch):
    """PyTorch's own attention in bf16. Sequences and the heads of a group are folded into rows, so that keys are read
    once; with one batch entry per sequence it would read them once for each.
    """

    name = "torch-sdpa"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        batch, heads, dim = problem.query.shape
        kv_heads = len(problem.keys[0])
        rows = problem.query.view(batch, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        self._rows = rows.reshape(1, kv_heads, -1, dim)

    def _attend(self, key: Tensor, value: Tensor) -> Tensor:
        out = scaled_dot_product_attention(self._rows, key[None], value[None], scale=self._problem.scale)
        batch, heads, dim = self._problem.query.shape
        return out.view(len(key), batch, -1, dim).transpose(0, 1).reshape(batch, heads, dim)


CONTESTANTS: tuple[type[Contestant], ...] = (Native, Reference, TorchAttention)
