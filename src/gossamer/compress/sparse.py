"""A checkpoint becomes one with pruned weights, and int8 if asked for; interrupted, it goes on where it stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.compress.calibration import calibration_batches, check_calibration, digest, parts_directory, remove_parts
from gossamer.compress.output import all_or_nothing, check_output, size_of
from gossamer.compress.writing import write_model
from gossamer.errors import ConfigurationError
from gossamer.models.int8_quantizer import GossamerInt8Config
from gossamer.models.load import load_config, load_model
from gossamer.models.manifest import write_manifest
from gossamer.models.quantize import quantize
from gossamer.models.resolve import resolve_model
from gossamer.models.shard_reader import ShardReader
from gossamer.models.shards import Progress
from gossamer.nn.experts import separate_experts
from gossamer.nn.quantize import QuantizationReport
from gossamer.operators.ranks import ALONE, Ranks, together
from gossamer.options import ModelOptions
from gossamer.pruning.blocks import decoder_blocks
from gossamer.pruning.curvature import (
    BlockFisher,
    Curvature,
    DiagFisher,
    LayerGram,
    Magnitude,
    MFACFisher,
    Wanda,
)
from gossamer.pruning.job import OnProgress
from gossamer.pruning.masks import MASKS, save_masks
from gossamer.pruning.patterns import Scope, check_share, parse_pattern
from gossamer.pruning.pruner import Pruner, Update
from gossamer.pruning.reconstruction import Reconstruction
from gossamer.pruning.report import PruneReport
from gossamer.pruning.unfinished import Unfinished

CURVATURES: dict[str, Callable[[], Curvature]] = {
    "gram": LayerGram,
    "magnitude": Magnitude,
    "wanda": Wanda,
    "diagonal-fisher": DiagFisher,
    "block-fisher": BlockFisher,
    "mfac": MFACFisher,
}


@dataclass(frozen=True)
class SparsityRecipe:
    """How a checkpoint is pruned.

    Args:
        sparsity: share of zeros among the pruned weights' entries.
        pattern: ``unstructured``, ``2:4``, ``block4`` and the like.
        curvature: one of ``gram``, ``magnitude``, ``wanda``, ``diagonal-fisher``, ``block-fisher``, ``mfac``.
        update: ``joint``, ``independent`` or ``none``.
        reconstruction: times that each block is trained over the calibration data afterwards; 0 for not at all.
        sequences, length: of the calibration text: how many, and tokens of each.
        skip: names of modules that are not pruned.

    Raises:
        ConfigurationError: a setting has no meaning.
    """

    sparsity: float
    pattern: str = "unstructured"
    curvature: str = "gram"
    update: Update = "joint"
    reconstruction: int = 1
    sequences: int = 64
    length: int = 512
    skip: tuple[str, ...] = ("lm_head",)

    def __post_init__(self) -> None:
        if self.curvature not in CURVATURES:
            raise ConfigurationError(f"curvature is one of {', '.join(CURVATURES)}; got {self.curvature!r}")
        check_calibration(self.sequences, self.length)
        if self.reconstruction < 0:
            raise ConfigurationError(f"reconstruction counts times over the data, got {self.reconstruction}")
        check_share(self.sparsity)
        parse_pattern(self.pattern).check_sparsity(self.sparsity)

    def pruner(self, model: Any, memory: int | None, scratch: Path | None, ranks: Ranks = ALONE) -> Pruner:
        """The pruner of a language model."""
        curvature = CURVATURES[self.curvature]()
        scope: Scope = "row" if isinstance(curvature, Wanda) else "layer"  # Wanda's own; the others are better off so
        pattern = parse_pattern(self.pattern, "global" if curvature.source == "gradients" else scope)
        in_blocks = curvature.source == "inputs" or self.reconstruction > 0
        return Pruner(
            model,
            curvature,
            pattern,
            self.update,
            exclude=self.skip,
            blocks=decoder_blocks(model) if in_blocks else None,
            reconstruction=Reconstruction(self.reconstruction) if self.reconstruction else None,
            memory=memory,
            scratch=scratch,
            ranks=ranks,
        )


@dataclass(frozen=True)
class SparseReport:
    """What a compression made.

    Attributes:
        path: the directory.
        bytes: its size; ``source_bytes`` that of what it was made from.
        pruning: what was pruned, with predicted and measured losses.
        quantization: what was quantized, if anything was, in the process that wrote it.
        resumed: parts that an interrupted run had left.
    """

    path: Path
    bytes: int
    source_bytes: int
    pruning: PruneReport
    quantization: QuantizationReport | None
    resumed: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "pruning": self.pruning.to_dict(),
            "quantization": self.quantization and self.quantization.to_dict(),
            "resumed": self.resumed,
        }


def compress_sparse(
    model: str | Path,
    output: str | Path,
    recipe: SparsityRecipe,
    text: str,
    *,
    int8: GossamerInt8Config | None = None,
    dtype: str = "auto",
    memory: int | None = None,
    overwrite: bool = False,
    on_progress: OnProgress = lambda phase, done, total: None,
    on_bytes: Progress = lambda done, total: None,
    ranks: Ranks = ALONE,
) -> SparseReport:
    """Prunes a model, and writes the result as a Hugging Face directory: dense with zeros, or int8.

    The model is pruned in fp32. What is done of it is kept beside the output (``.NAME.unfinished-...``) until the
    output is complete: the same call after an interruption goes on from there. ``masks.safetensors`` holds the masks,
    unless the model is int8, and ``gossamer.json`` the recipe and the digest of the calibration tokens.

    Args:
        model: whatever :func:`gossamer.models.resolve_model` understands.
        output: the directory to write.
        recipe: how to prune.
        text: to calibrate on.
        int8: how to quantize afterwards; not by default.
        dtype: of what is not int8: ``auto`` keeps the checkpoint's.
        memory: bytes that the process may take.
        overwrite: replace a checkpoint that is there.
        on_progress: called with the phase, what is done of it, and all of it.
        on_bytes: called with the bytes that are written and the bytes there will be.
        ranks: the processes that do it together, each called with the same arguments; see
            :class:`~gossamer.pruning.pruner.Pruner`. The first one keeps parts and writes. Where they run on several
            machines, each finds the model on its own disk, and ``memory`` is for each.

    Raises:
        ConfigurationError: ``output`` cannot be used, the model is quantized, the text is too short, or memory does not
            suffice.
        GossamerError: what loading raises, or ``output`` cannot be written.
    """
    target = Path(output).resolve()
    first = ranks.rank == 0
    with together(ranks, "loading the model"):
        ModelOptions(dtype=dtype)  # refuses an unknown one
        source = resolve_model(model)
        if first:
            check_output(source.resolve(), target, is_file=False, overwrite=overwrite)
        stored = load_config(source)
        if quantized := getattr(stored, "quantization_config", None):
            raise ConfigurationError(
                f"{source} is quantized already ({quantized.get('quant_method')}); prune the original checkpoint"
            )
        network, tokenizer = load_model(source, dtype="float32")
        with ShardReader(source) as reader:
            wanted = dtype if dtype != "auto" else str(stored.dtype or reader.stored_dtype()).removeprefix("torch.")
        batches = calibration_batches(tokenizer, text, recipe.sequences, recipe.length)
        packed = separate_experts(network)
        scratch = target.parent if target.parent.is_dir() else None
        pruner = recipe.pruner(network, _for_statistics(network, recipe, memory), scratch, ranks)
        settings = {"model": str(model), "sparsity": asdict(recipe), "calibration_sha256": digest(batches)}
    ranks.add(torch.zeros(0), agreed=f"{settings}\n{_sizes(source)}\n{int8}\n{wanted}")
    parts = Unfinished(parts_directory(target, source, settings))
    loss = None if recipe.curvature == "magnitude" and not recipe.reconstruction else _loss
    report = pruner.prune_to(recipe.sparsity, batches, loss, unfinished=parts, progress=on_progress)
    quantization, written = None, 0
    with together(ranks, "writing the model"):
        if first:
            quantization = _write(network, tokenizer, packed, pruner, int8, wanted, target, settings, report, on_bytes)
            remove_parts(target)
            written = size_of(target)
    written = int(ranks.add(torch.tensor([written], dtype=torch.float64)))
    return SparseReport(target, written, size_of(source), report, quantization, parts.taken)


def _write(
    network: Any,
    tokenizer: Any,
    packed: dict[str, Any],
    pruner: Pruner,
    int8: GossamerInt8Config | None,
    dtype: str,
    target: Path,
    settings: dict[str, Any],
    report: PruneReport,
    on_bytes: Progress,
) -> QuantizationReport | None:
    """The pruned model, quantized if asked for; what was quantized."""
    quantization = None
    if int8 is None:
        for name, experts in packed.items():  # whose weights were pruned in place
            network.set_submodule(name, experts)
    else:
        quantization = quantize(
            network,
            int8.threshold,
            int8.skip,
            int8.outliers,
            criterion=int8.criterion,
            outlier_store=int8.outlier_store,
        )
        settings |= {"int8": network.config.quantization_config.to_dict(), "skipped": quantization.skipped}
    network = network.to(getattr(torch, dtype))
    network.config.dtype = getattr(torch, dtype)
    with all_or_nothing(target) as unfinished:
        write_model(network, tokenizer, unfinished, on_bytes)
        if int8 is None:
            save_masks(unfinished / MASKS, pruner.masks)
        write_manifest(unfinished, settings | {"pruning": report.to_dict()})
    return quantization


def _sizes(source: Path) -> dict[str, int]:
    """Of the files of a model, for whether processes have the same."""
    return {path.name: path.stat().st_size for path in sorted(source.iterdir()) if path.suffix == ".safetensors"}


def _loss(outputs: Any, batch: Any) -> Tensor:
    loss: Tensor = outputs.loss
    return loss


def _for_statistics(network: Any, recipe: SparsityRecipe, memory: int | None) -> int | None:
    """What of ``memory`` is left for statistics beside the model and the calibration data."""
    if memory is None:
        return None
    weights = sum(parameter.nbytes for parameter in network.parameters())
    width = network.get_input_embeddings().weight.shape[1]
    states = 4 * width * recipe.sequences * recipe.length * (3 if recipe.reconstruction else 2)
    left = memory - weights - states
    if left <= 0:
        raise ConfigurationError(
            f"{memory / 1e9:,.2f} GB of memory do not suffice: the model takes {weights / 1e9:,.2f} GB in float32, and "
            f"the hidden states of {recipe.sequences} sequences of {recipe.length} tokens {states / 1e9:,.2f} GB"
        )
    return left
