"""The file of a prefix: safetensors, with the prefix's tokens, keys and values per layer, and a checksum at the end.

    tokens      I32  (end)                     all tokens from the beginning of the text
    keys.0      ...  (Hkv, end - start, width)  of the tokens from ``start`` on, as the engine holds them
    values.0    ...  (Hkv, end - start, width)
    ...
    checksum    U8   (4)                       CRC-32, little-endian, of everything before it

The header follows from the model, ``start`` and ``end``, to the byte. So a file is checked by making the header that it
should have: whatever says something else about dtypes, shapes or places is not used.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.engine.memory import KVLayout
from gossamer.errors import CheckpointError

VERSION = "1"  # of what is described above
TOKEN_BYTES = 4
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}
_LENGTH_BYTES = 8  # of the header's length, at the beginning of the file
_MOST_HEADER = 1 << 20  # bytes; models have at most some hundreds of layers
_CHECKSUM_BYTES = 4


class ForeignFileError(CheckpointError):
    """The file is of another model, or of another version of this software."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Some tokens' keys and values, per layer (Hkv, n, width), of which ``tokens`` says which of the n they are."""

    keys: list[Tensor]
    values: list[Tensor]
    tokens: slice

    def __len__(self) -> int:
        return int(self.tokens.stop - self.tokens.start)

    def tensors(self) -> list[Tensor]:
        """In the order of a file."""
        return [each for pair in zip(self.keys, self.values, strict=True) for each in pair]


