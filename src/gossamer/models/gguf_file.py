"""A GGUF file as it stands on disk: its parts, its keys and values, its tensors. Nothing is interpreted here.

The layout is that of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_parts import parts_of
from gossamer.nn.block_types import BLOCK_TYPES
from gossamer.nn.stored_matrix import Mapped

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MOST_VERSIONS = 2**16  # beyond it are bytes in the other order, or no number at all
# Formats of struct, by the number of the type. Text (8) and lists (9) are of any length.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9
_LENGTH = struct.Struct("<Q")  # of a text
_MOST_DIMENSIONS = 4


def check_magic(path: Path) -> None:
    """Refuses a file that does not start like a GGUF file.

    Raises:
        CheckpointError: the first four bytes are not ``GGUF``.
    """
    with path.open("rb") as file:
        found = file.read(len(_MAGIC))
    if found != _MAGIC:
        raise CheckpointError(
            f"{path} is not a GGUF file: it starts with {found!r} instead of {_MAGIC!r}. "
            "An interrupted download or a Git LFS pointer looks like this; fetch the file again."
        )


@cache
def _can_dequantize(kind: gguf.GGMLQuantizationType) -> bool:
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of a file.

    Attributes:
        name: in the file.
        shape: sizes, the slowest dimension first, as in PyTorch.
        type: how its values are stored.
        data: ``[..., bytes of a row]`` of uint8, mapped from the file.
        path: of the file, one part of it if it is split.
        mapped: where in that file the data lie.
    """

    name: str
    shape: tuple[int, ...]
    type: gguf.GGMLQuantizationType
    data: np.ndarray
    path: Path
    mapped: Mapped

    @property
    def in_blocks(self) -> bool:
        """Whether several values share a scale, so that the tensor holds no plain numbers."""
        return gguf.GGML_QUANT_SIZES[self.type][0] > 1

    def dequantize(self, rows: Any = ...) -> np.ndarray:
        """Values of some rows, or of all, float32."""
        return gguf.quants.dequantize(self.data[rows], self.type).astype(np.float32, copy=False)

    def check_scales(self) -> None:
        """Looks at the scales of all blocks, of types that can be used as they are stored.

        Raises:
            CheckpointError: one is NaN or infinite; says where.
        """
        if (block := BLOCK_TYPES.get(self.type.name)) is None:
            return
        place = block.first_bad_block(self.data.reshape(-1, block.bytes))
        if place is not None:
            raise CheckpointError(
                f"{self.path}: {self.name} has a block whose scale is NaN or infinite, at byte "
                f"{self.mapped.offset + place * block.bytes} of the file. The file is damaged; fetch or make it again."
            )
        self.mapped.release()


class GGUFFile:
    """The keys and tensors of a GGUF file, split or not.

    Args:
        path: the file, or any part of a split one.

    Attributes:
        path: what was given.
        tensors: by name.

    Raises:
        CheckpointError: a file is damaged, incomplete, no GGUF file, or a part is missing.
        UnsupportedModelError: a tensor is stored in a way that is unknown here.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        parts = parts_of(path)
        read = [_Part(part) for part in parts]
        self._values = read[0].values
        self._check_parts(read)
        self.tensors: dict[str, GGUFTensor] = {}
        for part in read:
            for tensor in part.tensors:
                if tensor.name in self.tensors:
                    raise CheckpointError(f"{path} holds the tensor {tensor.name} twice")
                self.tensors[tensor.name] = tensor
        expected = self.get("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise CheckpointError(f"the parts of {path} hold {len(self.tensors)} tensors instead of {expected}")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """The value of a key: a number, a bool, a string, or a list of one of these."""
        return self._values.get(key, default)

    @property
    def names(self) -> list[str]:
        """The keys, in the order of the file."""
        return list(self._values)

    @property
    def in_blocks(self) -> bool:
        """Whether a tensor of it is in quantized blocks."""
        return any(tensor.in_blocks for tensor in self.tensors.values())

    @cached_property
    def architecture(self) -> str:
        """What computation the weights are for, in GGUF's terms."""
        name = self.get("general.architecture")
        if not isinstance(name, str):
            raise CheckpointError(f"{self.path} does not say its architecture (general.architecture)")
        return name

    def _check_parts(self, parts: Sequence[_Part]) -> None:
        count = self.get("split.count", 0)
        if count < 2 and len(parts) == 1:
            return
        if count != len(parts):
            raise CheckpointError(
                f"{self.path} says that it is a part of a split GGUF file of {count} parts, but its name says "
                f"{len(parts)}. Give the parts the names NAME-00001-of-{count:05d}.gguf and so on, in one directory."
            )
        for number, part in enumerate(parts):
            if part.values.get("split.no") != number:
                raise CheckpointError(f"{part.path} is not part {number + 1} of {count}, as its name says")


