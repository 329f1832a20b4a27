"""Tensor parallel: a model too large for one machine, computed by several processes that each hold a part of it.

Every process (a *rank*) runs the same program: it reads the same requests, and has a scheduler, a prefix tree and a
sampler of its own. transformers shards the weights by the plan that comes with the model: heads of attention and
columns of the feed-forward layers. In each layer the ranks add up what the output projections of both give, so each
rank's keys and values are those of its heads, and a plan of :mod:`gossamer.engine.plan` means the same in all of them.

The ranks must plan the same steps. Therefore

* attention is timed on rank 0 alone, which all cost models are made of;
* rank 0 chooses the tokens, and the others take them over;
* before each step the ranks compare digests of what they are about to compute, and all end if these differ;
* what depends on time in other ways is switched off: drafts, and grammars.

A rank that fails tells the others why, through the store in which torchrun's processes meet, and closes its
connections; one that is killed or stands still is noticed by its connections, or after :data:`TIMEOUT`.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

import gossamer
from gossamer.engine.plan import Rows, StepPlan
from gossamer.engine.runner import Logits, RunnerEndedError
from gossamer.engine.sampling import Sampled, Sampler, SamplingState
from gossamer.engine.sampling.logprobs import chosen_logprobs
from gossamer.errors import ConfigurationError, GossamerError, UnsupportedModelError
from gossamer.models.load import load_config, load_model
from gossamer.models.resolve import resolve_model
from gossamer.options import Options
from gossamer.runners.loading import LoadedModel, weights_of
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner

TIMEOUT = timedelta(seconds=60)  # that a rank waits for the others in a step
LOADING = timedelta(hours=2)  # and while they may still read weights
STORE = timedelta(seconds=5)  # and for what another has said about its end
_FAILURE = "gossamer/failure"  # where the store has the first one


T = TypeVar("T")


class Ranks:
    """The processes that compute one model together, seen from one of them.

    Attributes:
        rank: this one's number.
        size: how many there are.
    """

    def __init__(self, store: dist.Store, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = store
        self._failure = ""

    @property
    def leads(self) -> bool:
        """Whether this is the one that chooses tokens, writes and prints."""
        return self.rank == 0

    def all(self, value: Any) -> list[Any]:
        """What each rank gives, as JSON has it."""
        data = torch.frombuffer(bytearray(json.dumps(value, default=str).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([len(data)]))
        longest = max(int(size) for size in sizes)
        parts = [torch.zeros(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, torch.nn.functional.pad(data, (0, longest - len(data))))
        return [json.loads(part[: int(size)].numpy().tobytes()) for part, size in zip(parts, sizes, strict=True)]

    def first(self, value: Any) -> Any:
        """What rank 0 gives, as JSON has it."""
        return self.all(value if self.leads else None)[0]

    def compare(self, value: Mapping[str, Any], what: str) -> None:
        """Whether all ranks give the same.

        Raises:
            RunnerEndedError: on all of them, if they do not; it names the first difference.
        """
        digest = hashlib.blake2b(json.dumps(value, default=str).encode(), digest_size=8).digest()
        digests = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(digests, torch.from_numpy(np.frombuffer(digest, np.int64).copy()))
        if len({int(each) for each in digests}) > 1:
            raise RunnerEndedError(f"the ranks differ in {what}: {_difference(self.all(value))}")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Whatever fails inside ends all ranks: the others learn why.

        Raises:
            GossamerError: of this rank, as it was raised.
            RunnerEndedError: for anything else, and for what has happened to others.
        """
        if self._failure:
            raise RunnerEndedError(self._failure)
        try:
            yield
        except RunnerEndedError as error:  # which all ranks raise
            self._end(str(error), tell=False)
            raise
        except Exception as error:
            if (lost := _lost(error)) is not None:
                seconds = f"{TIMEOUT.total_seconds():g} seconds"
                reason = self._told() or f"another rank has ended, or did not answer within {seconds} ({lost})"
            else:
                reason = str(error) if isinstance(error, GossamerError) else f"{type(error).__name__}: {error}"
            self._end(reason, tell=lost is None)
            if lost is None and isinstance(error, GossamerError):
                raise
            raise RunnerEndedError(reason) from error

    def _told(self) -> str:
        """What the first rank that failed has said about it; empty if none has, or nobody answers any more."""

        def read() -> str:
            reason = self._store.get(_FAILURE).decode() if self._store.check([_FAILURE]) else ""
            self._store.set(f"{_FAILURE}/{self.rank}", "read")
            return reason

        return _soon(read) or ""

    def _end(self, reason: str, *, tell: bool) -> None:
        if tell:
            _soon(lambda: self._store.compare_set(_FAILURE, "", f"rank {self.rank} has ended: {reason}"))
        self._failure = reason
        dist.destroy_process_group()  # closes the connections, by which the others notice
        if tell:  # the store may end with this process: first they read
            others = [f"{_FAILURE}/{rank}" for rank in range(self.size) if rank != self.rank]
            _soon(lambda: self._store.wait(others, STORE))


