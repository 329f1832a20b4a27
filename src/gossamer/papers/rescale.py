"""Outlier features made by hand: a rescale that keeps a model's function and changes what int8 does to it. Synthetic.

Above 6.7B parameters a few hidden dimensions are several times larger than all others, in every layer and at most
tokens (Dettmers et al. 2022, arXiv 2208.07339, section 4). Small models have no features of that kind. But a norm with
gain g that feeds linear layers W can be made to produce them without a change of the function: for any c > 0,

    W (g * n(x)) = (W / c) (c g * n(x))         dimension by dimension; n(x) is x divided by its root mean square

The input of the linear layers then has outliers, and the matching columns of W are small. This is done to the norms
before attention (q, k, v) and before the feed-forward layers (gate, up). Factors that are powers of two do not even
change the rounding.

It is an emulation: the numbers that come out show what a scheme does with outliers, not what large models do.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.nn.outlier_store import random_reading

LARGEST_FACTOR = 64.0  # what is nearly zero by itself stays small

# attribute of the linear layers' parent -> (norms that may feed it, the first one that is there; linear layers)
_BLOCKS = {
    "self_attn": (("input_layernorm",), ("q_proj", "k_proj", "v_proj")),
    # Where both are there, as in Gemma, post_attention_layernorm is applied to the output of attention.
    "mlp": (("pre_feedforward_layernorm", "post_attention_layernorm"), ("gate_proj", "up_proj")),
}


class ScaledInput(NamedTuple):
    """A norm and the linear layers that read its output, and nothing else reads it.

    Attributes:
        norm: an RMSNorm; its gain is ``norm.weight + offset``.
        linears: they have the norm's width as ``in_features``.
        offset: 0, or 1 in Gemma.
    """

    norm: nn.Module
    linears: tuple[nn.Linear, ...]
    offset: float


@dataclass(frozen=True)
class Emulation:
    """What :func:`emulate_outliers` did.

    Attributes:
        dimensions: the hidden dimensions, ascending.
        magnitude: what their largest magnitudes were brought near to.
        factors: by name of the norm, one per dimension.
    """

    dimensions: tuple[int, ...]
    magnitude: float
    factors: dict[str, tuple[float, ...]]


def scaled_inputs(model: Any) -> dict[str, ScaledInput]:
    """The norms of a decoder that can be rescaled, by name.

    Args:
        model: a transformers model of the Llama or the Gemma 3 kind: RMSNorms before attention and before a
            feed-forward layer with gate and up projections, not quantized.

    Raises:
        UnsupportedModelError: names the layer that is built differently.
    """
    layers = getattr(getattr(model, "base_model", model), "layers", None)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no decoder layers to rescale")
    inputs = {}
    for number, layer in enumerate(layers):
        for block, (norms, linears) in _BLOCKS.items():
            name = next((norm for norm in norms if hasattr(layer, norm)), norms[-1])
            where = f"layers.{number}.{name}"
            inputs[where] = _scaled_input(
                where,
                getattr(layer, name, None),
                [getattr(getattr(layer, block, None), each, None) for each in linears],
            )
    return inputs


def rescale(model: Any, dimensions: Sequence[int], factors: float | Mapping[str, Tensor]) -> None:
    """Multiplies the gains of hidden dimensions, and divides the matching columns of the linear layers; in place.

    Args:
        model: as for :func:`scaled_inputs`.
        dimensions: (S) hidden dimensions.
        factors: c, for all norms and dimensions; or by name of the norm (S), one per dimension. Greater than 0.

    Raises:
        UnsupportedModelError: the model is built differently.
        ConfigurationError: a dimension or a factor is out of its range. The model is then as it was.
    """
    inputs = scaled_inputs(model)
    columns = torch.tensor(dimensions, dtype=torch.int64)
    width = min(linear.in_features for each in inputs.values() for linear in each.linears)
    if len(set(dimensions)) < len(dimensions) or any(not 0 <= each < width for each in dimensions):
        raise ConfigurationError(f"dimensions must be different numbers from 0 to {width - 1}, got {list(dimensions)}")
    if isinstance(factors, int | float):
        factors = dict.fromkeys(inputs, torch.full((len(dimensions),), float(factors)))
    for name in inputs:
        factor = factors.get(name)
        if factor is None or factor.shape != columns.shape or not bool(((factor > 0) & factor.isfinite()).all()):
            raise ConfigurationError(f"{name} needs {len(dimensions)} factors greater than 0, got {factor}")
    with torch.no_grad():
        for name, (norm, linears, offset) in inputs.items():
            gain: Tensor = norm.weight  # type: ignore[assignment]
            factor = factors[name].to(gain.device, gain.dtype)
            gain[columns] = (gain[columns] + offset) * factor - offset
            for linear in linears:
                linear.weight[:, columns] /= factor


def emulate_outliers(model: Any, count: int = 6, magnitude: float = 12.0) -> Emulation:
    """Gives a small model the outlier features of a large one, in place; its function stays the same.

    The dimensions are those that carry most of the energy of the norms' outputs already, on average over the norms. In
    each norm, each of them is multiplied by the power of two that brings its largest magnitude nearest to
    ``magnitude``, but at least by 1 and at most by 64. So the outliers have the same size everywhere, as in the paper
    (its 13B model has quartiles of -63, -58 and -45 over all layers). What is large where, shows while the model reads
    random tokens.

    Args:
        model: as for :func:`scaled_inputs`.
        count: dimensions; the paper's 6.7B model has 6.
        magnitude: twice the paper's threshold of 6.0 by default, so that none is below it by chance.

    Raises:
        UnsupportedModelError: the model is built differently.
        ConfigurationError: ``count`` or ``magnitude`` is out of its range.
    """
    if not 0 < magnitude < float("inf"):
        raise ConfigurationError(f"magnitude must be a number greater than 0, got {magnitude}")
    inputs = scaled_inputs(model)
    outputs = _outputs(model, inputs)
    energy = torch.stack([x.square().mean(0) / x.square().mean(0).sum() for x in outputs.values()]).mean(0)
    if not 1 <= count <= len(energy):
        raise ConfigurationError(f"count must be from 1 to {len(energy)}, the hidden size; got {count}")
    dimensions = energy.topk(count).indices.sort().values
    factors = {
        name: (magnitude / x[:, dimensions].abs().amax(0)).log2().round().exp2().clamp(1.0, LARGEST_FACTOR)
        for name, x in outputs.items()
    }
    rescale(model, dimensions.tolist(), factors)
    return Emulation(
        tuple(dimensions.tolist()), magnitude, {name: tuple(each.tolist()) for name, each in factors.items()}
    )


def _scaled_input(where: str, norm: Any, linears: Sequence[Any]) -> ScaledInput:
    if norm is None or not all(type(linear) is nn.Linear for linear in linears):
        raise UnsupportedModelError(
            f"{where} does not feed linear layers as in Llama or Gemma 3; it cannot be rescaled"
        )
    offset = _gain_offset(norm)
    if offset is None:
        raise UnsupportedModelError(f"{where} is a {type(norm).__name__}, not an RMSNorm; it cannot be rescaled")
    return ScaledInput(norm, tuple(linears), offset)


def _gain_offset(norm: Any) -> float | None:
    """What an RMSNorm adds to its weight; ``None`` if it is none. Ones, of root mean square 1, become its gain."""
    trial = copy.deepcopy(norm).float()
    ones, gains = torch.ones_like(trial.weight[None]), []
    with torch.no_grad():
        for weight in (0.0, 1.0):
            trial.weight.fill_(weight)
            gains.append(trial(ones))
    offset = float(gains[0].mean().round())
    wrong = max(float((gains[0] - offset).abs().max()), float((gains[1] - offset - 1).abs().max()))
    return offset if wrong < 1e-3 else None


def _outputs(model: Any, inputs: Mapping[str, ScaledInput]) -> dict[str, Tensor]:
    """(T, D) fp32 output of each norm for random tokens, without the first: models treat it in ways of their own."""
    outputs: dict[str, Tensor] = {}
    read = random_reading(model)
    assert read is not None  # a model with decoder layers is one of transformers
    handles = [
        each.norm.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out[0, 1:].float()}))
        for name, each in inputs.items()
    ]
    try:
        with torch.inference_mode():
            read()
    finally:
        for handle in handles:
            handle.remove()
    return outputs
