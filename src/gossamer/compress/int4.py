"""A checkpoint becomes one with 4-bit weights, rounded by second order on a text; interrupted, it goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

import gossamer
from gossamer.compress.block_types import GGUF_TYPES, BlockType
from gossamer.compress.calibration import (
    calibration_batches,
    check_calibration,
    digest,
    parts_directory,
    remove_parts,
)
from gossamer.compress.format_gguf import Blocks, check_exportable, export_gguf, weight_types
from gossamer.compress.mixtures import MIXTURES
from gossamer.compress.output import all_or_nothing, check_output, size_of
from gossamer.compress.pack_quantized import GROUPS, quantization_config, w4a16
from gossamer.compress.rounding_walk import RoundedLayer, round_blocks
from gossamer.compress.source import LoadedModel, refuse_quantized, refuse_quantized_gguf
from gossamer.compress.writing import write_model
from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.models.load import load_config, load_model
from gossamer.models.manifest import MANIFEST, write_manifest
from gossamer.models.resolve import local_path, resolve_model
from gossamer.models.shards import Progress
from gossamer.nn.experts import can_separate, is_router, separate_experts
from gossamer.nn.quantize import SKIP
from gossamer.options import ModelOptions
from gossamer.pruning.job import OnProgress
from gossamer.pruning.targets import Target, find_targets
from gossamer.pruning.unfinished import Unfinished
from gossamer.system import peak_memory

GGUF_MIXTURES = ("q4_k_m", "q4_0")
W4A16 = "w4a16"
TYPES = (*GGUF_MIXTURES, W4A16)


@dataclass(frozen=True)
class Int4Recipe:
    """How a checkpoint is made 4-bit.

    Args:
        type: ``q4_k_m`` or ``q4_0`` for a GGUF file, ``w4a16`` for a compressed-tensors directory.
        sequences, length: of the calibration text: how many, and tokens of each.
        skip: with ``w4a16``, names of modules that stay in floating point; ``lm_head`` by default. In a GGUF file all
            matrices are quantized.
        relative_damping: of the moments of a layer's inputs, in units of the mean of their diagonal.

    Raises:
        ConfigurationError: a setting has no meaning.
    """

    type: str = "q4_k_m"
    sequences: int = 64
    length: int = 512
    skip: tuple[str, ...] | None = None
    relative_damping: float = 0.01

    def __post_init__(self) -> None:
        if self.type not in TYPES:
            raise ConfigurationError(f"the type of 4-bit weights is one of {', '.join(TYPES)}; got {self.type!r}")
        check_calibration(self.sequences, self.length)
        if self.is_file and self.skip is not None:
            raise ConfigurationError(
                f"all matrices of a GGUF file are quantized: nothing can be skipped with {self.type}"
            )
        if not self.relative_damping > 0:
            raise ConfigurationError(f"damping is above 0, got {self.relative_damping}")

    @property
    def is_file(self) -> bool:
        """Whether a GGUF file is written, and not a directory."""
        return self.type in GGUF_MIXTURES


@dataclass(frozen=True)
class Int4Report:
    """What a compression made. ``print(report)`` shows it.

    Attributes:
        path: the file or directory.
        bytes: its size; ``source_bytes`` that of what it was made from.
        type: as in the recipe.
        layers: weight by weight.
        warnings: how results will differ from the original's, besides the rounding.
        seconds: by phase.
        resumed: decoder blocks that an interrupted run had left.
        peak_bytes: most memory that the process has held; ``None`` where the system does not tell.
    """

    path: Path
    bytes: int
    source_bytes: int
    type: str
    layers: list[RoundedLayer]
    warnings: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    resumed: int = 0
    peak_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"path": str(self.path)}

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for layer in self.layers:
            counts[layer.type] = counts.get(layer.type, 0) + 1
        worst = max(self.layers, key=lambda layer: layer.error)
        mean = sum(layer.error for layer in self.layers) / len(self.layers)
        spent = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in self.seconds.items())
        peak = "" if self.peak_bytes is None else f"; at most {self.peak_bytes / 1e9:,.1f} GB of memory"
        return (
            f"{len(self.layers)} weights rounded: {', '.join(f'{count} {kind}' for kind, count in counts.items())}\n"
            f"error of a layer's output: {mean:.2%} in the mean, {worst.error:.2%} at most ({worst.name})\n"
            f"{spent}{peak}"
        )


def compress_int4(
    model: str | Path,
    output: str | Path,
    recipe: Int4Recipe,
    text: str,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    on_progress: OnProgress = lambda phase, done, total: None,
    on_bytes: Progress = lambda done, total: None,
) -> Int4Report:
    """Rounds a model's linear layers to 4 bits and writes the result as a GGUF file or compressed-tensors directory.

    The layers of decoder blocks are rounded by second order (:mod:`gossamer.compress.second_order`), block by block.
    Of a GGUF file, the embedding and the output layer are rounded to the nearest. What is done is kept beside the
    output (``.NAME.unfinished-...``) until it is complete: the same call after an interruption goes on from there. The
    recipe and the digest of the calibration tokens are in ``gossamer.json``, or under that key of the GGUF file.

    Args:
        model: whatever :func:`gossamer.models.resolve_model` understands, with weights in floating point.
        output: the file (``.gguf``) or directory to write.
        recipe: how.
        text: to calibrate on.
        dtype: with ``w4a16``, of scales and of what is not quantized; ``auto`` keeps the checkpoint's if it has 16 bit,
            and takes bfloat16 otherwise.
        overwrite: replace a checkpoint or GGUF file that is there.
        on_progress: called with the phase, what is done of it, and all of it.
        on_bytes: called with the bytes that are written and the bytes there will be.

    Raises:
        ConfigurationError: ``output`` cannot be used, the model is quantized already, or the text is too short.
        CheckpointError: a weight is not finite.
        UnsupportedModelError: the format cannot express the model.
        GossamerError: what loading raises, or ``output`` cannot be written.
    """
    ModelOptions(dtype=dtype)  # refuses an unknown one
    target = Path(output).resolve()
    source = _source(model)
    check_output(source.resolve(), target, is_file=recipe.is_file, overwrite=overwrite)
    config = load_config(source)
    refuse_quantized(source, config)
    network, tokenizer = load_model(source, dtype="float32")
    if not recipe.is_file:
        separate_experts(network)
    wanted = _dtype(dtype, config, recipe)
    types = _gguf_types(LoadedModel(network, source), recipe) if recipe.is_file else {}
    routers = [name for name, module in network.named_modules() if is_router(module)]
    targets = find_targets(network, exclude=[*(SKIP if recipe.skip is None else recipe.skip), *routers])
    if recipe.is_file:
        targets = {name: each for name, each in targets.items() if name in types}
    else:
        types = _w4a16_types(targets, wanted)
    batches = calibration_batches(tokenizer, text, recipe.sequences, recipe.length)
    settings = {"model": str(model), "int4": asdict(recipe), "calibration_sha256": digest(batches)}
    settings |= {} if recipe.is_file else {"dtype": str(wanted).removeprefix("torch.")}
    parts = Unfinished(parts_directory(target, source, settings))
    seconds: dict[str, float] = {}
    stored, layers = round_blocks(
        network, targets, types, batches, parts, recipe.relative_damping, on_progress, seconds
    )
    left = [name for name, module in network.named_modules() if can_separate(module)]
    warnings = [f"experts stay as they are, in {len(left)} layers, such as {left[0]}"] if left else []
    if unreached := [layer.name for layer in layers if not layer.reached]:
        warnings.append(
            f"{len(unreached)} weights of experts that no token of the text was sent to are rounded to the nearest, "
            f"among them {unreached[0]}"
        )
    settings |= {"layers": {layer.name: layer.type for layer in layers}}
    with all_or_nothing(target) as unfinished:
        if recipe.is_file:
            manifest = json.dumps({"gossamer_version": gossamer.__version__, "source": settings})
            warnings += export_gguf(
                LoadedModel(network, source),
                unfinished,
                on_bytes,
                MIXTURES[recipe.type],
                {name: Blocks(types[name].name, fields["blocks"]) for name, fields in stored.items()},
                {MANIFEST: manifest},
            )
        else:
            network.to(wanted).config.dtype = wanted
            network.config.quantization_config = _config(network, targets, types)
            write_model(network, tokenizer, unfinished, on_bytes, stored)
            write_manifest(unfinished, settings)
    remove_parts(target)
    return Int4Report(
        target, size_of(target), size_of(source), recipe.type, layers, warnings, seconds, parts.taken, peak_memory()
    )


def _source(model: str | Path) -> Path:
    if (path := local_path(model)) is not None and path.is_file():
        refuse_quantized_gguf(path)
    return resolve_model(model)


def _dtype(dtype: str, config: Any, recipe: Int4Recipe) -> torch.dtype:
    if recipe.is_file and dtype != "auto":
        raise ConfigurationError(f"what is not quantized in a GGUF file is float32, and not {dtype}")
    if dtype != "auto":
        chosen = getattr(torch, dtype)
    else:
        chosen = config.dtype if config.dtype in (torch.bfloat16, torch.float16) else torch.bfloat16
    if chosen not in (torch.bfloat16, torch.float16):
        raise ConfigurationError(f"scales of 4-bit weights are bfloat16 or float16, not {dtype}")
    return chosen


def _gguf_types(source: LoadedModel, recipe: Int4Recipe) -> dict[str, BlockType]:
    check_exportable(source)
    kinds = weight_types(source.model_config, MIXTURES[recipe.type])
    return {name: GGUF_TYPES[kind.name] for name, kind in kinds.items() if kind.name in GGUF_TYPES}


def _w4a16_types(targets: Mapping[str, Target], dtype: torch.dtype) -> dict[str, BlockType]:
    for target in targets.values():
        if not all(isinstance(module, nn.Linear) for module in target.modules):
            raise UnsupportedModelError(f"{target.name} is not of an nn.Linear, which is all that the format holds")
        if target.shape[1] % GROUPS[-1]:
            raise UnsupportedModelError(
                f"{target.name} has rows of {target.shape[1]}, which groups of {GROUPS[-1]} do not divide: skip it"
            )
    group = next(group for group in GROUPS if all(target.shape[1] % group == 0 for target in targets.values()))
    return dict.fromkeys(targets, w4a16(group, dtype))


def _config(network: nn.Module, targets: Mapping[str, Target], types: Mapping[str, BlockType]) -> dict[str, Any]:
    quantized = {id(module) for target in targets.values() for module in target.modules}
    ignore = [name for name, module in network.named_modules() if _is_product(module) and id(module) not in quantized]
    return quantization_config(next(iter(types.values())).group, ignore)


def _is_product(module: nn.Module) -> bool:
    """Whether readers of the format take a module for a linear layer: one, or the router of experts."""
    return isinstance(module, nn.Linear) or (is_router(module) and hasattr(module, "weight"))