def _soon(ask: Callable[[], T]) -> T | None:
    """What a store answers, if it does: its process may be gone, or stand still."""
    answers: list[T] = []

    def run() -> None:
        with suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(STORE.total_seconds())
    return answers[0] if answers else None


def _lost(error: BaseException | None) -> str | None:
    """What a connection to another rank says about its end, if that is what an error comes from."""
    while error is not None:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error).lower()):
            return re.sub(r"^\[\S+\] ", "", str(error)).split(". ")[0]
        error = error.__cause__
    return None


_ranks: Ranks | None = None


def join(size: int) -> Ranks:
    """Meet the other processes that torchrun has started; a second call returns the same.

    Raises:
        ConfigurationError: torchrun has started another number of them, or none; or they could not compute on the CPU.
    """
    global _ranks
    start = f"torchrun --nproc-per-node {size} -m gossamer.cli batch ..."
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ConfigurationError(
            f"tensor_parallel={size} takes {size} processes, and this one was started alone: start them with `{start}`"
        )
    if (world := int(os.environ["WORLD_SIZE"])) != size:
        raise ConfigurationError(
            f"tensor_parallel={size} takes {size} processes, and torchrun has started {world}: give both the same "
            f"number, as in `{start} --tensor-parallel {size}`"
        )
    if (accelerator := torch.accelerator.current_accelerator()) is not None:
        raise ConfigurationError(
            f"tensor_parallel computes on CPUs, and this PyTorch is made for {accelerator.type}, which transformers "
            "would use: install a build of PyTorch for the CPU"
        )
    if _ranks is None:
        if dist.is_initialized():
            raise ConfigurationError("tensor_parallel makes the process group itself: do not call init_process_group")
        store, rank, _ = next(dist.rendezvous("env://", timeout=5 * TIMEOUT))
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
        _ranks = Ranks(store, rank, size)
    return _ranks


def check_shards(config: PreTrainedConfig, size: int) -> None:
    """Whether so many ranks can share a model.

    Raises:
        UnsupportedModelError: it has no plan for that, is quantized, keeps recurrent states, or has a number of heads
            that cannot be divided.

    >>> from transformers import LlamaConfig
    >>> check_shards(LlamaConfig(num_attention_heads=9, num_key_value_heads=3), 2)
    Traceback (most recent call last):
    gossamer.errors.UnsupportedModelError: tensor_parallel=2 does not divide the 9 heads and 3 key-value heads of ...
    """
    name = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__name__
    text = config.get_text_config()
    if getattr(config, "quantization_config", None):
        raise UnsupportedModelError(
            f"tensor_parallel shares weights in floating point, and those of this {name} are quantized; take the "
            "checkpoint that they were made of"
        )
    if not text.base_model_tp_plan:
        raise UnsupportedModelError(f"transformers {transformers.__version__} has no tensor-parallel plan for {name}")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention", "attention"}
    if kinds:
        raise UnsupportedModelError(
            f"tensor_parallel is for layers of attention; {name} has {', '.join(sorted(kinds))}"
        )
    layers = [text.per_layer_config[layer] for layer in range(text.num_hidden_layers)]
    heads = {each.num_attention_heads for each in layers}
    kv_heads = {getattr(each, "num_key_value_heads", None) or each.num_attention_heads for each in layers}
    common = math.gcd(*heads, *kv_heads)
    if common % size:
        both = f"{_any_of(heads)} heads and {_any_of(kv_heads)} key-value heads"
        fit = [number for number in range(2, common + 1) if common % number == 0]
        instead = f"{_any_of(fit)} would" if fit else "no number does"
        raise UnsupportedModelError(f"tensor_parallel={size} does not divide the {both} of {name}; {instead}")


