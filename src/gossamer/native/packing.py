"""Packs a model of transformers as a :class:`~gossamer.native.decoder.Decoder`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from gossamer.errors import UnsupportedModelError
from gossamer.models.lora import Adapter
from gossamer.native.adapters import AdaptedPacker
from gossamer.native.architectures import NATIVE_ARCHITECTURES, Architecture
from gossamer.native.decoder import Attention, Decoder, Layer, Mlp
from gossamer.native.expert_packing import check_experts, decomposition_of_experts, mlps_of, pack_experts
from gossamer.native.layer_inputs import layers_of_inputs, pack_layer_input, pack_layer_inputs
from gossamer.native.norms import norm_from, norm_of
from gossamer.native.recorder import COMMON_GATES, Rotary
from gossamer.native.recurrent import (
    LinearAttention,
    ShortConvolution,
    check_recurrent,
    inputs_of,
    is_recurrent,
    mixer_of,
    pack_recurrent,
)
from gossamer.native.sparse_timing import SparsePacker
from gossamer.native.weights import (
    check_linear,
    decomposition_of,
    pack_embedding,
    plain_linear,
    refer_to,
    some_outputs,
)
from gossamer.nn import StoredEmbedding

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu_squared",
}


def unsupported(config: Any) -> str:
    """Why a model of this configuration cannot run natively; an empty string if it can."""
    kind = config.model_type
    if kind not in NATIVE_ARCHITECTURES:
        return f"{kind} is not among {', '.join(NATIVE_ARCHITECTURES)}"
    if _activation(config) not in _ACTIVATIONS:
        return f"its activation is {_activation(config)}"
    if getattr(config, "clip_qkv", None):
        return "it clips its queries, keys and values"
    return ""


def _activation(config: Any) -> Any:
    names = ("hidden_activation", "hidden_act", "activation_function")
    said = next((found for name in names if (found := getattr(config, name, None)) is not None), None)
    return said or NATIVE_ARCHITECTURES[config.model_type].activation


def pack_decoder(
    network: Any,
    pack: SparsePacker,
    attention: list[tuple[float, int | None]],
    adapters: Sequence[Adapter] = (),
) -> Decoder:
    """Pack a model of transformers. Its layers lose their tensors on the way, so that nothing is held twice.

    Args:
        network: a causal language model whose configuration is supported.
        pack: packs its linear layers.
        attention: scale and window of each layer.
        adapters: that rows of a step may have.

    Raises:
        UnsupportedModelError: a layer is of a kind that the kernels do not know.
    """
    config = network.config.get_text_config()
    architecture = NATIVE_ARCHITECTURES[config.model_type]
    body = getattr(network, architecture.body)
    body = getattr(body, "language_model", body)  # of a model that reads more than text
    blocks, table_of_tokens = getattr(body, architecture.layers), getattr(body, architecture.embedding)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(blocks)
    tables, table_of = _tables(getattr(body, "rotary_emb", None), kinds)
    query_table = None
    if (growth := _query_growth(config)) is not None:  # of queries; keys stay as they are
        if architecture.neighbours or getattr(config, "partial_rotary_factor", None) not in (None, 1, 1.0):
            raise UnsupportedModelError("its queries grow with their position, entries that are not rotated included")
        tables, query_table = [*tables, replace(tables[0], growth=growth)], len(tables)
    half_factor, rotated = float(getattr(config, "residual_multiplier", 1.0)), 2 * len(tables[0].frequencies)
    packed = [layer for block in blocks for layer in _check_layer(block, architecture, rotated, half_factor)]
    packed += layers_of_inputs(body, None)
    adapted = AdaptedPacker(pack, network, adapters)
    adapted.check(packed)  # all this before any layer loses its tensors
    layers = []
    packer = _LayerPacker(architecture, config, adapted, rotated, network)
    settings = iter(attention)  # of the layers that have attention
    caches: dict[str, int] = {}  # by kind of layer, that of the last one that stores
    stored = 0
    for index, block in enumerate(blocks):
        place = None
        if (module := getattr(block, architecture.attention, None)) is not None:
            if stores := not getattr(module, "is_kv_shared_layer", False):
                caches[kinds[index]] = stored
                stored += 1
            table = table_of[kinds[index]] if rotated and _rotates(module, config) else None
            place = _AttentionPlace(*next(settings), table, caches[kinds[index]], stores)
        layers.append(packer.pack(block, index, place))
        block.to("meta")
    head = network.lm_head
    tied = head.weight is table_of_tokens.weight
    if isinstance(table_of_tokens, StoredEmbedding) and not tied:
        embedding = refer_to(table_of_tokens.stored, pack.isa)
    else:
        embedding = pack_embedding(table_of_tokens, pack.isa, pack.float_type)
    positions = None
    if architecture.positions:
        positions = pack_embedding(getattr(body, architecture.positions), pack.isa, pack.float_type)
    factor = float(getattr(table_of_tokens, "multiplier", getattr(table_of_tokens, "scalar_embed_scale", 1.0)))
    factor *= float(getattr(config, "embedding_multiplier", 1.0))
    if not tied or head.bias is not None:
        packed_head = pack([head])
    else:
        packed_head = replace(embedding, decomposition=decomposition_of(head))
    inputs = pack_layer_inputs(body, config, adapted, pack.float_type, pack.isa)
    norm = norm_from(getattr(body, architecture.final_norm))
    assert norm is not None
    scaling = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", 1.0))
    if scaling != 1 and head.bias is not None:
        raise UnsupportedModelError("its logits are scaled, a bias included")
    norm = replace(norm, gain=norm.gain * scaling, bias=None if norm.bias is None else norm.bias * scaling)
    network.to("meta")
    return Decoder(
        embedding,
        factor,
        positions,
        inputs,
        half_factor,
        layers,
        norm,
        packed_head,
        tables,
        query_table,
        score_cap=float(getattr(config, "attn_logit_softcapping", None) or 0.0),
        logit_cap=float(getattr(config, "final_logit_softcapping", None) or 0.0),
        wanted_from=len(layers) if adapters else _last_that_stores(layers) + 1,
        state_size=packer.state_size,
    )


def _last_that_stores(layers: Sequence[Layer]) -> int:
    """The last layer that leaves something behind for the tokens to come."""
    return max(
        place for place, layer in enumerate(layers) if not isinstance(layer.mixer, Attention) or layer.mixer.stores
    )


def _query_growth(config: Any) -> tuple[float, float] | None:
    """By what queries grow with their position, see :class:`~gossamer.native.recorder.Rotary`."""
    rope = getattr(config, "rope_parameters", None)
    if config.model_type != "ministral3" or not rope or not rope.get("llama_4_scaling_beta"):
        return None
    return float(rope["llama_4_scaling_beta"]), float(rope["original_max_position_embeddings"])


def _check_layer(block: Any, architecture: Architecture, rotated: int, half_factor: float) -> list[Any]:
    """The linear layers of a layer, if all that it has can be packed."""
    mixer = mixer_of(block, architecture)
    if is_recurrent(mixer):
        check_recurrent(mixer)
        layers = inputs_of(mixer)
        output = mixer.out_proj
    else:
        layers = _qkv(mixer, architecture, rotated)
        check_linear(layers)
        output = plain_linear(getattr(mixer, architecture.output))
    check_linear([output])
    added = [output]
    routed, mlp = mlps_of(block, architecture)
    if routed is not None:
        check_experts(routed, architecture.router)
    if mlp is not None:
        *both, down = _mlp_layers(mlp, architecture)
        check_linear(both)
        check_linear([down])
        layers += both
        added.append(down)
    if half_factor != 1 and any(layer.bias is not None for layer in added):
        raise UnsupportedModelError("what its layers compute is scaled, biases included")
    for name in (architecture.before_attention, architecture.before_mlp):
        if name:
            norm_from(getattr(block, name, None))
    within = [getattr(mixer, name, None) for name in (architecture.query_norm, architecture.key_norm)]
    after = [getattr(block, name) for name in (architecture.after_attention, architecture.after_mlp) if name]
    if any((norm := norm_from(module)) is not None and norm.centered for module in within + after):
        raise UnsupportedModelError("a LayerNorm of queries, keys or what a layer adds is not known to the kernels")
    return layers + added + layers_of_inputs(None, block)


@dataclass(frozen=True)
class _AttentionPlace:
    """What attention has from its place in the model; see :class:`~gossamer.native.decoder.Attention`."""

    scale: float
    window: int | None
    table: int | None
    cache: int
    stores: bool


class _LayerPacker:
    """Packs the layers of one model."""

    def __init__(
        self, architecture: Architecture, config: Any, pack: AdaptedPacker, rotated: int, network: Any
    ) -> None:
        self._architecture, self._pack, self._rotated = architecture, pack, rotated
        self._activation = _ACTIVATIONS[_activation(config)]
        self._int8 = decomposition_of_experts(network)
        self.state_size = 0
        parallel = architecture.parallel
        self._parallel = bool(getattr(config, parallel)) if isinstance(parallel, str) else parallel

    def pack(self, block: Any, index: int, place: _AttentionPlace | None) -> Layer:
        """The layer of this index."""
        architecture = self._architecture
        before_mlp = architecture.before_mlp
        routed, mlp = mlps_of(block, architecture)
        packed_mlp = None if mlp is None else self._mlp(mlp)
        experts = None
        if routed is not None:
            experts = pack_experts(routed, architecture.router, self._pack, self._activation, self._int8)
        if self._parallel and getattr(block, before_mlp, None) is None:
            before_mlp = architecture.before_attention  # both halves read the same
        return Layer(
            before_mixer=norm_of(block, architecture.before_attention),
            mixer=self._mixer(mixer_of(block, architecture), place),
            parallel=self._parallel,
            after_mixer=norm_of(block, architecture.after_attention),
            before_mlp=norm_of(block, before_mlp),
            mlp=packed_mlp,
            experts=experts,
            after_mlp=norm_of(block, architecture.after_mlp),
            input=pack_layer_input(block, index, self._activation, self._pack),
            factor=float(getattr(block, "layer_scalar", 1.0)),
        )

    def _mixer(self, module: Any, place: _AttentionPlace | None) -> Attention | ShortConvolution | LinearAttention:
        if is_recurrent(module):
            mixer, size = pack_recurrent(module, self._pack, self.state_size)
            self.state_size += size
            return mixer
        architecture = self._architecture
        assert place is not None
        return Attention(
            qkv=self._pack(_qkv(module, architecture, self._rotated)),
            cache=place.cache,
            stores=place.stores,
            query_norm=norm_of(module, architecture.query_norm),
            key_norm=norm_of(module, architecture.key_norm),
            value_norm=place.stores and hasattr(module, "v_norm"),
            rotated_first=architecture.rotated_first,
            scale=place.scale,
            window=place.window,
            table=place.table,
            sinks=module.sinks.detach().float() if hasattr(module, "sinks") else None,
            gated=_gated(module),
            output=self._pack([plain_linear(getattr(module, architecture.output))]),
        )

    def _mlp(self, mlp: Any) -> Mlp:
        *up, down = _mlp_layers(mlp, self._architecture)
        gated = len(up) == 2
        in_turns = gated and self._activation in COMMON_GATES
        return Mlp(self._pack(up, gated=in_turns), self._activation, self._pack([down]), gated)


def _qkv(attention: Any, architecture: Architecture, rotated: int) -> list[Any]:
    """The layers of queries, keys and values, with the pairs among ``rotated`` entries of a head in two halves.

    Those of queries alone where keys and values are an earlier layer's; values may be what keys are made of.
    """
    if getattr(attention, "is_kv_shared_layer", False):
        return [plain_linear(attention.q_proj)]
    if getattr(attention, "use_alternative_attention", False):
        return [plain_linear(getattr(attention, name)) for name in ("q_proj", "k_proj", "k_proj")]
    layers = [plain_linear(getattr(attention, name)) for name in architecture.qkv]
    if len(layers) == 1:
        if not architecture.by_head:
            return layers
        dim = attention.head_size
        order = torch.arange(layers[0].out_features).view(-1, 3, dim).transpose(0, 1)
        return [some_outputs(layers[0], order.flatten())]
    query, key, value = layers
    gates = [] if getattr(attention, "g_proj", None) is None else [attention.g_proj]
    if _gated(attention) == 1:
        dim = attention.head_dim
        order = torch.arange(query.out_features).view(-1, 2, dim)
        query, gate = (some_outputs(query, order[:, part].flatten()) for part in (0, 1))
        gates = [gate]
    if architecture.neighbours:
        dim = attention.head_dim
        order = torch.cat([torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, dim)])
        query, key = (
            some_outputs(each, (torch.arange(0, each.out_features, dim)[:, None] + order).flatten())
            for each in (query, key)
        )
    return [query, key, value, *gates]


def _gated(attention: Any) -> int:
    """For how many entries of its results there is a gate: one beside each of a query, one for a head, or none."""
    if type(attention).__name__ in ("Qwen3_5Attention", "Qwen3NextAttention"):
        return 1
    return 0 if getattr(attention, "g_proj", None) is None else int(attention.head_dim)


def _mlp_layers(mlp: Any, architecture: Architecture) -> list[Any]:
    """The gate, if there is one, the other factor, and what follows."""
    both, down = getattr(mlp, architecture.gate_up, None), getattr(mlp, architecture.down)
    if both is None:
        names = (architecture.gate, architecture.up)
        return [*(plain_linear(getattr(mlp, name)) for name in names if name), plain_linear(down)]
    half = both.out_features // 2
    gate, up = (some_outputs(both, torch.arange(first, first + half)) for first in (0, half))
    return [gate, up, down]


def _rotates(attention: Any, config: Any) -> bool:
    """Whether a layer rotates its queries and keys; some layers of some models do not."""
    if config.model_type == "exaone4":
        return attention.sliding_window is None or bool(attention.is_sliding)
    if config.model_type == "cohere2":
        return attention.sliding_window is not None
    return bool(getattr(attention, "use_rope", True))


def _tables(rotary: Any, kinds: list[str]) -> tuple[list[Rotary], dict[str, int]]:
    """The rotary tables, and which of them a kind of layer uses; one without entries if there is no rotation."""
    if rotary is None:
        return [Rotary(torch.empty(0), 1.0)], dict.fromkeys(kinds, 0)
    if hasattr(rotary, "inv_freq"):
        return [Rotary(rotary.inv_freq.detach().clone(), float(rotary.attention_scaling))], dict.fromkeys(kinds, 0)
    names = sorted(name for name in set(kinds) if hasattr(rotary, f"{name}_inv_freq"))
    found = [[getattr(rotary, f"{name}_{part}") for part in ("inv_freq", "attention_scaling")] for name in names]
    tables = [Rotary(frequencies.detach().clone(), float(scaling)) for frequencies, scaling in found]
    if not tables:
        raise UnsupportedModelError("its rotary embedding is of a kind that the native kernels do not know")
    return tables, {name: index for index, name in enumerate(names)}
