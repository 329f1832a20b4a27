"""Mixtures of GGUF types: which tensor of a file is stored how.

``q4_k_m`` is llama.cpp's Q4_K_M (llama-quant.cpp): Q4_K, but Q6_K for the output layer (the embedding, where it is
tied), and for ``attn_v`` and ``ffn_down`` of the first and last eighth of the layers and of every third one between.
``q4_0`` is Q4_0 with the output layer in Q6_K. Rows that are no multiple of 256 long take the next wider type of 32,
and rows that are no multiple of 32 either are F16. ``q8_0`` and ``f32`` are the same type throughout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, LlamaFileType

from gossamer.errors import ConfigurationError

_FALLBACKS = {
    GGMLQuantizationType.Q4_K: GGMLQuantizationType.Q5_0,
    GGMLQuantizationType.Q5_K: GGMLQuantizationType.Q5_1,
    GGMLQuantizationType.Q6_K: GGMLQuantizationType.Q8_0,
}


@dataclass(frozen=True)
class Place:
    """Where a tensor stands in a model.

    Attributes:
        role: what it is in GGUF's terms, such as ``attn_v``; the output layer is ``output``, also where it is tied.
        layer: number of its layer, 0 for tensors outside of them.
        layers: how many there are.
    """

    role: str
    layer: int
    layers: int


@dataclass(frozen=True)
class Mixture:
    """See the module.

    Attributes:
        name: what a user types.
        file_type: what the file says of itself.
        type_at: the type of a matrix whose rows are long enough.
    """

    name: str
    file_type: LlamaFileType
    type_at: Callable[[Place], GGMLQuantizationType]

    def type_of(self, place: Place, shape: tuple[int, ...]) -> GGMLQuantizationType:
        """The type of a tensor of a shape.

        >>> down = Place("ffn_down", layer=0, layers=30)
        >>> [MIXTURES["q4_k_m"].type_of(down, (576, columns)).name for columns in (1536, 576, 72)]
        ['Q6_K', 'Q8_0', 'F16']
        """
        if len(shape) == 1:
            return GGMLQuantizationType.F32
        kind = self.type_at(place)
        if shape[-1] % GGML_QUANT_SIZES[kind][0]:
            kind = _FALLBACKS.get(kind, GGMLQuantizationType.F16)
        return GGMLQuantizationType.F16 if shape[-1] % GGML_QUANT_SIZES[kind][0] else kind


def _q4_k_m(place: Place) -> GGMLQuantizationType:
    wide = place.role == "output" or (place.role in ("attn_v", "ffn_down") and _more_bits(place))
    return GGMLQuantizationType.Q6_K if wide else GGMLQuantizationType.Q4_K


def _more_bits(place: Place) -> bool:
    eighth = place.layers // 8
    between = (place.layer - eighth) % 3 == 2
    return place.layer < eighth or place.layer >= 7 * place.layers // 8 or between


def _q4_0(place: Place) -> GGMLQuantizationType:
    return GGMLQuantizationType.Q6_K if place.role == "output" else GGMLQuantizationType.Q4_0


MIXTURES = {
    mixture.name: mixture
    for mixture in (
        Mixture("f32", LlamaFileType.ALL_F32, lambda place: GGMLQuantizationType.F32),
        Mixture("q8_0", LlamaFileType.MOSTLY_Q8_0, lambda place: GGMLQuantizationType.Q8_0),
        Mixture("q4_k_m", LlamaFileType.MOSTLY_Q4_K_M, _q4_k_m),
        Mixture("q4_0", LlamaFileType.MOSTLY_Q4_0, _q4_0),
    )
}


def find_mixture(name: str) -> Mixture:
    """The mixture of a name, as a user types it.

    Raises:
        ConfigurationError: there is none.
    """
    if name not in MIXTURES:
        raise ConfigurationError(f"the type of a GGUF file is one of {', '.join(MIXTURES)}; got {name!r}")
    return MIXTURES[name]
