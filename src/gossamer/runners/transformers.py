"""Runs any Hugging Face decoder that supports the attention interface, and the hook through which it calls attention.

The hook is registered with transformers' ``AttentionInterface``. It finds the running step in a context variable, so
that nothing depends on a model passing keyword arguments through, and two engines in one process do not meet.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel

from gossamer.engine.memory import KVLayout, LayerShape
from gossamer.engine.plan import StateRun, StepPlan
from gossamer.engine.runner import Logits, RunnerReport
from gossamer.engine.tree import Node
from gossamer.errors import UnsupportedModelError
from gossamer.models.lora import Adapter
from gossamer.models.support import LAYERS_WITHOUT_MEMORY
from gossamer.nn import Int8Linear, Int8TiedHead
from gossamer.nn.stored_linear import shapes_only
from gossamer.runners.adapters import AddedByAdapters
from gossamer.runners.planned_step import AttentionSettings, PlannedStep, Step
from gossamer.runners.recurrent import RecurrentLayers
from gossamer.runners.timing import attention_seconds

WITHOUT_POSITIONS = 1 << 20  # tokens of a text, where nothing of a model limits them
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
    """Records what each call stores and asks for, and answers zeros. A module that layers share has no index."""

    layers: list[int] = field(default_factory=list)
    shapes: list[LayerShape] = field(default_factory=list)
    settings: list[AttentionSettings] = field(default_factory=list)
    num_heads: list[int] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, settings: AttentionSettings) -> Tensor:
        if layer >= 0 and layer in self.layers:
            raise UnsupportedModelError(f"layer index {layer} attends twice; this engine stores one cache per layer")
        self.layers.append(layer)
        self.shapes.append(LayerShape(key.shape[1], key.shape[3], value.shape[3]))
        self.settings.append(settings)
        self.num_heads.append(query.shape[1])
        self.dtype = key.dtype
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


class TransformersRunner:
    """Any Hugging Face decoder that supports the attention interface, on any device, in one packed call per step."""

    name = "transformers"
    in_turn = False
    num_ranks = 1

    def __init__(self, model: PreTrainedModel, adapters: Sequence[Adapter] = ()) -> None:
        """``model`` must have been loaded with ``attn_implementation="gossamer"``; rows may have these ``adapters``.

        Raises:
            UnsupportedModelError: a layer of the model does not call the attention interface.
        """
        self.model = model
        config = model.config.get_text_config()
        self._recurrent = RecurrentLayers(model)
        self._arguments = _accepted(model, "position_ids", "logits_to_keep")
        self.vocab_size: int = model.get_output_embeddings().weight.shape[0]
        self.layout = self._probe()
        missing = [n for n in ("num_attention_heads", "max_position_embeddings") if getattr(config, n, None) is None]
        if missing and self.layout.layers:
            raise UnsupportedModelError(f"the configuration of {type(model).__name__} does not say {missing[0]}")
        self.max_model_len: int = getattr(config, "max_position_embeddings", None) or WITHOUT_POSITIONS
        self.adapters = tuple(adapter.name for adapter in adapters)
        self.shared_outliers = _shared_outliers(model)
        if adapters and self._recurrent.places:
            raise UnsupportedModelError(f"{type(model).__name__} has recurrent layers, for which there are no adapters")
        self._added = AddedByAdapters(model, adapters)

    def _probe(self) -> KVLayout:
        """One token through the model tells what each layer stores: no reading of model-specific configurations."""
        probe = ShapeProbe()
        token = torch.zeros(1, dtype=torch.long, device=self.model.device)
        run = StateRun(slice(0, 1), Node([0], None), 0, 1)
        with torch.inference_mode(), shapes_only(), running(probe), self._recurrent.running([run]):
            try:
                self._call(token, token, token)
            except (RuntimeError, ValueError, IndexError) as error:  # such as a number of experts that is not there
                raise UnsupportedModelError(f"{type(self.model).__name__} does not compute a token: {error}") from error
        layers = [layer for layer in probe.layers if layer >= 0]
        config = self.model.config.get_text_config()
        expected, kinds = config.num_hidden_layers, getattr(config, "layer_types", None) or ()
        without = [place for place, kind in enumerate(kinds) if kind in LAYERS_WITHOUT_MEMORY]
        if sorted({*layers, *self._recurrent.places, *without}) != list(range(expected)):
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has {expected} layers, but {len(layers)} of them call the attention "
                "interface; layers of other kinds (shared caches, states of their own) are not supported"
            )
        self._check_windows(probe)
        self.attention = probe.settings
        self.num_heads = probe.num_heads[0] if probe.num_heads else 0
        states = 0 if run.after is None else sum(tensor.nbytes for tensor in run.after.batch)
        return KVLayout(tuple(probe.shapes), probe.dtype, self.model.device, states)

    def _check_windows(self, probe: ShapeProbe) -> None:
        """Some models put a sliding window into the mask only; without a mask it would be lost."""
        config = self.model.config.get_text_config()
        configured = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
        kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
        windows = {layer: settings.window for layer, settings in zip(probe.layers, probe.settings, strict=True)}
        lost = [i for i, kind in enumerate(kinds) if kind == "sliding_attention" and windows.get(i, 0) is None]
        if configured is not None and lost:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} has a sliding window of {configured} tokens in layer {lost[0]}, but does "
                "not tell its attention function; the window would be ignored"
            )

    def _call(self, tokens: Tensor, positions: Tensor, logit_rows: Tensor) -> Tensor:
        arguments = {"position_ids": positions[None], "logits_to_keep": logit_rows}
        given = {name: arguments[name] for name in self._arguments}
        logits: Tensor = self.model(input_ids=tokens[None], use_cache=False, **given).logits[0]
        return logits if "logits_to_keep" in given else logits[logit_rows]

    @torch.inference_mode()
    def forward(self, plan: StepPlan) -> Logits:
        step = running(self.step_of(plan))
        with step, self._recurrent.running(plan.state_runs), self._added.to(plan.adapters):
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


def _accepted(model: PreTrainedModel, *names: str) -> list[str]:
    """Those of some arguments that a model takes."""
    parameters = inspect.signature(type(model).forward).parameters
    return [name for name in names if name in parameters]


def _shared_outliers(model: torch.nn.Module) -> str:
    """The name of an int8 layer that looks for outliers in all rows of a step together; empty if there is none."""
    for name, module in model.named_modules():
        if isinstance(module, Int8Linear | Int8TiedHead) and module.decomposition.outliers == "batch":
            return name
    return ""
