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

Whatever fails on one rank ends all of them: see :mod:`gossamer.runners.ranks`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

import gossamer
from gossamer.engine.plan import Rows, StepPlan
from gossamer.engine.runner import Logits
from gossamer.engine.sampling import Sampled, Sampler, SamplingState
from gossamer.engine.sampling.logprobs import chosen_logprobs
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.models.load import load_config, load_model
from gossamer.models.resolve import resolve_model
from gossamer.options import Options
from gossamer.runners.loading import LoadedModel, weights_of
from gossamer.runners.ranks import Ranks, join
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner

LOADING = timedelta(hours=2)  # that a rank waits for others which still read weights


def check_shards(config: PreTrainedConfig, size: int) -> None:
    """Whether so many ranks can share a model.

    Raises:
        UnsupportedModelError: it has no plan for that, is quantized, keeps recurrent states, or has a number of heads
            that cannot be divided.

    >>> from transformers import LlamaConfig
    >>> check_shards(LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3), 2)
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
        dist.monitored_barrier(timeout=LOADING)
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
