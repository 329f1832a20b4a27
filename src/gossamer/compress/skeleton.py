"""A model without its weights: which modules it has, of which kind, and which weights it ties."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from gossamer.errors import UnsupportedModelError
from gossamer.models.quiet import quiet_transformers


@dataclass(frozen=True)
class Skeleton:
    """What a model is made of.

    Attributes:
        parameters: name -> shape of every parameter that is not tied to another one.
        linears: path -> class of every module that multiplies by a weight matrix.
        embeddings: paths of the embeddings.
        tied: name of a weight -> name of the weight it shares storage with.
        kept_in_fp32: patterns of modules that transformers never converts.
    """

    parameters: dict[str, tuple[int, ...]]
    linears: dict[str, type[nn.Module]]
    embeddings: frozenset[str]
    tied: dict[str, str]
    kept_in_fp32: tuple[str, ...]


def build_skeleton(config: PreTrainedConfig) -> Skeleton:
    """Builds the model that a config describes, without memory for its weights.

    Raises:
        UnsupportedModelError: transformers has no causal language model of this type.

    >>> from transformers import LlamaConfig
    >>> skeleton = build_skeleton(LlamaConfig(num_hidden_layers=2))
    >>> len(skeleton.linears), skeleton.parameters["lm_head.weight"]
    (15, (32000, 4096))
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedModelError(f"transformers has no causal language model of the type {config.model_type}")
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with quiet_transformers(), torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    modules = dict(model.named_modules())
    tied = dict(model.all_tied_weights_keys)
    return Skeleton(
        parameters={name: tuple(value.shape) for name, value in model.named_parameters() if name not in tied},
        linears={path: type(module) for path, module in modules.items() if isinstance(module, nn.Linear | Conv1D)},
        embeddings=frozenset(path for path, module in modules.items() if isinstance(module, nn.Embedding)),
        tied=tied,
        kept_in_fp32=tuple(model._keep_in_fp32_modules or ()),
    )
