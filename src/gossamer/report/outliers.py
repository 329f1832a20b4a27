"""Emergent outlier features of a language model, as LLM.int8() defines them (arXiv 2208.07339, section 4.1).

The paper: a feature is a dimension of the hidden states with a magnitude of at least 6, in at least 25 % of the layers
and at least 6 % of the sequence positions. It leaves room, which is filled here as follows.

- Hidden states are the inputs of linear layers: of the attention projections, of the attention's output projection and
  of the feed-forward expansion. Those as wide as the residual stream are examined together, by number of dimension, as
  in the paper (although the output projection's input is a concatenation of heads). An output projection with another
  width is examined by itself. So is the input of the feed-forward contraction, which the paper left out.
- A layer is affected in a dimension if at least one value of at least one of its hidden states reaches the magnitude.
- A position is affected in a dimension if the value of at least one hidden state, of any layer, reaches the magnitude
  there. (The paper counts 150k outlier values at 2048 positions of a 32-layer model with 6 features and 75 % of the
  positions affected. If that were 75 % of all pairs of layer and position, there would be at least 295k.)
- A feature is one-sided if all its outlier values have the same sign.

Nothing is stored per token. Quartiles come from histograms with bins 2 % wide, so they are right to about 1 %.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from gossamer.errors import ConfigurationError, GossamerError
from gossamer.report.token_ids import check_tokens

RESIDUAL = "residual width"
CONTRACTION = "feed-forward contraction"

CHUNK = 1 << 22  # values that are looked at together: 16 MB in fp32
PROBE = 8  # tokens that are enough to see which layers are called with which tensor
BIN_WIDTH = math.log(1.02)
BINS = 512  # per sign: up to 25,000 times the magnitude; what is larger counts in the last one


@dataclass(frozen=True)
class LinearInput:
    """An input that one or several linear layers share.

    Attributes:
        label: names of the linear layers within their transformer layer, such as ``mlp.gate_proj/up_proj``.
        modules: their paths in the model, in order of call.
        layer: number of the transformer layer; ``None`` outside of one, for the output head.
        width: dimensions of the input.
        group: what it is examined together with: :data:`RESIDUAL`, :data:`CONTRACTION`, or, with the width of neither,
            the inputs with its own label. ``None`` if it is no hidden state of a layer, or of some tokens only.
    """

    label: str
    modules: tuple[str, ...]
    layer: int | None
    width: int
    group: str | None


@dataclass(frozen=True)
class InputStatistics(LinearInput):
    """What was seen at one input.

    Attributes:
        dimensions: how many dimensions have an outlier.
        tokens: share of tokens with an outlier.
        values: share of values that are outliers.
        largest: largest magnitude.
        mean: mean magnitude, of all values.
        top_dimension: the dimension with outliers at most tokens; without outliers, that of the largest magnitude.
        top_tokens: share of tokens with an outlier there.
    """

    dimensions: int
    tokens: float
    values: float
    largest: float
    mean: float
    top_dimension: int
    top_tokens: float


@dataclass(frozen=True)
class Feature:
    """One dimension, over all inputs of a group.

    Attributes:
        layers: share of layers that are affected.
        tokens: share of positions that are affected.
        values: share of its values that are outliers.
        quartiles: of its outlier values, with their sign.
        positive: share of its outlier values that are positive.
        one_sided: all its outlier values have the same sign.
    """

    dimension: int
    layers: float
    tokens: float
    values: float
    quartiles: tuple[float, float, float]
    positive: float
    one_sided: bool


@dataclass(frozen=True)
class FeatureGroup:
    """Inputs that are examined together.

    Attributes:
        name: :data:`RESIDUAL`, :data:`CONTRACTION`, or the label of the inputs.
        width: their dimensions.
        labels: of the inputs.
        features: the dimensions that meet the criterion, those that affect most positions first.
        nearest: if there are none, the dimension that affects most positions; ``None`` if there is no outlier at all.
    """

    name: str
    width: int
    labels: tuple[str, ...]
    features: tuple[Feature, ...]
    nearest: Feature | None


@dataclass(frozen=True)
class OutlierReport:
    """What :func:`find_outliers` found.

    Attributes:
        magnitude, layers, tokens: the criterion.
        num_layers: layers of the model.
        positions: tokens that were seen.
        inputs: statistics per layer and input, in order of call.
        groups: features per group of inputs.
        unseen: linear layers whose input did not show: text does not reach them, or they are inside packed experts.
    """

    magnitude: float
    layers: float
    tokens: float
    num_layers: int
    positions: int
    inputs: tuple[InputStatistics, ...]
    groups: tuple[FeatureGroup, ...]
    unseen: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@torch.inference_mode()
def find_outliers(
    model: Any,
    batches: Iterable[Tensor],
    magnitude: float = 6.0,
    layers: float = 0.25,
    tokens: float = 0.06,
    *,
    progress: Callable[[int], None] | None = None,
) -> OutlierReport:
    """Finds the outlier features of a model on a text; the module's docstring says what counts as one.

    Args:
        model: a transformers causal language model in evaluation mode, quantized by Gossamer or not.
        batches: token ids, each (T,) or (B, T), without padding: every position counts. May be a generator.
        magnitude: smallest magnitude of an outlier.
        layers: smallest share of layers that a feature affects.
        tokens: smallest share of sequence positions that a feature affects.
        progress: called after each batch with the number of batches done.

    Raises:
        ConfigurationError: an argument is out of its range, there is no batch, or the model cannot take one.
        GossamerError: the model computes values that are not finite.
    """
    if not 0 < magnitude < math.inf:
        raise ConfigurationError(f"magnitude must be a positive number, got {magnitude}")
    if not (0 <= layers <= 1 and 0 <= tokens <= 1):
        raise ConfigurationError(f"layers and tokens are shares from 0 to 1, got {layers} and {tokens}")
    inputs = [_InputCounts(each, magnitude, model.device) for each in linear_inputs(model)]
    groups = _group_counts(inputs)
    positions = 0
    with ExitStack() as hooks:
        for counts in inputs:
            module = model.get_submodule(counts.input.modules[0])
            hooks.enter_context(module.register_forward_pre_hook(counts.observe))
        for number, ids in enumerate(batches):
            check_tokens(ids, model, f"batch {number}", dimensions=(1, 2))
            run(model, ids)
            positions += ids.numel()
            for group in groups:
                group.end_batch()
            if progress is not None:
                progress(number + 1)
    if not positions:
        raise ConfigurationError("there is no text to look at; give at least one batch of tokens")
    num_layers = int(model.config.get_text_config(decoder=True).num_hidden_layers)
    return OutlierReport(
        magnitude,
        layers,
        tokens,
        num_layers,
        positions,
        inputs=tuple(counts.statistics() for counts in inputs),
        groups=tuple(group.examine(num_layers, positions, layers, tokens) for group in groups),
        unseen=_unseen(model, {module for counts in inputs for module in counts.input.modules}),
    )


# --- which layers get which input ------------------------------------------------------------------------------------


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, GPT-2's ``Conv1D``, or an int8 layer of Gossamer's. A subclass may be anything, a router even."""
    int8 = hasattr(module, "in_features") and getattr(getattr(module, "weight", None), "dtype", None) == torch.int8
    return type(module) in (nn.Linear, Conv1D) or int8


