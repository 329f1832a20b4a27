"""What the norms of a model of transformers do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.errors import UnsupportedModelError
from gossamer.native.recorder import Norm

_ADDED_TO_ONE = ("GemmaRMSNorm", "Gemma2RMSNorm", "Gemma3RMSNorm", "Qwen3_5RMSNorm", "Qwen3NextRMSNorm")


def norm_of(module: Any, name: str) -> Norm | None:
    """That of this name, if there is one."""
    return norm_from(getattr(module, name, None)) if name else None


def norm_from(module: Any) -> Norm | None:
    """What a module does, if there is one.

    Raises:
        UnsupportedModelError: it is neither RMSNorm nor LayerNorm.
    """
    if module is None or isinstance(module, torch.nn.Identity):
        return None
    name = type(module).__name__
    if name == "OlmoLayerNorm":
        return Norm(torch.ones(module.normalized_shape), 1e-5, centered=True)
    if name == "Gemma4RMSNorm" and module.with_scale:
        return Norm(module.weight.detach().float().clone().contiguous(), float(module.eps))
    gain: Tensor = module.weight.detach().float().clone().contiguous()
    if name in _ADDED_TO_ONE:
        return Norm(gain + 1.0, float(module.eps))
    if name.endswith(("RMSNorm", "RMSNormGated")) and hasattr(module, "variance_epsilon"):
        return Norm(gain, float(module.variance_epsilon))
    if gain.dim() == 1 and name == "LayerNorm":
        bias = None if module.bias is None else module.bias.detach().float().clone().contiguous()
        return Norm(gain, float(module.eps), centered=True, bias=bias)
    if gain.dim() == 1 and name in ("CohereLayerNorm", "Cohere2LayerNorm"):
        return Norm(gain, float(module.variance_epsilon), centered=True)
    raise UnsupportedModelError(f"a {name} is not a norm that the native kernels know")
