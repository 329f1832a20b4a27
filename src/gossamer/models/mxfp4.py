"""gpt-oss's own checkpoints: the weights of experts in MXFP4 (OCP Microscaling Formats 1.0), everything else in bf16.

Of the experts of a layer, ``gate_up_proj_blocks`` (experts, 2 inner, hidden / 32, 16) and ``gate_up_proj_scales``
(experts, 2 inner, hidden / 32) uint8 hold blocks of 32 weights, two in a byte with the earlier in the low bits, and the
exponent of each block; rows of gate and factor take turns. ``down_proj`` is (experts, hidden, inner) in the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.foreign_config import as_names, refuse_unknown
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.experts import is_clamped
from gossamer.nn.stored_matrix import StoredMatrix

QUANT_METHOD = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_WEIGHTS, _BYTES = 32, 16  # of a block, without its exponent
_NAN = 255  # as an exponent


def is_mxfp4(config: PreTrainedConfig) -> bool:
    """Whether a configuration is that of such a checkpoint."""
    stored = getattr(config, "quantization_config", None)
    return isinstance(stored, dict) and stored.get("quant_method") == QUANT_METHOD


class MXFP4Rows:
    """Rows of blocks (N, 17 K / 32) uint8 as GGUF has them, made when they are asked for.

    A block is its exponent, and then 16 bytes that hold a weight of the first half in the low bits and one of the
    second in the high bits.

    Args:
        blocks: (experts, rows, K / 32, 16) uint8.
        scales: (experts, rows, K / 32) uint8.
        expert: which.
        rows: of it, such as every other one.

    >>> blocks, scales = np.zeros((1, 2, 1, 16), np.uint8), np.full((1, 2, 1), 127, np.uint8)
    >>> blocks[0, 1, 0, 0] = 0x21
    >>> rows = MXFP4Rows(torch.from_numpy(blocks), torch.from_numpy(scales), 0, slice(None))
    >>> rows.shape, rows[1][:3].tolist()
    ((2, 17), [127, 1, 2])
    """

    dtype: np.dtype[Any] = np.dtype(np.uint8)
    ndim = 2

    def __init__(self, blocks: Tensor, scales: Tensor, expert: int, rows: slice) -> None:
        self._blocks, self._scales = blocks[expert, rows], scales[expert, rows]
        count, across = self._scales.shape
        self.shape: tuple[int, ...] = (count, across * (1 + _BYTES))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> np.ndarray:
        blocks = self._blocks.numpy()[rows]
        codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(*blocks.shape[:-1], 2, _BYTES)
        made = np.empty((*blocks.shape[:-1], 1 + _BYTES), np.uint8)
        made[..., 0] = self._scales.numpy()[rows]
        made[..., 1:] = codes[..., 0, :] | codes[..., 1, :] << 4
        return made.reshape(*made.shape[:-2], -1)


class _Experts:
    """The weights of all experts of a layer in bf16, which holds them exactly; ``[...]`` computes them."""

    def __init__(self, rows: list[MXFP4Rows], inputs: int) -> None:
        self._rows, self._inputs = rows, inputs

    def __getitem__(self, rows: Any) -> Tensor:
        result = torch.empty(len(self._rows), self._inputs, len(self._rows[0]), dtype=torch.bfloat16)
        for each, made in zip(result, self._rows, strict=True):
            each.copy_(StoredMatrix("MXFP4", self._inputs, made).dequantize().t())
        return result


def read_mxfp4(
    reader: ShardReader, config: PreTrainedConfig, model: nn.Module, *, as_stored: bool = False
) -> dict[str, Any]:
    """The weights of a checkpoint by name, unread; ``config`` then says nothing of quantization.

    Args:
        reader: of the checkpoint.
        config: of it.
        model: the one that ``config`` describes, without weights.
        as_stored: the weights of experts are given as :class:`StoredMatrix`, by the names of
            :class:`~gossamer.nn.experts.SeparateExperts`.

    Raises:
        CheckpointError: a tensor is missing, of the wrong shape, or has an exponent that is not a number.
        UnsupportedModelError: the model is not gpt-oss, or a setting is unknown.
    """
    settings: Mapping[str, Any] = config.quantization_config
    known = ("quant_method", "modules_to_not_convert", "dequantize")
    refuse_unknown(settings, known, "quantization_config", UnsupportedModelError)
    as_names(settings.get("modules_to_not_convert"), "quantization_config.modules_to_not_convert")
    del config.quantization_config
    weights = reader.slices()
    for path in [name for name, module in model.named_modules() if is_clamped(module)]:
        experts: Any = model.get_submodule(path)
        for name in ("gate_up_proj", "down_proj"):
            count, inputs, outputs = getattr(experts, name).shape
            where = f"{path}.{name}"
            if f"{where}{_BLOCKS}" not in weights and where in weights:
                continue  # in floating point
            shape = count, outputs, inputs // _WEIGHTS
            blocks = _taken(reader, weights, f"{where}{_BLOCKS}", (*shape, _BYTES))
            scales = _taken(reader, weights, f"{where}{_SCALES}", shape)
            if bool((scales == _NAN).any()):
                raise CheckpointError(f"{reader.file_of(f'{where}{_SCALES}')}: {where}{_SCALES} holds NaN (255)")
            if not as_stored:
                weights[where] = _Experts(
                    [MXFP4Rows(blocks, scales, each, slice(None)) for each in range(count)], inputs
                )
                continue
            bias = _taken(reader, weights, f"{where}_bias", (count, outputs))
            parts = {"down_proj": slice(None)}
            if name == "gate_up_proj":
                parts = {"gate_proj": slice(0, None, 2), "up_proj": slice(1, None, 2)}
            for expert in range(count):
                for layer, part in parts.items():
                    matrix = StoredMatrix("MXFP4", inputs, MXFP4Rows(blocks, scales, expert, part))
                    weights[f"{path}.{expert}.{layer}.weight"] = matrix
                    weights[f"{path}.{expert}.{layer}.bias"] = bias[expert, part].clone()
    if left := next((name for name in weights if name.endswith((_BLOCKS, _SCALES))), None):
        raise UnsupportedModelError(
            f"{reader.file_of(left)}: {left} is in MXFP4, but not of experts that the model of config.json has; MXFP4 "
            "is read for gpt-oss"
        )
    return weights


def _taken(reader: ShardReader, weights: dict[str, Any], name: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of this name and shape, as a view of its file; it is no weight of the model by itself.

    Raises:
        CheckpointError: it is missing, or of another shape.
    """
    spec = reader.specs.get(name)
    if spec is None:
        raise CheckpointError(f"the checkpoint lacks {name}, which belongs to experts in MXFP4")
    if tuple(spec.shape) != shape:
        raise CheckpointError(f"{reader.file_of(name)}: {name} is {list(spec.shape)}, and has to be {list(shape)}")
    del weights[name]
    return reader.tensor(name)
