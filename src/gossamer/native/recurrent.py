"""Recurrent layers of a model of transformers, packed: short convolutions and gated delta rules.

Each has a part of a text's state: of a convolution the last inputs, (taps - 1, channels), and of a delta rule behind
these a matrix of each value head, (heads, dk, dv).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UnsupportedModelError
from gossamer.native.adapters import AdaptedPacker
from gossamer.native.architectures import Architecture
from gossamer.native.norms import norm_from
from gossamer.native.recorder import DeltaRule, Norm
from gossamer.native.weights import PackedLinear, check_linear, some_outputs

_CONVOLUTIONS = ("Lfm2ShortConv",)
_DELTA_RULES = ("Qwen3_5GatedDeltaNet", "Qwen3NextGatedDeltaNet")
_MOST_TAPS = 8


@dataclass
class ShortConvolution:
    """As in LFM2: ``output(gate * conv(factor * x))``; ``inputs`` are the factor, the gate and x."""

    inputs: PackedLinear
    weight: Tensor  # (taps, channels)
    bias: Tensor | None
    state: int
    output: PackedLinear


@dataclass
class DeltaNet:
    """A gated delta rule over convolved queries, keys and values; ``inputs`` are these, and the results' gates."""

    inputs: PackedLinear
    rates: PackedLinear  # beta's and the decays' logits
    weight: Tensor  # (taps, channels)
    rule: DeltaRule
    norm: Norm
    state: int
    output: PackedLinear


def mixer_of(block: Any, architecture: Architecture) -> Any:
    """What of a layer mixes tokens: its attention, or the recurrent layer in its place."""
    found = getattr(block, architecture.attention, None)
    return getattr(block, architecture.recurrent) if found is None else found


def is_recurrent(mixer: Any) -> bool:
    """Whether this mixes tokens by a state."""
    return type(mixer).__name__ in (*_CONVOLUTIONS, *_DELTA_RULES)


def check_recurrent(mixer: Any) -> None:
    """Whether the kernels know what it does.

    Raises:
        UnsupportedModelError: says what they do not know.
    """
    convolution = mixer.conv if type(mixer).__name__ in _CONVOLUTIONS else mixer.conv1d
    taps, groups = convolution.kernel_size[0], convolution.groups
    if taps > _MOST_TAPS or groups != convolution.in_channels or groups != convolution.out_channels:
        raise UnsupportedModelError(f"the kernels know no convolution of {groups} groups and {taps} taps")
    inputs, *rates = _inputs(mixer)
    check_linear(inputs)
    if rates:
        check_linear(rates[0])
        if mixer.activation not in ("silu", "swish") or mixer.num_v_heads % mixer.num_k_heads:
            raise UnsupportedModelError(
                f"a {type(mixer).__name__} has heads or an activation that the kernels do not know"
            )


def inputs_of(mixer: Any) -> list[Any]:
    """The linear layers that read what it reads."""
    return [layer for layers in _inputs(mixer) for layer in layers]


def pack_recurrent(mixer: Any, pack: AdaptedPacker, state: int) -> tuple[ShortConvolution | DeltaNet, int]:
    """Pack one whose part of the state begins at ``state``; how many numbers that part has."""
    inputs, *rates = _inputs(mixer)
    if not rates:
        weight = _taps(mixer.conv)
        bias = None if mixer.conv.bias is None else mixer.conv.bias.detach().float().clone()
        made = ShortConvolution(pack(inputs), weight, bias, state, pack([mixer.out_proj]))
        return made, weight[1:].numel()
    weight, norm = _taps(mixer.conv1d), norm_from(mixer.norm)
    assert norm is not None
    rule = DeltaRule(
        mixer.num_k_heads,
        mixer.num_v_heads,
        mixer.head_k_dim,
        mixer.head_v_dim,
        mixer.A_log.detach().float().exp().contiguous(),
        mixer.dt_bias.detach().float().clone(),
    )
    net = DeltaNet(pack(inputs), pack(rates[0]), weight, rule, norm, state, pack([mixer.out_proj]))
    return net, weight[1:].numel() + rule.value_heads * rule.dk * rule.dv


def _taps(convolution: Any) -> Tensor:
    """(taps, channels) fp32"""
    weight: Tensor = convolution.weight.detach().float()[:, 0].t().contiguous()
    return weight


def _inputs(mixer: Any) -> list[list[Any]]:
    """The layers that are packed as one, of the inputs and, of a delta rule, of beta and the decays."""
    if type(mixer).__name__ in _CONVOLUTIONS:
        return [[mixer.in_proj]]
    if hasattr(mixer, "in_proj_qkv"):
        return [[mixer.in_proj_qkv, mixer.in_proj_z], [mixer.in_proj_b, mixer.in_proj_a]]
    # those of each key head stand together: query, key, values and their gates; beta's and the decays
    keys, dk, values = mixer.num_k_heads, mixer.head_k_dim, mixer.num_v_heads // mixer.num_k_heads
    wide = values * mixer.head_v_dim
    rows = torch.arange(mixer.in_proj_qkvz.out_features).view(keys, -1).split([dk, dk, wide, wide], dim=1)
    rates = torch.arange(mixer.in_proj_ba.out_features).view(keys, -1).split([values, values], dim=1)
    return [
        [some_outputs(mixer.in_proj_qkvz, torch.cat([each.flatten() for each in rows]))],
        [some_outputs(mixer.in_proj_ba, torch.cat([each.flatten() for each in rates]))],
    ]
