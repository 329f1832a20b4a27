"""Packs experts, as :class:`~gossamer.native.decoder.Experts` has them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gossamer.errors import UnsupportedModelError
from gossamer.native.adapters import AdaptedPacker
from gossamer.native.architectures import Architecture
from gossamer.native.decoder import Apart, Experts
from gossamer.native.norms import norm_from
from gossamer.native.recorder import COMMON_GATES, ExpertLayers, Norm
from gossamer.native.weights import check_linear, linear_of, pack_linear
from gossamer.nn import Int8Linear
from gossamer.nn.experts import SeparateExperts
from gossamer.nn.int8_linear import Decomposition


def mlps_of(block: Any, architecture: Architecture) -> tuple[Any, Any]:
    """Of a layer, what has routed experts, and the MLP for all tokens; either may be ``None``."""
    mlp, beside = getattr(block, architecture.mlp, None), getattr(block, architecture.shared, None)
    if hasattr(block, "experts"):
        return block, mlp
    if not hasattr(mlp, "experts"):
        return None, beside if mlp is None else mlp
    return mlp, beside or getattr(mlp, "shared_expert", None) or getattr(mlp, "shared_experts", None)


@dataclass(frozen=True)
class _Router:
    """How experts are chosen; see :class:`~gossamer.native.recorder.ExpertLayers`.

    Attributes:
        layer: gives the logits.
        unknown: its parameters that are none of those.
        norm: of what it reads, if that is not what the experts read.
    """

    layer: Any
    chosen: Any
    unknown: set[str]
    renormalize: bool = True
    margin: float = 0.0
    preference: Tensor | None = None
    factors: Tensor | None = None
    norm: Norm | None = None


def _router_of(module: Any) -> _Router:
    names = {name for name, _ in module.named_parameters()}
    if type(module).__name__ == "Gemma4TextRouter":
        gain = module.scale.detach().float() * module.scalar_root_size
        return _Router(
            layer=module.proj,
            chosen=module.config.top_k_experts,
            unknown={name for name in names if not name.startswith("proj.")} - {"scale", "per_expert_scale"},
            factors=module.per_expert_scale.detach().float().clone(),
            norm=Norm(gain.contiguous(), float(module.eps)),
        )
    statics, bias = getattr(module, "moe_statics", None), getattr(module, "bias", None)
    return _Router(
        layer=linear_of(module.weight.detach(), None if bias is None else bias.detach()),
        chosen=getattr(module, "top_k", None),
        unknown=names - {"weight", "bias", "moe_statics.e_score_correction_bias"},
        renormalize=bool(getattr(module, "norm_topk_prob", True)),
        margin=2 * float(getattr(module, "router_jitter_noise", 0.0)),
        preference=None if statics is None else statics.e_score_correction_bias.detach().float().flatten().clone(),
    )


def check_experts(mlp: Any, router_name: str) -> None:
    """Raises for routers and experts that are computed in another way than :class:`Experts` says."""
    module: Any = getattr(mlp, router_name, None)
    experts = mlp.experts
    known = {"gate", "router", "experts", "shared_expert", "shared_experts", "shared_expert_gate"}
    beside = _norms_beside(mlp)
    others = [] if beside else [name for name, _ in mlp.named_children() if name not in known]
    router = None if module is None else _router_of(module)
    if router is None or others or not isinstance(router.chosen, int):
        raise UnsupportedModelError(f"a {type(mlp).__name__} chooses its experts in a way that the kernels do not know")
    if isinstance(experts, SeparateExperts):
        for expert in experts:
            check_linear([expert.gate_proj, expert.up_proj])
            check_linear([expert.down_proj])
        both, last = _shapes_of(experts)
        biased, clamp = experts.clamp is not None, experts.clamp
    else:
        names = {name for name, _ in (*experts.named_parameters(), *experts.named_buffers())}
        biased = "gate_up_proj_bias" in names
        if names - {"gate_up_proj", "down_proj"} - ({"gate_up_proj_bias", "down_proj_bias"} if biased else set()):
            raise UnsupportedModelError(f"a {type(experts).__name__} has weights that the native kernels do not know")
        clamp = getattr(experts, "alpha", None), getattr(experts, "limit", None)
        both, last = experts.gate_up_proj.shape, experts.down_proj.shape
        if biased:  # stored the other way round
            both, last = (both[0], both[2], both[1]), (last[0], last[2], last[1])
    if biased and clamp != (1.702, 7.0):
        raise UnsupportedModelError(f"the gate of a {type(experts).__name__} is not the one that the kernels know")
    if router.unknown or (router.layer.bias is not None and not biased):
        raise UnsupportedModelError(f"a {type(module).__name__} has weights that the native kernels do not know")
    count, double, width = both
    router_shape = router.layer.out_features, router.layer.in_features
    shapes = tuple(last) == (count, width, double // 2) and router_shape == (count, width)
    if not shapes or not 0 < router.chosen <= count:
        raise UnsupportedModelError(
            f"{count} experts of {tuple(both[1:])} and {tuple(last)} weights, and a router of "
            f"{router_shape} that chooses {router.chosen}, do not fit together"
        )


def pack_experts(
    mlp: Any, router_name: str, pack: AdaptedPacker, activation: str, int8: Decomposition | None
) -> Experts:
    """What :func:`check_experts` has found to be right.

    Args:
        mlp: what has the experts.
        router_name: of its router.
        pack: packs their layers.
        activation: of the model's MLPs.
        int8: see :func:`decomposition_of_experts`.
    """
    router, experts = _router_of(getattr(mlp, router_name)), mlp.experts

    def ready(layer: Any) -> Any:
        plain = int8 is not None and isinstance(layer, nn.Linear)
        return Int8Linear.from_linear(layer, decomposition=int8) if plain else layer

    clamped = hasattr(experts, "gate_up_proj_bias") or getattr(experts, "clamp", None) is not None
    gate = "clamped" if clamped else activation
    gate_up, down = [], []
    for first, up, last in _layers_of_experts(experts):
        gate_up.append(pack([ready(first), ready(up)], gated=gate in COMMON_GATES))
        down.append(pack([ready(last)]))
    shared_gate = getattr(mlp, "shared_expert_gate", None)
    return Experts(
        router=pack_linear([router.layer], pack.isa, "float32"),
        layers=ExpertLayers(
            chosen=router.chosen,
            renormalize=router.renormalize,
            margin=router.margin,
            preference=router.preference,
            factors=router.factors,
            gate_up=gate_up,
            down=down,
        ),
        gate=gate,
        shared_gate=None if shared_gate is None else pack_linear([shared_gate], pack.isa, "float32"),
        apart=None if router.norm is None else Apart(router.norm, *_norms_beside(mlp)),
    )


def _norms_beside(block: Any) -> list[Norm]:
    """Of experts beside an MLP: of what they read, of what comes out of the MLP, and out of them."""
    names = ("pre_feedforward_layernorm_2", "post_feedforward_layernorm_1", "post_feedforward_layernorm_2")
    return [norm for name in names if (norm := norm_from(getattr(block, name, None))) is not None]


def _shapes_of(experts: SeparateExperts) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """As those of transformers' two tensors; 0 where experts differ."""

    def same(layers: Iterable[Any], size: str) -> int:
        sizes = {int(getattr(layer, size)) for layer in layers}
        return sizes.pop() if len(sizes) == 1 else 0

    factors = [layer for expert in experts for layer in (expert.gate_proj, expert.up_proj)]
    last = [expert.down_proj for expert in experts]
    count, inner = len(experts), same(factors, "out_features")
    both = count, 2 * inner, same(factors, "in_features")
    return both, (count, same(last, "out_features"), same(last, "in_features"))


