"""Gossamer makes transformer language models light: many prompts, one prefix, on the machine you already own.

The public names are imported on first use, so that ``import gossamer`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from gossamer.chat.tools import Tool, ToolUse
    from gossamer.errors import GossamerError, RequestError
    from gossamer.llm import LLM
    from gossamer.models.int8_quantizer import GossamerInt8Config
    from gossamer.models.quantize import quantize
    from gossamer.nn import Int8Embedding, Int8Linear
    from gossamer.operators.gaussian.attention import KernelAttention
    from gossamer.operators.gaussian.kernel import GaussianKernel
    from gossamer.operators.gradient_store import GradientStore
    from gossamer.operators.inverse_fisher import InverseFisher
    from gossamer.operators.sliding_fisher import SlidingFisher
    from gossamer.ops.attention import AttentionState, attend, merge_states
    from gossamer.optim import MFAC, MFACPreconditioner
    from gossamer.outputs import (
        BeamSearchOutput,
        CompletionOutput,
        EmbeddingOutput,
        RankedDocument,
        RequestOutput,
        ScoreOutput,
    )
    from gossamer.pruning import Pruner
    from gossamer.report.outliers import find_outliers
    from gossamer.sampling_params import BeamSearchParams, ReasoningParams, SamplingParams, StructuredOutputsParams

_HOMES = {
    "AttentionState": "ops.attention",
    "BeamSearchOutput": "outputs",
    "BeamSearchParams": "sampling_params",
    "CompletionOutput": "outputs",
    "EmbeddingOutput": "outputs",
    "GaussianKernel": "operators.gaussian.kernel",
    "GossamerError": "errors",
    "GossamerInt8Config": "models.int8_quantizer",
    "GradientStore": "operators.gradient_store",
    "Int8Embedding": "nn",
    "Int8Linear": "nn",
    "InverseFisher": "operators.inverse_fisher",
    "KernelAttention": "operators.gaussian.attention",
    "LLM": "llm",
    "MFAC": "optim",
    "MFACPreconditioner": "optim",
    "Pruner": "pruning",
    "RankedDocument": "outputs",
    "RequestError": "errors",
    "RequestOutput": "outputs",
    "ReasoningParams": "sampling_params",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "sampling_params",
    "ScoreOutput": "outputs",
    "SlidingFisher": "operators.sliding_fisher",
    "Tool": "chat.tools",
    "ToolUse": "chat.tools",
    "attend": "ops.attention",
    "find_outliers": "report.outliers",
    "merge_states": "ops.attention",
    "quantize": "models.quantize",
}

__all__ = [
    "LLM",
    "MFAC",
    "AttentionState",
    "BeamSearchOutput",
    "BeamSearchParams",
    "CompletionOutput",
    "EmbeddingOutput",
    "GaussianKernel",
    "GossamerError",
    "GossamerInt8Config",
    "GradientStore",
    "Int8Embedding",
    "Int8Linear",
    "InverseFisher",
    "KernelAttention",
    "MFACPreconditioner",
    "Pruner",
    "RankedDocument",
    "ReasoningParams",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "ScoreOutput",
    "SlidingFisher",
    "StructuredOutputsParams",
    "Tool",
    "ToolUse",
    "attend",
    "find_outliers",
    "merge_states",
    "quantize",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":  # looking it up takes longer than everything else here
        return import_module("importlib.metadata").version("gossamer")
    if name not in _HOMES:
        raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
    return getattr(import_module(f"gossamer.{_HOMES[name]}"), name)