def is_packed_experts(module: nn.Module) -> bool:
    """Experts with their weights stacked in one parameter, as transformers keeps them; inside are no linear layers."""
    return any(parameter.dim() == 3 for parameter in module.parameters(recurse=False))


def attention_block(module: str) -> str | None:
    """The path of the attention block that a linear layer belongs to, or ``None``.

    >>> attention_block("model.layers.0.self_attn.q_proj")
    'model.layers.0.self_attn'
    """
    parent = module.rpartition(".")[0]
    return parent if re.search("attn|attention", _place(module)[1]) else None


def _place(module: str) -> tuple[int | None, str]:
    """The number of the transformer layer that a path leads into, and the path within it."""
    found = re.search(r"(?:^|\.)(\d+)\.(.*)", module)
    return (int(found[1]), found[2]) if found else (None, module)


def _label(modules: list[str]) -> str:
    paths = [_place(module)[1].rpartition(".") for module in modules]
    siblings = groupby(paths, key=lambda path: path[:2])
    return "/".join("".join(parent) + "/".join(name for *_, name in group) for parent, group in siblings)


def run(model: Any, ids: Tensor) -> None:
    """One forward pass over token ids, (T,) or (B, T), for what hooks see of it."""
    # Of the logits, which nobody reads here, one position is enough.
    with model.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0][..., -1:, :],)):
        model(input_ids=ids.reshape(-1, ids.shape[-1]).to(model.device), use_cache=False)


