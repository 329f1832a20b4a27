"""Runs any Hugging Face decoder that supports the attention interface, and the hook through which it calls attention.

The hook is registered with transformers' ``AttentionInterface``. It finds the running step in a context variable, so
that nothing depends on a model passing keyword arguments through, and two engines in one process do not meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from gossamer.engine.memory import KVLayout, LayerShape
from gossamer.engine.plan import StepPlan
from gossamer.engine.runner import Logits, RunnerReport
from gossamer.errors import UnsupportedModelError
from gossamer.models.lora import Adapter
from gossamer.nn import Int8Linear, Int8TiedHead
from gossamer.nn.stored_linear import shapes_only
from gossamer.runners.adapters import AddedByAdapters
from gossamer.runners.planned_step import AttentionSettings, PlannedStep, Step
from gossamer.runners.timing import attention_seconds

IMPLEMENTATION = "gossamer"  # the value of attn_implementation

# Arguments that some models pass to every attention function and that change nothing here.
_WITHOUT_EFFECT = frozenset({"position_ids", "use_cache", "cache_position", "dropout"})

_step: ContextVar[Step] = ContextVar("gossamer_step")


@contextmanager
def running(step: Step) -> Iterator[None]:
    """Attention calls inside belong to ``step``."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def _hook(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    unknown = [
        name for name, value in others.items() if not (value is None or value is False or name in _WITHOUT_EFFECT)
    ]
    if attention_mask is not None:
        unknown.append("attention_mask")
    if is_causal is False or not getattr(module, "is_causal", True):
        unknown.append("bidirectional attention")
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} asks its attention for {', '.join(unknown)}, which this engine does not compute"
        )
    layer = module.layer_idx
    assert isinstance(layer, int)
    return _step.get().attend(
        layer, query, key, value, AttentionSettings(scaling, sliding_window, softcap, s_aux)
    ), None


AttentionInterface.register(IMPLEMENTATION, _hook)


@dataclass
class ShapeProbe:
    """Records what each layer stores and asks for, and answers zeros."""

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    settings: dict[int, AttentionSettings] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        if layer in self.shapes:
            raise UnsupportedModelError(f"layer index {layer} attends twice; this engine stores one cache per layer")
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self.settings[layer] = settings
        self.dtype = key.dtype
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


class TransformersRunner:
    """Any Hugging Face decoder that supports the attention interface, on any device, in one packed call per step."""

    name = "transformers"

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter] = ()) -> None:
        """``model`` must have been loaded with ``attn_implementation="gossamer"``; rows may have these ``adapters``.

        Raises:
            UnsupportedModelError: a layer of the model does not call the attention interface.
        """
        self.model = model
        config = model.config.get_text_config()
        missing = [n for n in ("num_attention_heads", "max_position_embeddings") if getattr(config, n, None) is None]
        if missing:
            raise UnsupportedModelError(f"the configuration of {type(model).__name__} does not say {missing[0]}")
        self.num_heads: int = config.num_attention_heads
        self.max_model_len: int = config.max_position_embeddings
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.layout = self._probe()
        self.adapters = tuple(adapter.name for adapter in adapters)
        self.shared_outliers = _shared_outliers(model)
        self._added = AddedByAdapters(model, adapters)

    def _probe(self) -> KVLayout:
        """One token through the model tells what each layer stores: no reading of model-specific configurations."""
        probe = ShapeProbe()
        token = torch.zeros(1, dtype=torch.long, device=self.model.device)
        with torch.inference_mode(), shapes_only(), running(probe):
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
    def forward(self, plan: StepPlan) -> Logits:
        with running(self.step_of(plan)), self._added.to(plan.adapters):
            # A step that only fills the cache needs no logits, but the head cannot be asked for none by every model.
            rows = plan.logit_rows if len(plan.logit_rows) else plan.logit_rows.new_zeros(1)
            logits = self._call(plan.tokens, plan.positions, rows)
        return Logits(logits[: len(plan.logit_rows)])

    def step_of(self, plan: StepPlan) -> Step:
        """What computes the attention of a step."""
        return PlannedStep(plan)

    def report(self) -> RunnerReport:
        return RunnerReport()

    @torch.inference_mode()
    def attention_seconds(self, *, readers: int, own: int, common: int) -> float:
        return attention_seconds(self.layout, self.num_heads, readers=readers, own=own, common=common)


def _shared_outliers(model: torch.nn.Module) -> str:
    """The name of an int8 layer that looks for outliers in all rows of a step together; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear | Int8TiedHead) and module.decomposition.outliers == "batch":
            return name
    return ""
