"""How GGUF has the tensors of Qwen3.5, as llama.cpp's conversion/qwen.py writes them.

Gains are one more, the decay is ``-exp(A_log)``, and a convolution is a matrix (channels, taps). Where several heads of
values belong to a head of keys, transformers has those of a key next to each other, and GGUF one of each key, then the
next of each: head ``k n + i`` of n to a key stands at ``i keys + k``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers.modeling_gguf_pytorch_utils import GGUFTensor, TensorProcessor


class Qwen35TensorProcessor(TensorProcessor):
    """transformers' hook: the tensor of a file -> that of the model.

    Args:
        config: of the text model, as a dictionary.
    """

    def __init__(self, config: dict[str, Any] | None = None) -> None:
        super().__init__(config=config)
        assert config is not None
        self._keys, self._values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        self._width = config["linear_value_head_dim"]
        self._before_values = 2 * self._keys * config["linear_key_head_dim"]  # rows of queries and keys

    def process(self, weights: np.ndarray, name: str, **others: Any) -> GGUFTensor:
        part = name.split(".", 2)[-1]  # behind blk.N.
        if name.endswith("norm.weight") and part != "ssm_norm.weight":
            weights = weights - 1
        elif part == "ssm_a":
            weights = np.log(-weights)[self._heads(1)]
        elif part in ("ssm_dt.bias", "ssm_alpha.weight", "ssm_beta.weight"):
            weights = weights[self._heads(1)]
        elif part == "attn_gate.weight":
            weights = weights[self._heads(self._width)]
        elif part in ("attn_qkv.weight", "ssm_conv1d.weight"):
            weights = np.concatenate(
                [weights[: self._before_values], weights[self._before_values :][self._heads(self._width)]]
            )
            weights = weights[:, None] if part == "ssm_conv1d.weight" else weights
        elif part == "ssm_out.weight" and weights.shape[1] > 1:
            weights = weights[:, self._heads(self._width)]
        return GGUFTensor(weights, name, {})

    def perform_fallback_tensor_mapping(self, names: dict[str, str], suffix: str, qual_name: str, hf_name: str) -> None:
        if hf_name.endswith(".dt_bias"):
            names[f"blk.{hf_name.split('.')[2]}.ssm_dt.bias"] = hf_name

    def input_order(self, name: str) -> np.ndarray | None:
        """(K), which column of the model each column of a file's matrix is; ``None`` if they are in order."""
        if not name.endswith("ssm_out.weight") or self._values == self._keys:
            return None
        return np.argsort(self._heads(self._width))

    def _heads(self, size: int) -> np.ndarray:
        """Where in a file each of the model's value heads stands, ``size`` rows each."""
        places = np.arange(self._values * size).reshape(-1, self._keys, size)
        return places.swapaxes(0, 1).reshape(-1)