@torch.inference_mode()
def linear_inputs(model: Any) -> list[LinearInput]:
    """Which inputs the linear layers of a model have, found by running it on a few tokens."""
    hidden_size = model.config.get_text_config(decoder=True).hidden_size
    calls: dict[tuple[int | None, int, int, int], tuple[Tensor, list[str]]] = {}
    contracting: set[str] = set()  # modules that give back what is as wide as the residual stream

    def record(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Any) -> None:
        x = args[0]
        # The tensor is kept, so that no other one can come to lie at the same address.
        _, modules = calls.setdefault((_place(name)[0], x.data_ptr(), x.numel(), x.shape[-1]), (x, []))
        modules.append(name)
        if is_linear(module) and output.shape[-1] == hidden_size:
            contracting.add(name)

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            if is_linear(module) or is_packed_experts(module):
                hooks.enter_context(module.register_forward_hook(partial(record, name)))
        run(model, torch.zeros(PROBE, dtype=torch.int64))
    below: dict[str, list[list[str]]] = defaultdict(list)  # the calls of each block's linear layers, in order
    for _, modules in calls.values():
        for block in {module.rpartition(".")[0] for module in modules if attention_block(module) is None}:
            below[block].append(modules)
    last = {module for block in below.values() if len(block) > 1 for module in block[-1]} & contracting
    inputs = []
    for x, modules in calls.values():
        layer, width, label = _place(modules[0])[0], x.shape[-1], _label(modules)
        if layer is None or x.numel() != PROBE * width:
            group = None  # the output head, or an expert that sees only the tokens that are routed to it
        elif not last.isdisjoint(modules):
            group = CONTRACTION
        else:
            group = RESIDUAL if width == hidden_size else label
        inputs.append(LinearInput(label, tuple(modules), layer, width, group))
    return inputs


def _unseen(model: Any, seen: set[str]) -> tuple[str, ...]:
    never = [name for name, module in model.named_modules() if is_linear(module) and name not in seen]
    inside = [f"{name} (inside)" for name, module in model.named_modules() if is_packed_experts(module)]
    return (*never, *inside)


# --- what is counted -------------------------------------------------------------------------------------------------


