"""Recurrent layers of a model of transformers, called for the texts of a step one by one.

The rows of a step are those of many texts, packed. Attention takes them as they are; a short convolution, a linear
attention or a state space model would run from one text into the next. So its layers are called with the rows of each
text as a batch entry, and with a cache of transformers that holds the text's state.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin, LinearAttentionLayer

from gossamer.engine.plan import StateRun
from gossamer.engine.states import State
from gossamer.errors import UnsupportedModelError

_CACHE_ARGUMENTS = ("cache_params", "past_key_values")
_DESCRIBED_BY_ROWS = frozenset(
    {"position_ids", "position_embeddings", "cache_position", "attention_mask", "seq_idx", *_CACHE_ARGUMENTS}
)

_TRIED = 6  # tokens

_step: ContextVar[_Batches] = ContextVar("gossamer_states")


class RecurrentLayers:
    """The recurrent layers of a model, which it calls through this from now on.

    Args:
        model: whose layers they are; one without any is left as it is.

    Attributes:
        places: their indices among the layers.

    Raises:
        UnsupportedModelError: a layer keeps a state, but not where transformers' caches have it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._states = _numbers_of_states(model)
        self.places = tuple(self._states)
        found: set[int] = set()
        for module in model.modules():
            if (name := _cache_argument(module)) is not None:
                if module.layer_idx not in self._states:
                    raise UnsupportedModelError(
                        f"layer {module.layer_idx} of {type(model).__name__} keeps a state without a place in its cache"
                    )
                found.add(module.layer_idx)
                layer = _Layer(module, name, self._states[module.layer_idx])
                module.forward = layer.by_text
        if missing := [place for place in self.places if place not in found]:
            raise UnsupportedModelError(
                f"layer {missing[0]} of {type(model).__name__} keeps a state in a way that this engine does not know"
            )

    @contextmanager
    def running(self, runs: list[StateRun]) -> Iterator[None]:
        """Calls inside belong to a step with these runs; each has its ``after`` when all layers have been called."""
        if not self.places:
            yield
            return
        batches = _Batches(runs, self._states)
        token = _step.set(batches)
        try:
            yield
        finally:
            _step.reset(token)
        batches.finish()


class _Batches:
    """The runs of a step, those of one length together."""

    def __init__(self, runs: list[StateRun], states: dict[int, int]) -> None:
        groups: dict[tuple[int, bool], list[StateRun]] = {}
        for run in runs:
            groups.setdefault((run.rows.stop - run.rows.start, run.before is not None), []).append(run)
        self.all = [_Batch(group, states) for group in groups.values()]

    def finish(self) -> None:
        for batch in self.all:
            batch.finish()


class _Batch:
    """Runs of one length, all of which go on from a state, or begin a text."""

    def __init__(self, runs: list[StateRun], states: dict[int, int]) -> None:
        self.runs = runs
        first = runs[0].rows
        self.length = first.stop - first.start
        together = all(run.rows.start == first.start + i * self.length for i, run in enumerate(runs))
        rows = torch.cat([torch.arange(run.rows.start, run.rows.stop) for run in runs])
        self.rows = slice(first.start, first.start + len(rows)) if together else rows
        self.cache = _cache(states)
        before = [run.before for run in runs]
        if before[0] is not None:
            self._fill(_stacked([state for state in before if state is not None]))

    def _fill(self, tensors: list[Tensor]) -> None:
        """Put what :meth:`finish` has taken out of a cache back into this one."""
        remaining = iter(tensors)
        for layer in self.cache.layers:
            for index in range(layer.number_of_states):
                conv, recurrent = next(remaining), next(remaining)
                if conv.numel():
                    layer.lazy_initialization(conv_states=conv, state_idx=index)
                    layer.conv_states[index] = conv
                if recurrent.numel():
                    layer.lazy_initialization(recurrent_states=recurrent, state_idx=index)
                    layer.recurrent_states[index] = recurrent
                layer.has_previous_state[index] = True

    def finish(self) -> None:
        tensors = []
        for layer in self.cache.layers:
            for index in range(layer.number_of_states):
                for held in (layer.conv_states[index], layer.recurrent_states[index]):
                    tensors.append(torch.empty(len(self.runs), 0) if held is None else held)
        for index, run in enumerate(self.runs):
            run.after = State(tensors, index)


