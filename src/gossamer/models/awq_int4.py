"""4-bit checkpoints of AWQ (AutoAWQ, GPTQModel) in the layout of its GEMM kernels.

A linear layer ``P`` of N outputs and K inputs in G groups has

    P.qweight int32 [K, N / 8]   number i of a word, 4 bit from the lowest on: the code of output 8 j + ORDER[i]
    P.qzeros  int32 [G, N / 8]   zero points, in the same order
    P.scales  float16 or bfloat16 [G, N]

and the weight of output n for input k of group g is ``scales[g, n] * (code - zero point)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UnsupportedModelError
from gossamer.models.foreign_config import refuse_unknown
from gossamer.models.int4_layout import (
    PER_WORD,
    Int4Weight,
    check_bits,
    check_group_size,
    check_values,
    even_groups,
    nibbles,
    part,
    scales,
)
from gossamer.models.shard_reader import ShardReader

QUANT_METHOD = "awq"
WEIGHT = "qweight"
PARTS = ("qzeros", "scales")
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_PLACES = [ORDER.index(output) for output in range(PER_WORD)]
_KNOWN = {
    *("bits", "group_size", "quant_method", "version", "format", "checkpoint_format", "pack_dtype", "desc_act"),
    # how the codes were found, and for which layers
    *("zero_point", "sym", "modules_to_not_convert", "meta", "method", "lm_head", "dynamic"),
    # how other projects are to run them
    *("backend", "do_fuse", "fuse_max_seq_len", "modules_to_fuse", "exllama_config"),
}


def read_config(config: Mapping[str, Any]) -> int:
    """Reads a ``quantization_config``.

    Returns:
        Inputs in a group, or -1.

    Raises:
        CheckpointError: a value has no meaning.
        UnsupportedModelError: the layout is that of other kernels (GEMV, for example), or not known.

    >>> read_config({"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"})
    128
    """
    check_bits(config.get("bits"), "quantization_config.bits", "AWQ")
    gemm = (None, "gemm")
    check_values(config, {"version": gemm, "format": gemm, "checkpoint_format": gemm}, "AWQ")
    check_values(config, {"pack_dtype": (None, "int32"), "desc_act": (None, False)}, "AWQ")
    check_values(config, {"backend": (None, *_GEMM_BACKENDS)}, "AWQ")
    refuse_unknown(config, _KNOWN, "quantization_config", _refusal)
    return check_group_size(config.get("group_size", 128), "quantization_config.group_size")


# Programs that read the layout; llm-awq has one of its own.
_GEMM_BACKENDS = (
    *("autoawq", "auto", "auto_trainable", "machete", "marlin", "exllama_v2", "exllama_v1", "gemm", "gemm_triton"),
    *("torch_awq", "torch_fused_awq"),
)


def _refusal(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the AWQ checkpoint cannot be read: {reason}")


def open_weight(reader: ShardReader, path: str, shape: tuple[int, int], group_size: int) -> Int4Weight:
    """The weight of a layer, whose codes are read when they are needed.

    Args:
        reader: of the checkpoint.
        path: of the layer.
        shape: (N, K) in the model.
        group_size: inputs in a group, or -1.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or holds what it cannot; names it.
        UnsupportedModelError: the layer's shape has no blocks.
    """
    outputs, inputs = shape
    groups = even_groups(path, inputs, group_size)
    count = int(groups[-1]) + 1
    why = f"{path} of {list(shape)} in 4 bit"
    columns = -(-outputs // PER_WORD)
    words = part(reader, f"{path}.qweight", (torch.int32,), (inputs, columns), why)
    packed = part(reader, f"{path}.qzeros", (torch.int32,), (count, columns), why)
    scale = scales(reader, f"{path}.scales", (count, outputs), why)

    def codes(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(outputs)
        first = start // PER_WORD
        found = _in_order(words[:, first : -(-stop // PER_WORD)])
        return found[:, start - first * PER_WORD : stop - first * PER_WORD].t().contiguous()

    return Int4Weight(codes, scale.t(), _in_order(packed)[:, :outputs].t(), groups)


def _in_order(words: Tensor) -> Tensor:
    """(..., W) int32 -> (..., 8 W) uint8, by output."""
    return nibbles(words).unflatten(-1, (-1, PER_WORD))[..., _PLACES].flatten(-2)
