"""Runs a model over the packed tokens of one step. The engine knows models only as a :class:`Runner`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gossamer.engine.attention import NoAttention, PlannedStep, ShapeProbe, Step, running
from gossamer.engine.attention_timing import attention_seconds
from gossamer.engine.memory import KVLayout
from gossamer.engine.plan import StepPlan
from gossamer.errors import UnsupportedModelError


class Runner(Protocol):
    """What the engine needs of a model.

    Attributes:
        layout: keys and values of one token.
        num_heads: query heads of a layer.
        max_model_len: positions the model was made for.
        vocab_size: width of the logits.
        largest: of each row of the last logits, the index of the largest, or -1 if there is a NaN or nothing finite;
            ``None`` if the runner leaves that to the sampler.
    """

    name: str
    layout: KVLayout
    num_heads: int
    max_model_len: int
    vocab_size: int
    largest: np.ndarray | None

    def forward(self, plan: StepPlan) -> Tensor:
        """Compute the step: writes keys and values, returns the logits of ``plan.logit_rows``, (rows, vocab)."""
        ...

    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        """Median seconds of one layer's attention in a decoding step, measured here and now; for the cost model.

        Each of ``readers`` sequences attends to ``own`` keys in its slot and, if ``common`` is not 0, all of them to
        one segment of so many keys; merging the two is part of it.
        """
        ...


class TransformersRunner:
    """Any Hugging Face decoder that supports the attention interface, on any device, in one packed call per step."""

    name = "transformers"
    largest: np.ndarray | None = None

    def __init__(self, model: PreTrainedModel, *, without_attention: bool = False) -> None:
        """``model`` must have been loaded with ``attn_implementation="gossamer"``.

        ``without_attention`` leaves attention out, for the benchmark's upper bound: the tokens are meaningless.

        Raises:
            UnsupportedModelError: a layer of the model does not call the attention interface.
        """
        self.model = model
        self.without_attention = without_attention
        config = model.config.get_text_config()
        missing = [n for n in ("num_attention_heads", "max_position_embeddings") if getattr(config, n, None) is None]
        if missing:
            raise UnsupportedModelError(f"the configuration of {type(model).__name__} does not say {missing[0]}")
        self.num_heads: int = config.num_attention_heads
        self.max_model_len: int = config.max_position_embeddings
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.layout = self._probe()

    def _probe(self) -> KVLayout:
        """One token through the model tells what each layer stores: no reading of model-specific configurations."""
        probe = ShapeProbe()
        token = torch.zeros(1, dtype=torch.long, device=self.model.device)
        with torch.inference_mode(), running(probe):
            self._call(token, token, token)
        layers = sorted(probe.shapes)
        expected = self.model.config.get_text_config().num_hidden_layers
        if layers != list(range(expected)):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {expected} layers, but {len(layers)} of them call the attention "
                "interface; layers of other kinds (state space, linear attention, shared caches) are not supported"
            )
        self._check_windows(probe)
        self.attention = [probe.settings[layer] for layer in layers]
        return KVLayout(tuple(probe.shapes[layer] for layer in layers), probe.dtype, self.model.device)

    def _check_windows(self, probe: ShapeProbe) -> None:
        """Some models put a sliding window into the mask only; without a mask it would be lost."""
        config = self.model.config.get_text_config()
        configured = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * len(probe.settings)
        windows = [probe.settings[layer].window for layer in sorted(probe.settings)]
        lost = [i for i, kind in enumerate(kinds) if kind == "sliding_attention" and windows[i] is None]
        if configured is not None and lost:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has a sliding window of {configured} tokens in layer {lost[0]}, but does "
                "not tell its attention function; the window would be ignored"
            )

    def _call(self, tokens: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        logits: Tensor = self.model(
            input_ids=tokens[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=logit_rows,
        ).logits
        return logits[0]

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Tensor:
        step: Step = NoAttention() if self.without_attention else PlannedStep(plan)
        context: AbstractContextManager[None] = running(step)
        with context:
            # A step that only fills the cache needs no logits, but the head cannot be asked for none by every model.
            rows = plan.logit_rows if len(plan.logit_rows) else plan.logit_rows.new_zeros(1)
            logits = self._call(plan.tokens, plan.positions, rows)
        return logits[: len(plan.logit_rows)]

    @torch.inference_mode()
    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        return attention_seconds(self.layout, self.num_heads, readers=readers, own=own, common=common)
