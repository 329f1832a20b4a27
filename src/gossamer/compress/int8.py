"""A checkpoint becomes one with int8 weights: quantized as it is read, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.compress.output import all_or_nothing, check_output, size_of
from gossamer.compress.writing import dtype_name, write_model
from gossamer.errors import ConfigurationError
from gossamer.models.int8_quantizer import GossamerInt8Config, listening
from gossamer.models.load import load_config, load_model
from gossamer.models.manifest import write_manifest
from gossamer.models.resolve import resolve_model
from gossamer.models.shards import Progress
from gossamer.nn.quantize import QuantizationReport


@dataclass(frozen=True)
class CompressReport:
    """What a compression made.

    Attributes:
        path: the directory.
        bytes: its size; ``source_bytes`` that of what it was made from.
        rest: dtype of what is not int8, and its bytes.
        quantization: layer by layer, with what was skipped and why.
    """

    path: Path
    bytes: int
    source_bytes: int
    rest: tuple[str, int]
    quantization: QuantizationReport

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "path": str(self.path),
            "bytes": self.bytes,
            "source_bytes": self.source_bytes,
            "rest": {"dtype": self.rest[0], "bytes": self.rest[1]},
            "quantization": self.quantization.to_dict(),
        }


def compress_int8(
    model: str | Path,
    output: str | Path,
    config: GossamerInt8Config,
    *,
    dtype: str = "auto",
    overwrite: bool = False,
    on_layer: Callable[[str], None] = lambda name: None,
    on_bytes: Progress = lambda done, total: None,
) -> CompressReport:
    """Quantize a model's linear layers (LLM.int8()) and write the result as a Hugging Face directory.

    The weights are mapped from their files and quantized a few megabytes at a time, so that memory holds little more
    than the int8 model. The output is built beside its final place and renamed when it is complete.

    Args:
        model: whatever :func:`gossamer.models.resolve_model` understands.
        output: the directory to write.
        config: how to quantize.
        dtype: of what does not become int8 (embeddings, norms, skipped layers): ``auto`` keeps the checkpoint's.
        overwrite: replace a checkpoint that is there.
        on_layer: called with the name of each layer that was quantized.
        on_bytes: called with the bytes that are written and the bytes there will be.

    Raises:
        ConfigurationError: ``output`` cannot be used, a setting has no meaning, or the model is quantized already.
        GossamerError: what :func:`gossamer.models.load.load_model` raises, or ``output`` cannot be written.
    """
    target = Path(output).resolve()
    source = resolve_model(model, as_file=True)
    check_output(source.resolve(), target, is_file=False, overwrite=overwrite)
    if source.is_dir() and (stored := getattr(load_config(source), "quantization_config", None)):
        raise ConfigurationError(
            f"{source} is quantized already ({stored.get('quant_method')}); compress the original checkpoint"
        )
    with listening(on_layer):
        network, tokenizer = load_model(source, dtype=dtype, quantization=config)
    report: QuantizationReport = network.hf_quantizer.report
    with all_or_nothing(target) as unfinished:
        written = write_model(network, tokenizer, unfinished, on_bytes)
        recipe = {"model": str(model), "int8": network.config.quantization_config.to_dict()}
        write_manifest(unfinished, recipe | {"skipped": report.skipped})
    rest = dtype_name(network), written - report.bytes_after
    return CompressReport(target, size_of(target), size_of(source), rest, report)
