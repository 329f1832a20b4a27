"""safetensors shards, written block of rows by block of rows, so that no tensor has to be in memory as a whole.

A safetensors file is eight bytes with the length of its header (little-endian), the header as JSON, and the data. The
header has to come first, so names, dtypes and shapes are told beforehand; the data may then come in any order.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, GossamerError
from gossamer.models.checkpoint import WEIGHTS, WEIGHTS_INDEX

DTYPE_NAMES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.float64: "F64",
}
_ALIGNMENT = 8

# Called with the bytes that are written so far and the bytes there will be.
Progress = Callable[[int, int], None]


class TensorSpec(NamedTuple):
    """What a checkpoint says of a tensor before its data.

    >>> TensorSpec("lm_head.weight", torch.bfloat16, (1000, 64)).nbytes
    128000
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _Slot:
    """Where the next block of a tensor goes, and where the tensor ends."""

    spec: TensorSpec
    file: int
    position: int
    end: int


class ShardWriter:
    """Writes tensors into one or several safetensors files; a context manager.

    There is one file, ``model.safetensors``, or several with ``model.safetensors.index.json``, as transformers reads
    them. The files exist from the start and are complete after :meth:`close`, which the context manager calls unless it
    is left by an exception; whoever needs all or nothing writes into a temporary directory.

    Args:
        directory: exists, and holds none of these files.
        specs: all tensors; they fill the shards in this order.
        max_shard_bytes: a shard ends before the tensor that would exceed this; a larger tensor has a shard of its own.

    Raises:
        ConfigurationError: two tensors have one name, or a dtype has no name in safetensors.
        GossamerError: a file cannot be created.

    Example:
        >>> import tempfile
        >>> from safetensors.torch import load_file
        >>> directory = Path(tempfile.mkdtemp())
        >>> with ShardWriter(directory, [TensorSpec("a", torch.int8, (3, 2))]) as writer:
        ...     writer.write("a", torch.zeros(1, 2, dtype=torch.int8))
        ...     writer.write("a", torch.ones(2, 2, dtype=torch.int8))
        >>> load_file(directory / "model.safetensors")["a"].tolist()
        [[0, 0], [1, 1], [1, 1]]
    """

    def __init__(self, directory: Path, specs: Sequence[TensorSpec], *, max_shard_bytes: int = 5 * 10**9) -> None:
        if len({spec.name for spec in specs}) < len(specs):
            raise ConfigurationError("two of the tensors to write have the same name")
        if unknown := [spec for spec in specs if spec.dtype not in DTYPE_NAMES]:
            raise ConfigurationError(f"safetensors cannot hold {unknown[0].name}, which is {unknown[0].dtype}")
        shards = _distribute(specs, max_shard_bytes)
        names = _file_names(len(shards))
        self._directory = directory
        self._weight_map = {spec.name: name for name, shard in zip(names, shards, strict=True) for spec in shard}
        self._total = sum(spec.nbytes for spec in specs)
        self._slots: dict[str, _Slot] = {}
        self._files: list[int] = []
        try:
            for name, shard in zip(names, shards, strict=True):
                self._start_file(directory / name, shard)
        except OSError as error:
            self._close_files()
            raise GossamerError(f"cannot write into {directory}: {error.strerror}") from error

    def _start_file(self, path: Path, shard: list[TensorSpec]) -> None:
        # Readers may view the bytes in place, so each tensor has to start at a multiple of its element size: wide types
        # come first.
        shard = sorted(shard, key=lambda spec: -spec.dtype.itemsize)
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for spec in shard:
            end = offset + spec.nbytes
            header[spec.name] = {"dtype": DTYPE_NAMES[spec.dtype], "shape": spec.shape, "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._files.append(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        data_start = _write_at(self._files[-1], len(text).to_bytes(8, "little") + text, 0)
        for spec in shard:
            self._slots[spec.name] = _Slot(spec, self._files[-1], data_start, data_start + spec.nbytes)
            data_start += spec.nbytes

    def write(self, name: str, rows: Tensor) -> None:
        """Appends a block of rows to a tensor. Tensors may take turns.

        Args:
            name: one of the names given at the start.
            rows: ``[n, ...]``, of the tensor's dtype and the tensor's shape after the first dimension; a tensor without
                dimensions is written as such.

        Raises:
            ConfigurationError: ``rows`` do not fit the tensor, or are more than it has left.
            GossamerError: the disk is full or gone.
        """
        if name not in self._slots:
            raise ConfigurationError(f"{name} was not among the tensors to write")
        slot = self._slots[name]
        spec = slot.spec
        if rows.dtype != spec.dtype or rows.dim() != len(spec.shape) or tuple(rows.shape[1:]) != spec.shape[1:]:
            raise ConfigurationError(
                f"{name} is {spec.dtype} {list(spec.shape)}; rows of {rows.dtype} {list(rows.shape)} do not fit into it"
            )
        data = rows.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        if slot.position + data.nbytes > slot.end:
            raise ConfigurationError(f"{name} has {spec.shape[:1]} rows; more were written")
        try:
            slot.position = _write_at(slot.file, data.data, slot.position)
        except OSError as error:
            raise GossamerError(f"cannot write {self._directory / self._weight_map[name]}: {error.strerror}") from error

    def close(self) -> None:
        """Checks that every tensor is complete, and writes the index if there are several shards.

        Raises:
            CheckpointError: a tensor is incomplete.
        """
        short = [slot for slot in self._slots.values() if slot.position < slot.end]
        self._close_files()
        if short:
            missing = short[0].end - short[0].position
            raise CheckpointError(
                f"{len(short)} tensors were not written completely; {short[0].spec.name} lacks {missing} bytes"
            )
        if len(set(self._weight_map.values())) > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": self._weight_map}
            (self._directory / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def _close_files(self) -> None:
        self._slots.clear()  # the system may give the number of a closed file to another one
        while self._files:
            os.close(self._files.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._close_files()


def _distribute(specs: Sequence[TensorSpec], max_shard_bytes: int) -> list[list[TensorSpec]]:
    shards: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in specs:
        if shards[-1] and size + spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.nbytes
    return shards


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [WEIGHTS]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _write_at(file: int, data: bytes | memoryview, position: int) -> int:
    """Writes all of ``data`` and returns where it ended; one system call writes two gigabytes at most."""
    left = memoryview(data)
    while left:
        written = os.pwrite(file, left, position)
        left = left[written:]
        position += written
    return position
