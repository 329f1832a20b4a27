"""Finished parts of a long pruning, on disk: an interrupted one goes on where it stopped."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


class Unfinished:
    """A directory of parts, a safetensors file each, which appear when they are complete.

    Args:
        directory: made with the first part.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as name:
    ...     parts = Unfinished(Path(name) / "parts")
    ...     parts.save("block-000", {"weight": torch.ones(2)})
    ...     parts.load("block-000"), parts.load("block-001")
    ({'weight': tensor([1., 1.])}, None)
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    def __len__(self) -> int:
        """Parts that are done."""
        return len(list(self.directory.glob("*.safetensors")))

    def load(self, part: str) -> dict[str, Tensor] | None:
        """The tensors of a part; ``None`` if it is not done, or its file is damaged."""
        try:
            return load_file(self._file(part))
        except (OSError, SafetensorError):
            return None

    def save(self, part: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps a part."""
        self.directory.mkdir(parents=True, exist_ok=True)
        draft = self._file(part).with_suffix(".tmp")
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft)
        os.replace(draft, self._file(part))

    def _file(self, part: str) -> Path:
        return self.directory / f"{part}.safetensors"
