"""4-bit checkpoints of GPTQ (AutoGPTQ, GPTQModel), formats ``gptq`` and ``gptq_v2``.

A linear layer ``P`` of N outputs and K inputs in G groups has

    P.qweight int32 [K / 8, N]   number i of a word, 4 bit from the lowest on: the code of input 8 r + i
    P.qzeros  int32 [G, N / 8]   number i of a word: the zero point of output 8 j + i
    P.scales  float16 or bfloat16 [G, N]
    P.g_idx   int32 [K]          the group of each input; where it is missing, every group_size inputs make a group

and the weight of output n for input k of group g is ``scales[g, n] * (code - zero point)``. ``gptq`` stores zero points
less one, ``gptq_v2`` as they are. With ``desc_act`` (act-order) the inputs of a group stand apart from each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.foreign_config import refuse_unknown
from gossamer.models.int4_layout import (
    PER_WORD,
    Int4Weight,
    check_bits,
    check_group_size,
    check_inputs,
    check_values,
    even_groups,
    group_count,
    listed_groups,
    nibbles,
    part,
    scales,
)
from gossamer.models.shard_reader import ShardReader

QUANT_METHOD = "gptq"
WEIGHT = "qweight"
PARTS = ("qzeros", "scales", "g_idx")
_KNOWN = {
    *("bits", "group_size", "desc_act", "quant_method", "format", "checkpoint_format", "pack_dtype"),
    "dynamic",  # settings of single layers, whose tensors tell what counts of them
    # how the codes were found
    *("sym", "damp_percent", "damp_auto_increment", "static_groups", "true_sequential", "act_group_aware", "mse"),
    *("hyb_act", "tokenizer", "dataset", "batch_size", "pad_token_id", "cache_block_outputs", "model_seqlen", "meta"),
    *("modules_in_block_to_quantize", "module_name_preceding_first_block", "block_name_to_quantize", "lm_head"),
    *("model_name_or_path", "model_file_base_name", "method", "version", "inside_layer_modules"),
    # how other projects are to run them
    *("backend", "use_cuda_fp16", "use_exllama", "disable_exllama", "exllama_config", "max_input_length"),
}


@dataclass(frozen=True)
class Settings:
    """What the configuration says of all layers.

    Attributes:
        group_size: inputs in a group, or -1.
        first_zero: the zero point that is stored as 0.
        act_order: whether every layer needs ``g_idx``.
    """

    group_size: int
    first_zero: int
    act_order: bool


def read_config(config: Mapping[str, Any]) -> Settings:
    """Reads a ``quantization_config``.

    Raises:
        CheckpointError: a value has no meaning.
        UnsupportedModelError: the format is another one.

    >>> read_config({"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True})
    Settings(group_size=128, first_zero=1, act_order=True)
    """
    check_bits(config.get("bits"), "quantization_config.bits", "GPTQ")
    formats = {None: 1, "gptq": 1, "gptq_v2": 0}
    check_values(config, {"checkpoint_format": formats, "format": formats, "pack_dtype": (None, "int32")}, "GPTQ")
    found = config.get("checkpoint_format") or config.get("format")
    refuse_unknown(config, _KNOWN, "quantization_config", _refusal)
    return Settings(
        check_group_size(config.get("group_size", 128), "quantization_config.group_size"),
        formats[found.lower() if found else None],
        bool(config.get("desc_act")),
    )


def _refusal(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the GPTQ checkpoint cannot be read: {reason}")


def open_weight(reader: ShardReader, path: str, shape: tuple[int, int], settings: Settings) -> Int4Weight:
    """The weight of a layer, whose codes are read when they are needed.

    Args:
        reader: of the checkpoint.
        path: of the layer.
        shape: (N, K) in the model.
        settings: of the checkpoint.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or holds what it cannot; names it.
        UnsupportedModelError: the layer's shape has no blocks.
    """
    outputs, inputs = shape
    check_inputs(path, inputs)
    why = f"{path} of {list(shape)} in 4 bit"
    words = part(reader, f"{path}.qweight", (torch.int32,), (inputs // PER_WORD, outputs), why)
    count = group_count(reader, f"{path}.scales", axis=0)
    groups = listed_groups(reader, f"{path}.g_idx", inputs, count)
    if groups is None:
        if settings.act_order:
            raise CheckpointError(f"the checkpoint has no {path}.g_idx, which desc_act needs; copy or make it again")
        groups = even_groups(path, inputs, settings.group_size)
        count = int(groups[-1]) + 1
    scale = scales(reader, f"{path}.scales", (count, outputs), why)
    packed = part(reader, f"{path}.qzeros", (torch.int32,), (count, -(-outputs // PER_WORD)), why)
    zero = nibbles(packed)[:, :outputs] + settings.first_zero
    _check_range(reader, f"{path}.qzeros", zero)

    def codes(rows: slice) -> Tensor:
        return nibbles(words[:, rows].t())

    return Int4Weight(codes, scale.t(), zero.t(), groups)


def _check_range(reader: ShardReader, name: str, zero: Tensor) -> None:
    """Refuses a zero point of 16 among ``zero`` (G, N).

    Readers disagree about what it means: some take it for 0, and some add one to whole words, where it carries into the
    zero point beside it.

    Raises:
        CheckpointError: says where it is.
    """
    if bool((beyond := zero > 15).any()):
        group, output = beyond.nonzero()[0].tolist()
        raise CheckpointError(
            f"{reader.file_of(name)}: {name} gives output {output} in group {group} the zero point 16, beyond the "
            "range 0 to 15; save it as gptq_v2, or quantize with sym=True"
        )