class _Part:
    """One file."""

    def __init__(self, path: Path) -> None:
        check_magic(path)
        self.path = path
        with path.open("rb") as file:
            self._mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = memoryview(self._mapping)
        self._at = len(_MAGIC)
        self.values: dict[str, Any] = {}
        self.tensors: list[GGUFTensor] = []
        (version,) = self._numbers("I", 1)
        if not 0 < version <= _MOST_VERSIONS:
            raise self._damage(f"it says that it is of version {version} of GGUF")
        if version not in _VERSIONS:
            raise UnsupportedModelError(f"{path} is of version {version} of GGUF; versions 2 and 3 are read")
        num_tensors, num_values = self._numbers("Q", 2)
        for _ in range(self._count(num_values)):
            key = self._text()
            if key in self.values:
                raise self._damage(f"it has the key {key} twice")
            (kind,) = self._numbers("I", 1)
            self.values[key] = self._value(kind)
        described = [self._description() for _ in range(self._count(num_tensors))]
        alignment = self.values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise self._damage(f"general.alignment is {alignment!r}")
        begin = -(-self._at // alignment) * alignment
        self.tensors = [self._tensor(*each, begin=begin) for each in described]

    def _damage(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} is damaged or incomplete: {what}")

    def _take(self, size: int) -> memoryview:
        if size > len(self._view) - self._at:
            raise self._damage(f"it ends after {len(self._view)} bytes, in the middle of what it says of itself")
        self._at += size
        return self._view[self._at - size : self._at]

    def _count(self, number: int) -> int:
        """A count of things that take at least a byte each, so that a damaged one is seen at once."""
        if number > len(self._view) - self._at:
            raise self._damage(f"it has {len(self._view)} bytes, and claims to hold {number} things")
        return number

    def _numbers(self, kind: str, count: int) -> tuple[Any, ...]:
        return struct.unpack(f"<{count}{kind}", self._take(self._count(count) * struct.calcsize(kind)))

    def _text(self) -> str:
        (length,) = self._numbers("Q", 1)
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError:
            raise self._damage("a text in it is not UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], 1)[0]
        if kind == _TEXT:
            return self._text()
        if kind != _LIST:
            raise self._damage(f"a value has the type {kind}, which does not exist")
        (kind,) = self._numbers("I", 1)
        (count,) = self._numbers("Q", 1)
        if kind in _NUMBERS:
            return list(self._numbers(_NUMBERS[kind], count))
        if kind != _TEXT:
            raise self._damage(f"a list has values of the type {kind}, which are not read in lists")
        return self._texts(self._count(count))

    def _texts(self, count: int) -> list[str]:
        """Texts one after the other; vocabularies have hundreds of thousands."""
        texts, at, end, data = [], self._at, len(self._view), self._mapping
        try:
            for _ in range(count):
                (length,) = _LENGTH.unpack_from(data, at)
                at += _LENGTH.size + length
                if at > end:
                    break
                texts.append(data[at - length : at].decode())
        except UnicodeDecodeError:
            raise self._damage("a text in it is not UTF-8") from None
        except struct.error:
            at = end + 1
        self._take(at - self._at)
        return texts

    def _description(self) -> tuple[str, tuple[int, ...], int, int]:
        """Name, shape, type and place of a tensor."""
        name = self._text()
        (dimensions,) = self._numbers("I", 1)
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise self._damage(f"the tensor {name} has {dimensions} dimensions")
        shape = self._numbers("Q", dimensions)[::-1]  # GGUF lists the fastest dimension first
        (kind,) = self._numbers("I", 1)
        (offset,) = self._numbers("Q", 1)
        return name, shape, kind, offset

    def _tensor(self, name: str, shape: tuple[int, ...], kind: int, offset: int, *, begin: int) -> GGUFTensor:
        try:
            stored = gguf.GGMLQuantizationType(kind)
        except ValueError:
            raise UnsupportedModelError(
                f"{self.path}: the tensor {name} is stored as type {kind} of ggml, which is unknown here"
            ) from None
        block_size, block_bytes = gguf.GGML_QUANT_SIZES[stored]
        if not _can_dequantize(stored):
            raise UnsupportedModelError(f"{self.path}: {name} is stored as {stored.name}, which cannot be dequantized")
        if shape[-1] % block_size or 0 in shape:
            raise self._damage(f"the tensor {name} of shape {list(shape)} cannot be stored as {stored.name}")
        row_bytes = shape[-1] // block_size * block_bytes
        size = prod(shape[:-1]) * row_bytes
        start = begin + offset
        if start + size > len(self._view):
            raise self._damage(f"it has {len(self._view)} bytes, and {name} would end at {start + size}")
        data = np.frombuffer(self._mapping, np.uint8, size, start).reshape(*shape[:-1], row_bytes)
        return GGUFTensor(name, shape, stored, data, self.path, Mapped(self._mapping, start, size))