@dataclass(frozen=True, slots=True)
class PrefixFormat:
    """The files of one model.

    Args:
        layout: of its keys and values.
        model: a digest of all that decides about them, in hexadecimal digits.
        vocab_size: token ids are below it.
    """

    layout: KVLayout
    model: str
    vocab_size: int

    def header(self, start: int, end: int) -> bytes:
        """The beginning of a file, up to the first tensor."""
        entries: dict[str, object] = {
            "__metadata__": {"format": "pt", "gossamer_prefix": VERSION, "model": self.model, "start": str(start)}
        }
        place = 0
        for name, dtype, shape, size in self._tensors(start, end):
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
            place += size
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(_LENGTH_BYTES, "little") + text

    def size(self, start: int, end: int) -> int:
        """Bytes of a file."""
        return len(self.header(start, end)) + sum(size for *_, size in self._tensors(start, end))

    def name(self, start: int, tokens: bytes) -> str:
        """The file's name, which is the same in every process that would write it."""
        text = hashlib.sha256(start.to_bytes(8, "little") + tokens).hexdigest()
        return f"{self.model[:16]}-{text[:32]}.safetensors"

    def owns(self, name: str) -> bool:
        """Whether a file of this name may be one of these."""
        return name.startswith(self.model[:16])

    def _tensors(self, start: int, end: int) -> list[tuple[str, str, list[int], int]]:
        """Name, dtype, shape and bytes of each."""
        dtype, width, length = self.layout.dtype, self.layout.width, end - start
        tensors = [("tokens", "I32", [end], end * TOKEN_BYTES)]
        for index, layer in enumerate(self.layout.layers):
            for kind, dim in (("keys", layer.key_dim), ("values", layer.value_dim)):
                shape = [layer.num_kv_heads, length, width(dim)]
                tensors.append((f"{kind}.{index}", _DTYPES[dtype], shape, int(np.prod(shape)) * dtype.itemsize))
        return [*tensors, ("checksum", "U8", [_CHECKSUM_BYTES], _CHECKSUM_BYTES)]

    # --- writing -----------------------------------------------------------------------------------------------

    def write(self, file: io.FileIO, start: int, tokens: bytes, pieces: Sequence[Piece]) -> None:
        """Write a whole file.

        Args:
            file: open for writing, and empty.
            start: position of the first token of ``pieces``.
            tokens: of the prefix, see :func:`pack`.
            pieces: that follow each other, up to the end of ``tokens``.

        Raises:
            OSError: the disk is full or gone.
        """
        out = _Checked(file)
        out.write(self.header(start, len(tokens) // TOKEN_BYTES))
        out.write(tokens)
        for parts in zip(*(piece.tensors() for piece in pieces), strict=True):
            rows = [_bytes_of(each)[:, piece.tokens] for each, piece in zip(parts, pieces, strict=True)]
            for head in range(len(rows[0])):
                for each in rows:
                    out.write(each[head].data)
        out.write(out.checksum.to_bytes(_CHECKSUM_BYTES, "little"))

    # --- reading -----------------------------------------------------------------------------------------------

    def read_tokens(self, file: io.FileIO) -> tuple[int, bytes]:
        """What a file says it holds: ``start`` and the packed tokens. Keys and values are not read.

        Raises:
            ForeignFileError: another model's.
            CheckpointError: damaged, and how.
            OSError: it cannot be read.
        """
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(_read(file, _LENGTH_BYTES), "little")
        if length > _MOST_HEADER:
            raise CheckpointError(f"its header would have {length} bytes")
        text = _read(file, length)
        try:
            found = json.loads(text)
            about = found["__metadata__"]
            if (about["gossamer_prefix"], about["model"]) != (VERSION, self.model):
                raise ForeignFileError("it is of another model")
            start, end = int(about["start"]), int(found["tokens"]["shape"][0])
        except (ValueError, ArithmeticError, LookupError, TypeError, RecursionError):
            raise CheckpointError("its header is not that of a prefix") from None
        if not 0 <= start < end or self.header(start, end)[_LENGTH_BYTES:] != text:
            raise CheckpointError("its header does not fit this model's keys and values")
        if size != self.size(start, end):
            raise CheckpointError(f"it has {size} bytes instead of {self.size(start, end)}")
        tokens = _read(file, end * TOKEN_BYTES)
        ids = np.frombuffer(tokens, "<i4")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise CheckpointError(f"it has token ids that are not from 0 to {self.vocab_size - 1}")
        return start, tokens

    def read(self, file: io.FileIO, start: int, tokens: bytes, first: int, pieces: Sequence[Piece]) -> None:
        """Fill keys and values from a file.

        Args:
            file: open for reading, at its beginning.
            start, tokens: what it must hold.
            first: position of the first token of ``pieces``, ``start`` or behind it.
            pieces: that follow each other, up to the end of ``tokens`` at most. What is in them after an error is
                undefined.

        Raises:
            CheckpointError: it holds something else, or is damaged.
            OSError: it cannot be read.
        """
        if self.read_tokens(file) != (start, tokens):
            raise CheckpointError("it holds other tokens than it did")
        end = len(tokens) // TOKEN_BYTES
        checksum = zlib.crc32(tokens, zlib.crc32(self.header(start, end)))
        dtype = self.layout.dtype
        _, *tensors, _ = self._tensors(start, end)
        buffer = np.empty(max(size for *_, size in tensors), np.uint8)
        for (_, _, shape, size), *parts in zip(tensors, *(piece.tensors() for piece in pieces), strict=True):
            data = buffer[:size]
            _fill(file, data.data)
            checksum = zlib.crc32(data.data, checksum)
            rows, at = torch.from_numpy(data).view(dtype).view(shape), first - start
            for own, piece in zip(parts, pieces, strict=True):
                own[:, piece.tokens].copy_(rows[:, at : at + len(piece)])
                at += len(piece)
        if int.from_bytes(_read(file, _CHECKSUM_BYTES), "little") != checksum:
            raise CheckpointError("its checksum is wrong")


def pack(tokens: Sequence[int]) -> bytes:
    """Token ids as a file has them.

    >>> pack([1, 258])
    b'\\x01\\x00\\x00\\x00\\x02\\x01\\x00\\x00'
    """
    return np.asarray(tokens, "<i4").tobytes()


class _Checked:
    """Writes, and keeps the checksum of what was written."""

    def __init__(self, file: io.FileIO) -> None:
        self._file = file
        self.checksum = 0

    def write(self, data: bytes | memoryview) -> None:
        left = memoryview(data).cast("B")
        self.checksum = zlib.crc32(left, self.checksum)
        while left:
            left = left[self._file.write(left) :]  # one call writes two gigabytes at most


def _bytes_of(tensor: Tensor) -> np.ndarray:
    """(Hkv, n, bytes of a key) the memory of (Hkv, n, width), or of a copy if it is on another device."""
    return tensor.detach().cpu().view(torch.uint8).numpy()


def _read(file: io.FileIO, count: int) -> bytes:
    data = bytearray(count)
    _fill(file, memoryview(data))
    return bytes(data)


def _fill(file: io.FileIO, left: memoryview) -> None:
    while left:
        got = file.readinto(left)
        if not got:
            raise CheckpointError(f"it ends {len(left)} bytes early")
        left = left[got:]
