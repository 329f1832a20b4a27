"""A native int8 checkpoint becomes one that other projects read, all at once or not at all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gossamer.compress.format_bitsandbytes import export_bitsandbytes
from gossamer.compress.format_compressed_tensors import export_compressed_tensors
from gossamer.compress.format_gguf import export_gguf
from gossamer.compress.int8_checkpoint import NativeCheckpoint
from gossamer.compress.output import all_or_nothing, check_output, size_of
from gossamer.errors import ConfigurationError
from gossamer.models.shards import Progress

_EXPORTERS = {
    "bitsandbytes": export_bitsandbytes,
    "compressed-tensors": export_compressed_tensors,
    "gguf": export_gguf,
}
FORMATS = tuple(_EXPORTERS)


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
    directory: str | Path,
    output: str | Path,
    format: str,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ExportReport:
    """Writes an int8 checkpoint in the format of another project.

    The result is built beside ``output`` and renamed when it is complete. Whatever interrupts the export, nothing is
    left under the final name, and what was there before is still there. Memory holds one block of rows at a time.

    Args:
        directory: a checkpoint with int8 weights of Gossamer's own format.
        output: what to write: a directory, or for ``gguf`` a file that ends in ``.gguf``.
        format: ``bitsandbytes``, ``compressed-tensors`` or ``gguf``.
        overwrite: replace a checkpoint or GGUF file that is there.
        progress: called with the bytes of weights that are written and the bytes there will be.

    Raises:
        ConfigurationError: ``output`` cannot be used, the format is unknown, or ``directory`` is no int8 checkpoint.
        ModelNotFoundError: ``directory`` is no directory.
        CheckpointError: a file or tensor of the checkpoint is missing, damaged or of the wrong shape.
        UnsupportedModelError: the format cannot express the model.
        GossamerError: ``output`` cannot be written.
    """
    if format not in _EXPORTERS:
        raise ConfigurationError(f"the format is {format!r}; choose one of {', '.join(FORMATS)}")
    source_path, target = Path(directory).resolve(), Path(output).resolve()
    check_output(source_path, target, is_file=format == "gguf", overwrite=overwrite)
    with NativeCheckpoint(source_path) as source, all_or_nothing(target) as unfinished:
        if format != "gguf":
            unfinished.mkdir()
        warnings = _EXPORTERS[format](source, unfinished, progress)
    return ExportReport(target, format, size_of(target), size_of(source_path), tuple(warnings))
