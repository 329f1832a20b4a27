"""A checkpoint becomes one that other projects read, all at once or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gossamer.compress.format_bitsandbytes import export_bitsandbytes
from gossamer.compress.format_compressed_tensors import export_compressed_tensors
from gossamer.compress.format_gguf import export_gguf
from gossamer.compress.int8_checkpoint import NativeCheckpoint
from gossamer.compress.mixtures import find_mixture
from gossamer.compress.output import all_or_nothing, check_output, size_of
from gossamer.compress.source import FloatCheckpoint
from gossamer.errors import ConfigurationError
from gossamer.models.load import is_int8_checkpoint, load_config
from gossamer.models.resolve import resolve_model
from gossamer.models.shards import Progress

_INT8_EXPORTERS = {"bitsandbytes": export_bitsandbytes, "compressed-tensors": export_compressed_tensors}
_NO_DECOMPOSITION = (
    "GGUF has no decomposition: readers quantize activations in blocks of 32, outliers included; an outlier coarsens "
    "the 31 values beside it, and not the whole row"
)
FORMATS = (*_INT8_EXPORTERS, "gguf")


@dataclass(frozen=True)
class ExportReport:
    """What an export made.

    Attributes:
        path: the directory or file.
        format: its format.
        bytes: its size.
        source_bytes: size of the checkpoint it was made from.
        warnings: how results will differ from Gossamer's, one sentence each.
    """

    path: Path
    format: str
    bytes: int
    source_bytes: int
    warnings: tuple[str, ...]


def export(
    model: str | Path,
    output: str | Path,
    format: str,
    *,
    type: str | None = None,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Writes a checkpoint in the format of another project.

    The result is built beside ``output`` and renamed when it is complete. Whatever interrupts the export, nothing is
    left under the final name, and what was there before is still there. Memory holds one block of rows at a time.

    Args:
        model: a checkpoint with int8 weights of Gossamer's own format; for ``gguf`` also one in floating point, or
            whatever else :func:`gossamer.models.resolve_model` makes such a one of.
        output: what to write: a directory, or for ``gguf`` a file that ends in ``.gguf``.
        format: ``bitsandbytes``, ``compressed-tensors`` or ``gguf``.
        type: of a GGUF file: ``q8_0`` (default), ``q4_k_m`` or ``q4_0``; see :mod:`gossamer.compress.mixtures`.
        overwrite: replace a checkpoint or GGUF file that is there.
        progress: called with the bytes of weights that are written and the bytes there will be.

    Raises:
        ConfigurationError: ``output`` cannot be used, the format or type is unknown, or the weights of ``model`` are
            quantized in another way.
        ModelNotFoundError: there is no such model.
        CheckpointError: a file or tensor of the checkpoint is missing, damaged or of the wrong shape.
        UnsupportedModelError: the format cannot express the model.
        GossamerError: ``output`` cannot be written.
    """
    if format not in FORMATS:
        raise ConfigurationError(f"the format is {format!r}; choose one of {', '.join(FORMATS)}")
    if format != "gguf" and type is not None:
        raise ConfigurationError(f"only GGUF files are of several types; leave out {type!r} for {format}")
    mixture = find_mixture(type or "q8_0")
    directory = resolve_model(model).resolve() if format == "gguf" else Path(model).resolve()
    target = Path(output).resolve()
    check_output(directory, target, is_file=format == "gguf", overwrite=overwrite)
    if format == "gguf":
        with _open(directory) as source, all_or_nothing(target) as unfinished:
            warnings = [_NO_DECOMPOSITION] if isinstance(source, NativeCheckpoint) else []
            warnings += export_gguf(source, unfinished, progress, mixture)
    else:
        with NativeCheckpoint(directory) as native, all_or_nothing(target) as unfinished:
            unfinished.mkdir()
            warnings = _INT8_EXPORTERS[format](native, unfinished, progress)
    return ExportReport(target, format, size_of(target), size_of(directory), tuple(warnings))


def _open(directory: Path) -> NativeCheckpoint | FloatCheckpoint:
    int8 = is_int8_checkpoint(load_config(directory))
    return NativeCheckpoint(directory) if int8 else FloatCheckpoint(directory)
