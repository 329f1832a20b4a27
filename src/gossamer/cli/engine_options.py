"""The model argument and the engine options that several commands share, and loading the model they describe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli.terminal import notice
from gossamer.errors import ConfigurationError
from gossamer.native.architectures import native_names

if TYPE_CHECKING:
    from gossamer import LLM
    from gossamer.models.int8_quantizer import GossamerInt8Config

Model = Annotated[
    str,
    typer.Argument(
        help="A name `gossamer pull` knows, a Hugging Face id, or a local directory or GGUF file.", show_default=False
    ),
]
Sharing = Annotated[
    str,
    typer.Option(
        help="What requests with a common prefix share: attention (one product for all of them), "
        "storage (keys and values only) or off."
    ),
]
RunnerOption = Annotated[
    str,
    typer.Option(
        "--runner",
        help=f"What computes the model: native (kernels of our own; {native_names()} on a CPU), "
        "transformers (any supported model) or auto (the first where it can).",
    ),
]
KVDtypeOption = Annotated[
    str,
    typer.Option(
        "--kv-dtype",
        help="Number format of keys and values in the native runner: float32, bfloat16, int8 (half the memory of "
        "bfloat16) or auto (float32 for a model in float32, otherwise bfloat16).",
    ),
]
Dtype = Annotated[str, typer.Option(help="Number format of the weights: auto, float32, bfloat16 or float16.")]
Quantization = Annotated[
    str | None,
    typer.Option(help="int8: make the linear layers int8 while they are read (LLM.int8()).", show_default=False),
]
Int8Threshold = Annotated[
    float, typer.Option(help="With int8: entries beyond this are outliers and are multiplied in floating point.")
]
Int8Criterion = Annotated[
    str, typer.Option(help="With int8: relative (to the mean magnitude of the token) or absolute (the paper's).")
]
Int8Outliers = Annotated[
    str, typer.Option(help="With int8: token (single entries), batch (whole columns, the paper's), static or none.")
]
Int8Head = Annotated[
    bool, typer.Option("--int8-head", help="Make the output layer int8 too; LLM.int8() leaves it as it is.")
]
SparseWeightsOption = Annotated[
    str,
    typer.Option(
        "--sparse-weights",
        help="How the native runner keeps int8 layers that are stored without their zeros: on (without, in less "
        "memory), off (with them) or auto (as this machine multiplies each shape faster; up to half a second of "
        "measuring for each). "
        "The results are the same.",
    ),
]
PrefixEps = Annotated[
    float,
    typer.Option(
        "--prefix-eps",
        min=0.0,
        max=0.99,
        help="Attend to long shared prefixes within this tolerance, and faster; native runner only. The error is "
        "measured and kept near or below it. 0 is exact; 0.05 is a good first value.",
    ),
]
Memory = Annotated[str, typer.Option(help="Budget for keys and values, such as 4GB.")]
MaxModelLen = Annotated[
    int | None, typer.Option(min=1, help="Longest prompt plus answer, in tokens; the model's context by default.")
]
MaxNumSeqs = Annotated[int, typer.Option(min=1, help="Sequences computed at a time.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(min=1, help="Tokens computed in one forward pass.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object, for scripts.")]


def int8_options(quantization: str | None, threshold: float, criterion: str, outliers: str) -> dict[str, Any]:
    """The arguments of :class:`gossamer.LLM` that these options stand for."""
    if quantization is None:
        return {}
    return {
        "quantization": quantization,
        "int8_threshold": threshold,
        "int8_criterion": criterion,
        "int8_outliers": None if outliers == "none" else outliers,
    }


def int8_config(quantization: str | None, threshold: float, criterion: str, outliers: str) -> GossamerInt8Config | None:
    """What :func:`gossamer.models.load.load_model` takes for these options.

    Raises:
        ConfigurationError: a value has no meaning.
    """
    if quantization is None:
        return None
    if quantization != "int8":
        raise ConfigurationError(f"--quantization takes int8, got {quantization!r}")
    from gossamer.models.int8_quantizer import GossamerInt8Config

    # what the texts may be is checked by the configuration
    return GossamerInt8Config(threshold, criterion, None if outliers == "none" else outliers)  # type: ignore[arg-type]


def load_llm(model: str, *, threads: int | None, **arguments: Any) -> LLM:
    """Load the model with the engine's arguments. Importing PyTorch takes seconds, so it happens only here."""
    notice(f"Loading {model}", "dim")
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from gossamer import LLM

    llm = LLM(model, **arguments)
    if llm.runner_note:
        notice(f"Computed by transformers, not natively: {llm.runner_note}", "dim")
    return llm
