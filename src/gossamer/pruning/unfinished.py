"""Finished parts of a long pruning, on disk: an interrupted one goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from gossamer.errors import GossamerError


class Unfinished:
    """A directory of parts, a safetensors file each, which appear when they are complete.

    Args:
        directory: made with the first part.

    Attributes:
        taken: parts that were there and have been loaded.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as name:
    ...     parts = Unfinished(Path(name) / "parts")
    ...     parts.save("block-000", {"weight": torch.ones(2)})
    ...     parts.load("block-000"), parts.load("block-001")
    ({'weight': tensor([1., 1.])}, None)
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.taken = 0

    def load(self, part: str) -> dict[str, Tensor] | None:
        """The tensors of a part; ``None`` if it is not done, or its file is damaged."""
        try:
            found = load_file(self._file(part))
        except (OSError, SafetensorError):
            return None
        self.taken += 1
        return found

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a part.

        Raises:
            GossamerError: it cannot be written.
        """
        draft = self.directory / f"{part}.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
            os.replace(draft, self._file(part))
        except (OSError, SafetensorError) as error:
            raise GossamerError(f"cannot keep what is done in {self.directory}: {error}") from error

    def _file(self, part: str) -> Path:
        return self.directory / f"{part}.safetensors"