def _any_of(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def load_sharded(
    model: str | Path, options: Options, adapters: Mapping[str, str | Path] | None = None
) -> tuple[LoadedModel, Sampler]:
    """This rank's part of a model, and what chooses its tokens.

    Args:
        model: as :func:`~gossamer.models.resolve.resolve_model` finds it.
        options: what it is loaded with, the same on all ranks.
        adapters: must be empty.

    Raises:
        GossamerError: before any weight is read, what cannot be shared; then what loading raises.
    """
    size = options.model.tensor_parallel
    if adapters:
        raise ConfigurationError("tensor_parallel computes no LoRA adapters: merge the adapter, or leave lora out")
    ranks = join(size)
    with ranks.together():
        path = resolve_model(model, as_file=True)
        if path.is_file():
            raise UnsupportedModelError(f"tensor_parallel reads directories of safetensors, and {path} is a GGUF file")
        config = load_config(path)
        check_shards(config, size)
        versions = {each.__name__: str(each.__version__) for each in (gossamer, torch, transformers)}
        said = {name: value for name, value in config.to_dict().items() if name != "_name_or_path"}
        ranks.compare(versions | said | options.arguments(), "versions, configurations and options")
        network, tokenizer = load_model(path, attn_implementation=IMPLEMENTATION, options=options.model)
        dist.monitored_barrier(timeout=LOADING)  # disks differ
        runner = ShardedRunner(network, ranks)
    return LoadedModel(path, network, tokenizer, runner, "", weights_of(network), ""), SharedSampler(ranks)


class ShardedRunner(TransformersRunner):
    """The runner of transformers, for a model of which each rank has a part."""

    def __init__(self, model: Any, ranks: Ranks) -> None:
        """``model`` must have been loaded with the option ``tensor_parallel``, on all ``ranks``."""
        super().__init__(model)
        self.num_ranks = ranks.size
        self._ranks = ranks
        self._steps = 0

    def forward(self, plan: StepPlan) -> Logits:
        with self._ranks.together():
            self._steps += 1
            self._ranks.compare(_described(plan), f"step {self._steps}")
            return super().forward(plan)

    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        """Rank 0's, for all."""
        with self._ranks.together():
            leads = self._ranks.leads
            seconds = super().attention_seconds(readers=readers, own=own, common=common) if leads else 0.0
            return float(self._ranks.first(seconds))


class SharedSampler(Sampler):
    """Rank 0 chooses; the others are told."""

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def sample(self, logits: Tensor, states: list[SamplingState], largest: np.ndarray | None = None) -> Sampled:
        with self._ranks.together():
            sampled = super().sample(logits, states, largest) if self._ranks.leads else None
            tokens = torch.tensor([0] * len(states) if sampled is None else sampled.token_ids)
            dist.broadcast(tokens, 0)
            if sampled is None:
                ids = tokens.tolist()
                sampled = Sampled(ids, chosen_logprobs(logits, ids, states))
            return sampled


def _described(plan: StepPlan) -> dict[str, list[Any]]:
    """All that decides which keys and values a step reads and writes, and in which order its results come."""
    return {
        "tokens": plan.token_ids,
        "positions": plan.positions.tolist(),
        "rows with logits": plan.logit_rows.tolist(),
        "segments": [[_listed(each.rows), each.start, each.length, each.level] for each in plan.segments],
        "chunks": [[_listed(each.rows), each.offset, each.position, each.level] for each in plan.chunks],
        "groups": [
            [_listed(each.rows), each.slots.tolist(), each.offsets.tolist(), each.longest, each.level]
            for each in plan.groups
        ],
    }


def _listed(rows: Rows) -> list[int]:
    return [rows.start, rows.stop] if isinstance(rows, slice) else rows.tolist()


def _difference(values: list[dict[str, Any]]) -> str:
    """Where the first rank that differs from rank 0 does so first.

    >>> _difference([{"tokens": [1, 2]}, {"tokens": [1, 2]}, {"tokens": [1, 3]}])
    'tokens[1] is 2 in rank 0 and 3 in rank 2'
    """
    rank = next(number for number, value in enumerate(values) if value != values[0])
    ours, others = values[0], values[rank]
    name = next(name for name in [*ours, *others] if ours.get(name) != others.get(name))
    one, other = ours.get(name), others.get(name)
    if isinstance(one, list) and isinstance(other, list):
        if len(one) != len(other):
            name, one, other = f"the number of {name}", len(one), len(other)
        else:
            place = next(place for place, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
            name, one, other = f"{name}[{place}]", one[place], other[place]
    return f"{name} is {one} in rank 0 and {other} in rank {rank}"
