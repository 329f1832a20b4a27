"""Recurrent layers of a model of transformers, packed: short convolutions, and linear attention with a decay.

Each has a part of a text's state: of a convolution the last inputs, (taps - 1, channels), and of a linear attention
behind these a matrix of each value head, (heads, dk, dv).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UnsupportedModelError
from gossamer.native.adapters import AdaptedPacker
from gossamer.native.architectures import Architecture
from gossamer.native.norms import norm_from
from gossamer.native.recorder import Norm, Recurrence
from gossamer.native.weights import PackedLinear, check_linear, some_outputs

_CONVOLUTIONS = ("Lfm2ShortConv", "Lfm3ShortConv")
_DELTA_RULES = ("Qwen3_5GatedDeltaNet", "Qwen3NextGatedDeltaNet")
_STATE_SPACES = ("GraniteMoeHybridMambaLayer", "BambaMixer")  # Mamba 2
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
class LinearAttention:
    """A gated delta rule, or a state space, over convolved queries, keys and values.

    ``inputs`` are these, and the gates of the results; ``rates`` are what decays, and beta, follow from.
    """

    inputs: PackedLinear
    rates: PackedLinear
    weight: Tensor  # of the convolution, (taps, channels)
    bias: Tensor | None
    rule: Recurrence
    norm: Norm
    groups: int  # parts that are normed apart
    gate_first: bool
    state: int
    output: PackedLinear


def mixer_of(block: Any, architecture: Architecture) -> Any:
    """What of a layer mixes tokens: its attention, or the recurrent layer in its place."""
    found = getattr(block, architecture.attention, None)
    return getattr(block, architecture.recurrent) if found is None else found


def is_recurrent(mixer: Any) -> bool:
    """Whether this mixes tokens by a state."""
    return type(mixer).__name__ in (*_CONVOLUTIONS, *_DELTA_RULES, *_STATE_SPACES)


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
    if not rates:
        return
    check_linear(rates[0])
    rule = _rule(mixer)
    if mixer.activation not in ("silu", "swish") or rule.value_heads % rule.key_heads:
        raise UnsupportedModelError(f"a {type(mixer).__name__} has heads or an activation that the kernels do not know")
    if rule.skip is not None and tuple(mixer.time_step_limit) != (0.0, float("inf")):
        raise UnsupportedModelError(f"the steps of a {type(mixer).__name__} are limited to {mixer.time_step_limit}")


def inputs_of(mixer: Any) -> list[Any]:
    """The linear layers that read what it reads."""
    return [layer for layers in _inputs(mixer) for layer in layers]


def pack_recurrent(mixer: Any, pack: AdaptedPacker, state: int) -> tuple[ShortConvolution | LinearAttention, int]:
    """Pack one whose part of the state begins at ``state``; how many numbers that part has."""
    inputs, *rates = _inputs(mixer)
    convolution = mixer.conv1d if rates else mixer.conv
    weight: Tensor = convolution.weight.detach().float()[:, 0].t().contiguous()
    bias = None if convolution.bias is None else convolution.bias.detach().float().clone()
    size = weight[1:].numel()
    if not rates:
        return ShortConvolution(pack(inputs), weight, bias, state, pack([mixer.out_proj])), size
    rule, norm = _rule(mixer), norm_from(mixer.norm)
    assert norm is not None
    groups = rule.value_heads  # each with the same gain
    if gate_first := rule.skip is not None:
        groups = len(norm.gain) // mixer.norm.group_size
    else:
        norm = replace(norm, gain=norm.gain.repeat(groups))
    made = LinearAttention(
        pack(inputs),
        pack(rates[0]),
        weight,
        bias,
        rule,
        norm,
        groups,
        gate_first,
        state,
        pack([mixer.out_proj]),
    )
    return made, size + rule.value_heads * rule.dk * rule.dv


def _rule(mixer: Any) -> Recurrence:
    rate, bias = mixer.A_log.detach().float().exp().contiguous(), mixer.dt_bias.detach().float().clone()
    if type(mixer).__name__ in _STATE_SPACES:
        skip = mixer.D.detach().float().clone()
        return Recurrence(mixer.n_groups, mixer.num_heads, mixer.ssm_state_size, mixer.head_dim, rate, bias, skip)
    return Recurrence(mixer.num_k_heads, mixer.num_v_heads, mixer.head_k_dim, mixer.head_v_dim, rate, bias)


def _inputs(mixer: Any) -> list[list[Any]]:
    """The layers that are packed as one, of the inputs and, of a linear attention, of its rates."""
    if type(mixer).__name__ in _CONVOLUTIONS:
        return [[mixer.in_proj]]
    if type(mixer).__name__ in _STATE_SPACES:  # the gates, what is convolved, and the steps
        rows = torch.arange(mixer.in_proj.out_features)
        gates, convolved, steps = rows.split([mixer.intermediate_size, mixer.conv_dim, mixer.num_heads])
        return [[some_outputs(mixer.in_proj, torch.cat([convolved, gates]))], [some_outputs(mixer.in_proj, steps)]]
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
