"""What layers read of a token besides what the layers before made of it (Gemma 4's per-layer embeddings).

For a token t with the embedding x_0, layer l reads P entries

    e_l = (table[t]_l sqrt(P) + rms_norm((W x_0)_l / sqrt(D))) / sqrt(2)

and adds ``rms_norm(U (gelu(G x) * e_l))`` to what goes from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gossamer.native.norms import norm_from
from gossamer.native.recorder import Norm, Recorded, Recorder
from gossamer.native.weights import PackedLinear, pack_embedding, refer_to
from gossamer.nn import StoredEmbedding


@dataclass
class LayerInputs:
    """Those of all layers, (rows, layers P): a table times ``factor``, and the norm of an image of the embedding."""

    table: PackedLinear
    factor: float
    projection: PackedLinear
    norm: Norm

    def record(self, p: Recorder, x: Recorded) -> Recorded:
        """Compute them from the tokens and their embeddings."""
        inputs = p.embed(self.table, self.factor, into="layer inputs")
        p.add_rms_norm(p.linear(x, self.projection, into="projected inputs"), self.norm, inputs)
        return inputs


@dataclass
class LayerInput:
    """What a layer does with those that begin at column ``first``."""

    gate: PackedLinear
    activation: str
    first: int
    projection: PackedLinear
    norm: Norm

    def record(self, p: Recorder, inputs: Recorded, x: Recorded, factor: float) -> None:
        """``x = factor (x + rms_norm(projection(activation(gate x) * input)))``."""
        gated = p.multiply(p.activate(p.linear(x, self.gate, into="gated input"), self.activation), inputs, self.first)
        p.add_rms_norm(p.linear(gated, self.projection, into="half"), self.norm, x, factor)


def layers_of_inputs(body: Any, block: Any) -> list[Any]:
    """The linear layers that these take of a layer of a model, or of the whole where there is no layer."""
    names = ("per_layer_model_projection",) if block is None else ("per_layer_input_gate", "per_layer_projection")
    module = body if block is None else block
    return [layer for name in names if (layer := getattr(module, name, None)) is not None]


def pack_layer_inputs(body: Any, config: Any, pack: Callable[..., PackedLinear], float_type: str, isa: str) -> Any:
    """:class:`LayerInputs` of a model, or ``None``."""
    if not layers_of_inputs(body, None):
        return None
    table, share = body.embed_tokens_per_layer, body.per_layer_input_scale
    shrink = body.per_layer_model_projection_scale
    norm = norm_from(body.per_layer_projection_norm)
    assert norm is not None
    return LayerInputs(
        refer_to(table.stored, isa) if isinstance(table, StoredEmbedding) else pack_embedding(table, isa, float_type),
        float(getattr(table, "multiplier", getattr(table, "scalar_embed_scale", 1.0))) * share,
        pack([body.per_layer_model_projection]),
        Norm(norm.gain * share, norm.epsilon / shrink**2),  # of the projection that is not shrunk
    )


def pack_layer_input(block: Any, index: int, activation: str, pack: Callable[..., PackedLinear]) -> LayerInput | None:
    """That of the layer of this index, if it has one."""
    if not (layers := layers_of_inputs(None, block)):
        return None
    gate, projection = layers
    norm = norm_from(block.post_per_layer_input_norm)
    assert norm is not None
    first = index * projection.in_features
    return LayerInput(pack([gate]), activation, first, pack([projection]), norm)