class _InputCounts:
    """Of one input, over all batches."""

    def __init__(self, source: LinearInput, magnitude: float, device: torch.device) -> None:
        self.input, self.magnitude = source, magnitude
        self.group: _GroupCounts | None = None
        self.rows = 0
        self.tokens = 0  # with an outlier
        self.outliers = torch.zeros(source.width, dtype=torch.int64, device=device)
        self.largest = torch.zeros(source.width, device=device)
        self.total = 0.0  # of magnitudes

    def observe(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        """A forward pre-hook of the first layer that gets the input."""
        x = args[0].reshape(-1, self.input.width)
        step = max(1, CHUNK // self.input.width)
        for rows in (slice(start, start + step) for start in range(0, len(x), step)):
            block = x[rows].float()
            magnitudes = block.abs()
            outliers = magnitudes >= self.magnitude
            self.rows += len(block)
            self.tokens += int(outliers.any(1).sum())
            self.outliers += outliers.sum(0)
            self.largest = torch.maximum(self.largest, magnitudes.amax(0))
            self.total += float(magnitudes.sum(dtype=torch.float64))
            if self.group is not None:
                self.group.add(block, outliers, rows, len(x))
        if not self.largest.isfinite().all():
            raise GossamerError(f"the input of {self.input.modules[0]} is not finite; another dtype may help")

    def statistics(self) -> InputStatistics:
        count = int(self.outliers.sum())
        top = int((self.outliers if count else self.largest).argmax())
        rows = max(1, self.rows)  # an expert may have seen no token
        return InputStatistics(
            **vars(self.input),
            dimensions=int(self.outliers.count_nonzero()),
            tokens=self.tokens / rows,
            values=count / (rows * self.input.width),
            largest=float(self.largest.max()),
            mean=self.total / (rows * self.input.width),
            top_dimension=top,
            top_tokens=int(self.outliers[top]) / rows,
        )


class _GroupCounts:
    """Of the dimensions of a group, over all its inputs and all batches."""

    def __init__(self, inputs: list[_InputCounts]) -> None:
        self.inputs, self.width, self.magnitude = inputs, inputs[0].input.width, inputs[0].magnitude
        self.positions = torch.zeros_like(inputs[0].outliers)  # affected ones
        self.affected: Tensor | None = None  # (positions, width), of the batch that runs
        # per dimension: negative outliers, largest magnitude first, then positive ones, smallest first
        self.histogram = self.positions.new_zeros(self.width * 2 * BINS, dtype=torch.int32)
        for counts in inputs:
            counts.group = self

    def add(self, block: Tensor, outliers: Tensor, rows: slice, positions: int) -> None:
        if self.affected is None:
            self.affected = outliers.new_zeros(positions, self.width)
        self.affected[rows] |= outliers
        values, dimensions = block[outliers], outliers.nonzero()[:, 1]
        bins = ((values.abs() / self.magnitude).log() / BIN_WIDTH).long().clamp(0, BINS - 1)
        places = dimensions * 2 * BINS + torch.where(values < 0, BINS - 1 - bins, BINS + bins)
        self.histogram.index_add_(0, places, torch.ones_like(places, dtype=torch.int32))

    def end_batch(self) -> None:
        if self.affected is not None:
            self.positions += self.affected.sum(0)
            self.affected = None

    def examine(self, num_layers: int, positions: int, layers: float, tokens: float) -> FeatureGroup:
        """The dimensions that affect at least these shares of the layers and of the positions."""
        by_layer: dict[int | None, Tensor] = {}
        for counts in self.inputs:
            layer = counts.input.layer
            by_layer[layer] = by_layer.get(layer, False) | (counts.outliers > 0)
        affected = torch.stack(list(by_layer.values())).sum(0)
        order = self.positions.argsort(descending=True, stable=True).tolist()
        found = [
            self._feature(i, int(affected[i]) / num_layers, int(self.positions[i]) / positions)
            for i in order
            if affected[i] > 0
        ]
        features = tuple(each for each in found if each.layers >= layers and each.tokens >= tokens)
        source = self.inputs[0].input
        return FeatureGroup(
            name=source.group or source.label,
            width=self.width,
            labels=tuple(dict.fromkeys(counts.input.label for counts in self.inputs)),
            features=features,
            nearest=found[0] if found and not features else None,
        )

    def _feature(self, dimension: int, layers: float, tokens: float) -> Feature:
        histogram = self.histogram.view(self.width, 2 * BINS)[dimension].double()
        below = histogram.cumsum(0)
        centres = self.magnitude * ((torch.arange(BINS) + 0.5) * BIN_WIDTH).exp()
        values = torch.cat([-centres.flip(0), centres])
        first, median, third = (float(values[torch.searchsorted(below, q * below[-1])]) for q in (0.25, 0.5, 0.75))
        positive = float(histogram[BINS:].sum() / below[-1])
        return Feature(
            dimension=dimension,
            layers=layers,
            tokens=tokens,
            values=float(below[-1]) / sum(counts.rows for counts in self.inputs),
            quartiles=(first, median, third),
            positive=positive,
            one_sided=positive in (0.0, 1.0),
        )


def _group_counts(inputs: list[_InputCounts]) -> list[_GroupCounts]:
    members: dict[tuple[str, int], list[_InputCounts]] = defaultdict(list)
    for counts in inputs:
        if counts.input.group is not None:
            members[counts.input.group, counts.input.width].append(counts)
    return [_GroupCounts(each) for each in members.values()]
