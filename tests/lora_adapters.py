"""LoRA adapters as PEFT writes them, with random factors, and models with an adapter merged into their weights."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

PREFIX = "base_model.model."
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def linear_layers(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the linear layers but the last."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "lm_head" not in name
    }


def write_adapter(
    directory: Path,
    model: nn.Module,
    targets: Collection[str] = ATTENTION + MLP,
    *,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.3,
    layers: Collection[str] | None = None,
    ranks: dict[str, int] | None = None,
    **config: Any,
) -> Path:
    """An adapter of the layers whose names end with ``targets``; of ``layers`` only, if these are given.

    Args:
        ranks: of layers that have another one.
        config: other fields of ``adapter_config.json``.
    """
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for name, (outputs, inputs) in linear_layers(model).items():
        chosen = name in layers if layers is not None else name.rsplit(".", 1)[-1] in targets
        if chosen:
            own = (ranks or {}).get(name, rank)
            tensors[f"{PREFIX}{name}.lora_A.weight"] = torch.randn(own, inputs, generator=generator) * size
            tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(outputs, own, generator=generator) * size
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(targets)} | config
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    return directory


def change_config(directory: Path, **fields: Any) -> Path:
    """The same adapter with other fields in its configuration."""
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


def change_tensors(directory: Path, **tensors: Tensor | None) -> Path:
    """The same adapter with other tensors; without those that are ``None``."""
    file = directory / "adapter_model.safetensors"
    there = load_file(file) | tensors
    save_file({name: tensor for name, tensor in there.items() if tensor is not None}, file)
    return directory


@torch.no_grad()
def merged(model: Any, directory: Path, scales: dict[str, float] | None = None) -> Any:
    """A copy of the model whose weights are ``W + s B A``.

    Args:
        scales: of layers for which the configuration's is not the right one.
    """
    result = copy.deepcopy(model)
    config = json.loads((directory / "adapter_config.json").read_text())
    tensors = load_file(directory / "adapter_model.safetensors")
    root = math.sqrt if config.get("use_rslora") else float
    for name in [key for key in tensors if ".lora_A." in key]:
        layer = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        down, up = tensors[name].float(), tensors[name.replace("lora_A", "lora_B")].float()
        scale = (scales or {}).get(layer, config["lora_alpha"] / root(config["r"]))
        weight = result.get_submodule(layer).weight
        weight += (scale * (up.double() @ down.double())).to(weight.dtype)
    return result