def _stacked(states: list[State]) -> list[Tensor]:
    """The states' tensors, (states, ...), to be changed."""
    batch = states[0].batch
    whole = len(batch[0]) == len(states)
    if whole and all(state.batch is batch and state.index == i for i, state in enumerate(states)):
        return [tensor.clone() for tensor in batch]
    return [torch.stack(rows) for rows in zip(*(state.tensors() for state in states), strict=True)]


class _Layer:
    """A recurrent layer of a model, which takes its cache as the argument ``cache_name``."""

    def __init__(self, module: Any, cache_name: str, states: int) -> None:
        self._forward = type(module).forward.__get__(module)
        self._cache_name, self._place = cache_name, module.layer_idx
        self._continues: bool | None = None  # see _goes_on(); known once it is tried
        self._states = states

    def by_text(self, hidden_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        """``forward``, (1, T, H) -> (1, T, H), for the rows of each text."""
        if arguments or keywords.get("attention_mask") is not None:
            raise UnsupportedModelError(f"the recurrent layer {self._place} has a mask, or arguments without names")
        given = {name: value for name, value in keywords.items() if name not in _DESCRIBED_BY_ROWS}
        out: Tensor | None = None
        for batch in _step.get().all:
            rows = hidden_states[0, batch.rows].view(len(batch.runs), batch.length, -1)
            values = self._call(rows, batch.cache, given)
            if out is None:
                out = values.new_empty(1, hidden_states.shape[1], values.shape[-1])
            out[0, batch.rows] = values.reshape(-1, values.shape[-1])
        return out

    def _call(self, rows: Tensor, cache: Cache, given: dict[str, Any]) -> Tensor:
        if rows.shape[1] > 1 and cache.has_previous_state(self._place) and not self._goes_on(rows, given):
            return torch.cat([self._run(token, cache, given) for token in rows.split(1, dim=1)], dim=1)
        return self._run(rows, cache, given)

    def _run(self, rows: Tensor, cache: Cache, given: dict[str, Any]) -> Tensor:
        result: Tensor = self._forward(rows, **{self._cache_name: cache}, **given)
        if not isinstance(result, Tensor):
            raise UnsupportedModelError(f"the recurrent layer {self._place} returns more than its values")
        return result

    def _goes_on(self, like: Tensor, given: dict[str, Any]) -> bool:
        """Whether several tokens at once go on from a state; some layers of transformers begin anew with them."""
        if self._continues is None:
            self._continues = self._try(like, given)
        return self._continues

    def _try(self, like: Tensor, given: dict[str, Any]) -> bool:
        texts = torch.randn(1, _TRIED, like.shape[-1], generator=torch.Generator().manual_seed(0)).to(like)
        first, last = texts.split([_TRIED // 2, _TRIED - _TRIED // 2], dim=1)

        def behind(added: float) -> list[Tensor]:
            """What comes of the last tokens, with so much added to the states behind the first ones."""
            cache = self._new_cache()
            self._run(first, cache, given)
            states = cache.layers[self._place].recurrent_states
            for state in states.values():
                if state is not None:
                    state += added
            return [self._run(last, cache, given), *(state for state in states.values() if state is not None)]

        without, *ours = behind(0.0)
        if not ours:  # nothing but short convolutions, whose inputs transformers puts in front in any case
            return True
        return not all(map(torch.equal, [without, *ours], behind(1e3)))

    def _new_cache(self) -> Cache:
        return _cache({self._place: self._states})


def _cache(states: dict[int, int]) -> Cache:
    """A cache of the recurrent layers at these places, with so many states each."""
    return Cache(layers=[LinearAttentionLayer(states.get(place, 0)) for place in range(max(states) + 1)])


def _numbers_of_states(model: PreTrainedModel) -> dict[int, int]:
    """How many states each recurrent layer has, by its place."""
    layers = DynamicCache(config=model.config.get_text_config()).layers
    return {
        place: layer.number_of_states
        for place, layer in enumerate(layers)
        if isinstance(layer, LinearAttentionCacheLayerMixin)
    }


def _cache_argument(module: nn.Module) -> str | None:
    """The name under which a recurrent layer takes its cache; ``None`` for any other module."""
    if not isinstance(getattr(module, "layer_idx", None), int):
        return None
    function = inspect.unwrap(type(module).forward)
    if (
        "update_conv_state" not in function.__code__.co_names
        and "update_recurrent_state" not in function.__code__.co_names
    ):
        return None
    names = inspect.signature(function).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in names), None)
