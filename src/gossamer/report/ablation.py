"""What a model loses without its outlier features (arXiv 2208.07339, section 4.2).

Dimensions are set to zero in the inputs of linear layers, and three things are compared with the intact model:

- perplexity, with the change carried through the whole model, as in the paper;
- the mean probability of the most probable next token, likewise;
- the mean of the largest attention weight over heads and positions. Here each layer gets the intact model's hidden
  states, so that it shows the effect on that layer alone; this is the paper's "top-1 softmax probability".

As a control, the same is done to as many random dimensions that are no features, several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.report.outliers import FeatureGroup, LinearInput, OutlierReport, attention_block, run
from gossamer.report.quality import row_chunks, window_logits
from gossamer.report.token_ids import check_tokens

Dimensions = tuple[int, ...]


@dataclass(frozen=True)
class Effect:
    """A model with some dimensions set to zero, or with none.

    Attributes:
        dimensions: those that were set to zero.
        perplexity: over all windows.
        top1: mean probability of the most probable next token.
        attention_top1: mean of the largest attention weight; ``None`` if the dimensions are in no input of attention
            projections, or the model does not give its attention weights.
    """

    dimensions: Dimensions
    perplexity: float
    top1: float
    attention_top1: float | None


@dataclass(frozen=True)
class Ablation:
    """The features of one group of inputs.

    Attributes:
        group: its name in the outlier report.
        intact: nothing set to zero.
        features: without the features.
        random: without as many random dimensions, once per draw.
    """

    group: str
    intact: Effect
    features: Effect
    random: tuple[Effect, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def passes(report: OutlierReport, windows: int, draws: int = 3) -> int:
    """How often :func:`ablate` runs the model; 0 if there is nothing to set to zero."""
    groups = _selective(report)
    of_groups = sum(1 + draws + bool(_attention_blocks(report, group)) for group in groups)
    return windows * (1 + of_groups) if groups else 0


def ablate(
    model: Any,
    windows: Sequence[Tensor],
    report: OutlierReport,
    *,
    draws: int = 3,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> tuple[Ablation, ...]:
    """Sets the features of a report to zero, group by group, and measures what that does.

    Args:
        model: the model of the report. Its attention implementation is "eager" for a while, to get at the weights.
        windows: token ids, each (T,), T at least 2. Attention weights take heads x T x T values.
        report: groups without features are passed over, as are those where more than a tenth of the dimensions are
            features: such a criterion singles nothing out.
        draws: how many random choices of dimensions serve as control.
        seed: of the draws.
        progress: called after each pass through the model with their number; :func:`passes` tells how many there are.

    Returns:
        One ablation per group that is not passed over.

    Raises:
        ConfigurationError: there are no windows, the model cannot take one, or ``draws`` is less than 1.
    """
    if draws < 1 or not windows:
        raise ConfigurationError(f"at least one draw and one window are needed, got {draws} and {len(windows)}")
    for number, window in enumerate(windows):
        check_tokens(window, model, f"window {number}", shortest=2)
    done = count(1)

    def tick() -> None:
        if progress is not None:
            progress(next(done))

    groups = _selective(report)
    if not groups:
        return ()
    generator = torch.Generator().manual_seed(seed)
    intact = _predictions(model, windows, tick)
    ablations = []
    for group in groups:
        layers = [model.get_submodule(name) for each in report.inputs if _belongs(each, group) for name in each.modules]
        features = tuple(sorted(feature.dimension for feature in group.features))
        choices = [(), features, *(_random_others(group.width, features, generator) for _ in range(draws))]
        attention = _attention_top1(model, windows, _attention_blocks(report, group), layers, choices, tick)
        effects = []
        for dimensions, weight in zip(choices, attention, strict=True):
            with _zeroed(layers, dimensions):
                predictions = _predictions(model, windows, tick) if dimensions else intact
            effects.append(Effect(dimensions, *predictions, weight))
        ablations.append(Ablation(group.name, effects[0], effects[1], tuple(effects[2:])))
    return tuple(ablations)


def _selective(report: OutlierReport) -> list[FeatureGroup]:
    return [group for group in report.groups if 0 < len(group.features) <= group.width / 10]


def _belongs(source: LinearInput, group: FeatureGroup) -> bool:
    return (source.group, source.width) == (group.name, group.width)


def _attention_blocks(report: OutlierReport, group: FeatureGroup) -> list[str]:
    """Attention blocks with a projection whose input is in the group. A block's last input comes after the softmax."""
    inputs: dict[str, list[LinearInput]] = {}
    for each in report.inputs:
        for block in {attention_block(module) for module in each.modules} - {None}:
            inputs.setdefault(str(block), []).append(each)
    return [block for block, of_block in inputs.items() if any(_belongs(each, group) for each in of_block[:-1])]


def _random_others(width: int, features: Dimensions, generator: torch.Generator) -> Dimensions:
    others = [dimension for dimension in range(width) if dimension not in features]
    chosen = torch.randperm(len(others), generator=generator)[: len(features)]
    return tuple(sorted(others[int(i)] for i in chosen))


@contextmanager
def _zeroed(layers: Sequence[nn.Module], dimensions: Dimensions) -> Iterator[None]:
    """The layers see zeros in these dimensions of their input."""

    def zero(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        index = torch.tensor(dimensions, dtype=torch.int64, device=args[0].device)
        return (args[0].index_fill(-1, index, 0), *args[1:])

    with ExitStack() as hooks:
        for layer in layers if dimensions else ():
            hooks.enter_context(layer.register_forward_pre_hook(zero))
        yield


@torch.inference_mode()
def _predictions(model: Any, windows: Sequence[Tensor], tick: Callable[[], None]) -> tuple[float, float]:
    """Perplexity, and the mean probability of the most probable next token."""
    nll = top = torch.zeros((), dtype=torch.float64)
    for window in windows:
        logits = window_logits(model, window)
        targets = window[1:, None].to(logits.device)
        for rows in row_chunks(logits):
            log_p = logits[rows].float().log_softmax(-1)
            nll = nll - log_p.gather(1, targets[rows]).sum(dtype=torch.float64).cpu()
            top = top + log_p.amax(-1).exp().sum(dtype=torch.float64).cpu()
        tick()
    tokens = sum(len(window) - 1 for window in windows)
    return float((nll / tokens).exp()), float(top / tokens)


@torch.inference_mode()
def _attention_top1(
    model: Any,
    windows: Sequence[Tensor],
    blocks: Sequence[str],
    layers: Sequence[nn.Module],
    choices: Sequence[Dimensions],
    tick: Callable[[], None],
) -> list[float | None]:
    """Mean largest attention weight for each choice of dimensions, every block on the intact model's hidden states."""
    means: list[list[float]] = [[] for _ in choices]

    def try_all(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside = [module for module in block.modules() if module in layers]
        for dimensions, found in zip(choices, means, strict=True):
            with _zeroed(inside, dimensions):
                _, weights = block.forward(*args, **kwargs)
            if weights is not None:
                found.append(float(weights.float().amax(-1).mean()))

    if blocks:
        with _eager_attention(model), ExitStack() as hooks:
            for name in blocks:
                hooks.enter_context(model.get_submodule(name).register_forward_pre_hook(try_all, with_kwargs=True))
            for window in windows:
                run(model, window)
                tick()
    return [sum(found) / len(found) if found else None for found in means]


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    """The attention implementation that gives its weights."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
