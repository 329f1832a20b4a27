"""A native int8 checkpoint, read tensor by tensor.

Beside each int8 ``P.weight`` [N, K] stands ``P.scale`` float32 [N]: a weight is about ``weight * scale[:, None]``. A
static outlier store may stand there too: ``P.outlier_columns`` int64 [S] and ``P.outlier_weight`` [N, S] hold columns
in 16 bit, to be used instead of their codes. Weights that are stored without their zeros are given back with them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, ConfigurationError, ModelNotFoundError
from gossamer.models.checkpoint import check_directory
from gossamer.models.described import described_model, settle_ties, untie
from gossamer.models.int8_layout import check_scale, dense_specs, int8_layers
from gossamer.models.int8_quantizer import QUANT_METHOD
from gossamer.models.json_file import read_object
from gossamer.models.load import load_config
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.sparse_int8_linear import unpack_codes

LAYER_TENSORS = ("weight", "scale", "outlier_columns", "outlier_weight")
_BLOCK_BYTES = 4 << 20  # small enough for the caches


class NativeCheckpoint(ShardReader):
    """Opens a directory with int8 weights of Gossamer's own format; a context manager.

    Args:
        directory: the checkpoint.

    Attributes:
        directory: the checkpoint.
        config: ``config.json`` without its ``quantization_config``.
        model_config: the same as transformers understands it.
        quantization: the ``quantization_config``.
        layers: paths of the modules whose weight is int8; embeddings may be among them.

    Raises:
        ModelNotFoundError: there is no such directory.
        ConfigurationError: it is a checkpoint of another kind.
        CheckpointError: a file or tensor is missing, damaged or of the wrong shape.
        UnsupportedModelError: the model type or a dtype is unknown here.
    """

    def __init__(self, directory: Path) -> None:
        if not directory.is_dir():
            raise ModelNotFoundError(f"{directory} is no directory; give the directory of an int8 checkpoint")
        self.directory = directory
        self.model_config = load_config(directory)
        self.config: dict[str, Any] = read_object(directory / "config.json")
        self.quantization: dict[str, Any] = self.config.pop("quantization_config", None) or {}
        method = self.quantization.get("quant_method")
        if method != QUANT_METHOD:
            found = f"its weights are in the format {method!r}" if method else "its weights are not quantized"
            raise ConfigurationError(
                f"{directory} is no int8 checkpoint of Gossamer: {found}. "
                "Make one with `gossamer compress MODEL -o DIR --int8`."
            )
        check_directory(directory)
        super().__init__(directory)
        try:
            self.specs = dense_specs(self.specs, super().tensor)
            self.layers = frozenset(int8_layers(self.specs, "scale", strict=False))
            for path in self.layers:
                self._check_outliers(path)
            if not settle_ties(described_model(self.model_config), self):
                untie(self.model_config)
                self.config["tie_word_embeddings"] = False
        except BaseException:
            self.close()
            raise

    def _check_outliers(self, path: str) -> None:
        columns = self.specs.get(f"{path}.outlier_columns")
        weight = self.specs.get(f"{path}.outlier_weight")
        if columns is None and weight is None:
            return
        rows, inner = self.specs[f"{path}.weight"].shape
        if columns is None or weight is None or weight.shape != (rows, *columns.shape) or len(columns.shape) != 1:
            raise CheckpointError(
                f"{path} has an incomplete outlier store: it needs {path}.outlier_columns [S] and "
                f"{path}.outlier_weight [{rows}, S]"
            )
        indices = self.tensor(f"{path}.outlier_columns")
        if indices.dtype != torch.int64 or bool(((indices < 0) | (indices >= inner)).any()):
            raise CheckpointError(f"{path}.outlier_columns holds something else than columns of the {inner} there are")

    def tensor(self, name: str) -> Tensor:
        """See :class:`ShardReader`; a weight that is stored without its zeros is expanded into new memory."""
        path, _, last = name.rpartition(".")
        if last != "weight" or f"{path}.weight_codes" not in self._files:
            return super().tensor(name)
        codes, mask = super().tensor(f"{path}.weight_codes"), super().tensor(f"{path}.weight_mask")
        return unpack_codes(codes, mask, self.specs[name].shape[1])

    def has_outlier_store(self, path: str) -> bool:
        """Whether a layer keeps columns in 16 bit."""
        return f"{path}.outlier_columns" in self.specs

    def scale(self, path: str) -> Tensor:
        """The scales of a layer, float32 ``[N]``.

        Raises:
            CheckpointError: one is negative or not finite.
        """
        scale = self.tensor(f"{path}.scale").float()
        check_scale(f"{path}.scale", scale)
        return scale

    def row_blocks(self, name: str, order: Tensor | None = None) -> Iterator[Tensor]:
        """The weight called ``name`` in float32, dequantized if it is int8, in blocks of whole rows.

        Args:
            name: a tensor of at least one dimension.
            order: the rows wanted, int64; all of them in their own order by default.

        Yields:
            ``[n, ...]``: at most 4 MB, or one row.
        """
        path = name.removesuffix(".weight")
        tensor = self.tensor(name)
        if order is None:
            order = torch.arange(tensor.shape[0])
        per_block = max(1, _BLOCK_BYTES // max(1, 4 * tensor[:1].numel()))
        if path not in self.layers:
            for rows in order.split(per_block):
                yield tensor[rows].float()  # indexing copies
            return
        scale = self.scale(path)
        for rows in order.split(per_block):
            block = tensor[rows].float() * scale[rows, None]
            if self.has_outlier_store(path):
                block[:, self.tensor(f"{path}.outlier_columns")] = self.tensor(f"{path}.outlier_weight")[rows].float()
            yield block
