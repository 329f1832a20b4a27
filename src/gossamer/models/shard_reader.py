"""The tensors of a checkpoint, read from its safetensors files one at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.checkpoint import weight_files, weight_map
from gossamer.models.json_file import check_regular
from gossamer.models.shards import DTYPE_NAMES, TensorSpec

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


class ShardReader:
    """Opens all safetensors files of a checkpoint; a context manager.

    The index decides which file a tensor comes from. What lies in another file besides, or in no entry of the index,
    is not part of the checkpoint.

    Tensors are views of the mapped files. Their pages are read when they are touched, and dropped by the system when
    memory is short: only what is computed from them counts.

    Args:
        source: a checkpoint directory; or the files, which then must not hold two tensors of one name.

    Attributes:
        specs: name -> dtype and shape of every tensor, in the files' order; known without reading any data.

    Raises:
        CheckpointError: a file is missing, damaged or cut off, it lacks a tensor that the index says it has, or two
            files hold a tensor of the same name and no index says which one counts.
        UnsupportedModelError: a tensor's dtype is unknown here.
    """

    def __init__(self, source: Path | Iterable[Path]) -> None:
        self.specs: dict[str, TensorSpec] = {}
        self._files: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._open = ExitStack()
        index = weight_map(source) if isinstance(source, Path) else {}
        try:
            for path in weight_files(source) if isinstance(source, Path) else source:
                self._add(path, {name for name, file in index.items() if file == path.name} if index else None)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, wanted: set[str] | None) -> None:
        check_regular(path)
        try:
            file = self._open.enter_context(safe_open(path, framework="pt"))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut off ({path.stat().st_size} bytes): {error}. Copy or download it again."
            ) from error
        there = file.keys()
        if lost := sorted((wanted or set()).difference(there)):
            raise CheckpointError(
                f"{path} lacks {len(lost)} of the tensors that the index says it has, among them {lost[0]}"
            )
        for name in there:
            if wanted is not None and name not in wanted:
                continue
            entry = file.get_slice(name)
            if entry.get_dtype() not in _DTYPES:
                raise UnsupportedModelError(f"{path}: {name} has the dtype {entry.get_dtype()}, which is unknown here")
            if name in self.specs:
                raise CheckpointError(
                    f"{path}: {name} is in another file of this checkpoint as well, and which of them counts is not "
                    "said. Gossamer's own loading goes by the index of a directory."
                )
            self.specs[name] = TensorSpec(name, _DTYPES[entry.get_dtype()], tuple(entry.get_shape()))
            self._files[name] = file
            self._paths[name] = path

    def file_of(self, name: str) -> Path:
        """The file that a tensor of :attr:`specs` comes from, for messages."""
        return self._paths[name]

    def slices(self) -> dict[str, Any]:
        """Every tensor, unread: ``[...]`` reads it, as transformers does with what it opens itself."""
        return {name: file.get_slice(name) for name, file in self._files.items()}

    def stored_dtype(self) -> str:
        """The floating-point type that most tensors have: ``float32``, ``bfloat16`` or ``float16``."""
        counts = Counter(str(spec.dtype).removeprefix("torch.") for spec in self.specs.values())
        common = (dtype for dtype, _ in counts.most_common() if dtype in ("float32", "bfloat16", "float16"))
        return next(common, "float32")

    def tensor(self, name: str) -> Tensor:
        """One tensor, as a view of its file: copy what has to outlive the reader, and do not write into it.

        Raises:
            CheckpointError: there is no tensor of that name.
        """
        if name not in self._files:
            raise CheckpointError(f"the checkpoint has no tensor {name}")
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor

    def close(self) -> None:
        """Closes the files; views that are still held keep theirs."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