def _layers_of_experts(experts: Any) -> Iterator[tuple[Any, Any, Any]]:
    """The gate, the other factor and what follows, of each expert."""
    if isinstance(experts, SeparateExperts):
        yield from ((each.gate_proj, each.up_proj, each.down_proj) for each in experts)
        return
    both, last = experts.gate_up_proj.detach(), experts.down_proj.detach()
    for index in range(len(both)):
        if hasattr(experts, "gate_up_proj_bias"):  # as in gpt-oss: (inputs, outputs), gate and factor in turns
            bias = experts.gate_up_proj_bias.detach()[index]
            gate, up = (linear_of(both[index].t()[part::2], bias[part::2]) for part in (0, 1))
            yield gate, up, linear_of(last[index].t(), experts.down_proj_bias.detach()[index])
        else:
            half = both.shape[1] // 2
            yield linear_of(both[index, :half]), linear_of(both[index, half:]), linear_of(last[index])


def decomposition_of_experts(network: Any) -> Decomposition | None:
    """With what experts become int8 as they are packed: that of the model's int8 layers, ``None`` if it has none.

    Where their weights are one tensor, they are in floating point until then.
    """
    rule = next((layer.decomposition for layer in network.modules() if isinstance(layer, Int8Linear)), None)
    if rule is None or rule.outliers == "token":
        return rule
    return replace(rule, outliers=None if rule.outliers is None else "token")
