"""Small random 4-bit checkpoints of other projects, packed as their formats are described, and what they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from native_checkpoints import save_model


class Layer(NamedTuple):
    """The tensors of a layer by the last part of their names, and the weight (N, K) fp32 that they mean."""

    tensors: dict[str, Tensor]
    weight: Tensor


class Numbers(NamedTuple):
    codes: np.ndarray  # (N, K)
    zero: np.ndarray  # (N, G)
    scale: Tensor  # (N, G), 16 bit
    groups: np.ndarray  # (K)

    @property
    def weight(self) -> Tensor:
        """scale (code - zero point), in fp64, where it is exact."""
        scale = self.scale.double().numpy()[:, self.groups]
        return torch.from_numpy(scale * (self.codes - self.zero[:, self.groups])).float()


def words(numbers: np.ndarray) -> Tensor:
    """Eight numbers of 4 bit make an int32, the first in the lowest bits; along the last dimension."""
    parts = numbers.astype(np.uint32).reshape(*numbers.shape[:-1], -1, 8)
    packed = sum(parts[..., i] << np.uint32(4 * i) for i in range(8))
    return torch.from_numpy(np.ascontiguousarray(packed).view(np.int32))


def draw(
    outputs: int,
    inputs: int,
    group_size: int,
    *,
    symmetric: bool = False,
    act_order: bool = False,
    scale_type: torch.dtype = torch.float16,
    seed: int = 0,
) -> Numbers:
    random = np.random.default_rng(seed)
    groups = np.arange(inputs) // (inputs if group_size == -1 else group_size)
    if act_order:
        random.shuffle(groups)
    count = int(groups.max()) + 1
    codes = random.integers(0, 16, (outputs, inputs))
    zero = np.full((outputs, count), 8) if symmetric else random.integers(1, 16, (outputs, count))
    scale = torch.from_numpy(random.uniform(0.002, 0.05, (outputs, count))).to(scale_type)
    return Numbers(codes, zero, scale, groups)


def gptq(numbers: Numbers, first_zero: int = 1) -> Layer:
    tensors = {
        "qweight": words(numbers.codes).t(),
        "qzeros": words(numbers.zero.T - first_zero),
        "scales": numbers.scale.t(),
        "g_idx": torch.from_numpy(numbers.groups.astype(np.int32)),
    }
    return Layer({name: tensor.contiguous() for name, tensor in tensors.items()}, numbers.weight)


def gptq_v2(numbers: Numbers) -> Layer:
    return gptq(numbers, first_zero=0)


def awq(numbers: Numbers) -> Layer:
    def ordered(values: np.ndarray) -> Tensor:
        return words(values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape))

    tensors = {
        "qweight": ordered(numbers.codes.T),
        "qzeros": ordered(numbers.zero.T),
        "scales": numbers.scale.t().contiguous(),
    }
    return Layer(tensors, numbers.weight)


def pack_quantized(numbers: Numbers) -> Layer:
    tensors = {
        "weight_packed": words(numbers.codes),
        "weight_scale": numbers.scale,
        "weight_shape": torch.tensor(numbers.codes.shape),
    }
    if (numbers.zero != 8).any():
        tensors["weight_zero_point"] = words(numbers.zero.T).t().contiguous()
    if (np.diff(numbers.groups) < 0).any():
        tensors["weight_g_idx"] = torch.from_numpy(numbers.groups.astype(np.int32))
    return Layer(tensors, numbers.weight)


def compressed_tensors_config(group_size: int, symmetric: bool, act_order: bool = False) -> dict[str, Any]:
    scheme = {"strategy": "channel"} if group_size == -1 else {"strategy": "group", "group_size": group_size}
    weights = {"num_bits": 4, "type": "int", "symmetric": symmetric, **scheme}
    if act_order:
        weights["actorder"] = "group"
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def config(format: str, group_size: int, symmetric: bool = False, act_order: bool = False) -> dict[str, Any]:
    if format == "pack_quantized":
        return compressed_tensors_config(group_size, symmetric, act_order)
    common = {"bits": 4, "group_size": group_size}
    if format == "awq":
        return common | {"quant_method": "awq", "version": "gemm", "zero_point": True}
    return common | {
        "quant_method": "gptq",
        "checkpoint_format": format,
        "desc_act": act_order,
        "sym": symmetric,
    }


FORMATS: dict[str, Callable[[Numbers], Layer]] = {
    "gptq": gptq,
    "gptq_v2": gptq_v2,
    "awq": awq,
    "pack_quantized": pack_quantized,
}


def write_layer(directory: Path, layer: Layer, path: str = "fc") -> Path:
    """The weights of a checkpoint of a single layer."""
    directory.mkdir(exist_ok=True)
    save_file({f"{path}.{last}": tensor for last, tensor in layer.tensors.items()}, directory / "model.safetensors")
    return directory


def write_model(
    directory: Path, format: str, group_size: int = 32, *, kind: str = "llama", head: bool = False, **settings: Any
) -> dict[str, Tensor]:
    """A random model in half precision whose linear layers are in 4 bit; ``head``: the output layer, too.

    Returns:
        What its tensors mean in floating point, by transformers' names.
    """
    save_model(kind, directory)
    stored = {name: tensor.half() for name, tensor in load_file(directory / "model.safetensors").items()}
    dense = dict(stored)
    linear = [name for name in stored if name.endswith("proj.weight") or (head and name == "lm_head.weight")]
    for seed, name in enumerate(linear):
        outputs, inputs = stored.pop(name).shape
        layer = FORMATS[format](draw(outputs, inputs, group_size, seed=seed, **settings))
        stored |= {f"{name.removesuffix('weight')}{last}": tensor for last, tensor in layer.tensors.items()}
        dense[name] = layer.weight
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    file = directory / "config.json"
    fields = json.loads(file.read_text()) | {"dtype": "float16"}
    told = {key: settings[key] for key in ("symmetric", "act_order") if key in settings}
    fields["quantization_config"] = config(format, group_size, **told)
    file.write_text(json.dumps(fields))
    return dense
