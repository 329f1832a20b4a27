"""Fields of a ``config.json`` that others compute with at once: checked before transformers sees them.

transformers makes lists as long as a model has layers, and PyTorch reserves memory by the sizes, before either looks
whether the weights agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gossamer.errors import CheckpointError

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads", "num_kv_heads")
_WIDTHS = ("hidden_size", "n_embd", "d_model", "vocab_size")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "n_shared_experts", "num_experts_per_tok")
_OTHER_SIZES = (
    *("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "moe_intermediate_size", "head_dim"),
    "type_vocab_size",
)
_LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "sliding_window")
# The largest that a field may be; published models stay a hundred times below it.
_LARGEST = (
    dict.fromkeys(_LAYERS, 1 << 14)
    | dict.fromkeys((*_HEADS, *_COUNTS), 1 << 16)
    | dict.fromkeys((*_WIDTHS, *_OTHER_SIZES), 1 << 28)
    | dict.fromkeys(_LENGTHS, 1 << 31)
)
_NEVER_ZERO = {*_LAYERS, *_HEADS, *_WIDTHS}
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
_NAMES = ("model_type", "dtype", "torch_dtype", "_name_or_path")


def check_fields(fields: Mapping[str, Any], file: Path) -> None:
    """Refuses sizes that no model has, and values of another kind than a field's.

    Args:
        fields: of ``file``, with those of the models inside it (``text_config`` and the like).

    Raises:
        CheckpointError: names the field, and what it may be.

    >>> check_fields({"text_config": {"num_hidden_layers": 0}}, Path("config.json"))
    Traceback (most recent call last):
    gossamer.errors.CheckpointError: config.json: text_config.num_hidden_layers is 0; it has to be from 1 to 16384
    """
    for path, name, value in _fields(fields):
        if name in _LARGEST:
            for size in value if isinstance(value, list) else [value]:  # some models have one per layer
                _check_size(size, name, f"{file}: {path}")
        elif name in _TOKENS:
            ids = value if isinstance(value, list) else [value]
            if not all(each is None or (isinstance(each, int) and not isinstance(each, bool)) for each in ids):
                raise CheckpointError(f"{file}: {path} is {_shown(value)}; token ids are whole numbers")
        elif name in _NAMES and not (value is None or isinstance(value, str)):
            raise CheckpointError(f"{file}: {path} is {_shown(value)}; it has to be a name")
        elif name == "architectures" and value is not None:
            if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
                raise CheckpointError(f"{file}: {path} is {_shown(value)}; it has to be a list of names")
        elif name == "tie_word_embeddings" and not (value is None or isinstance(value, bool)):
            raise CheckpointError(f"{file}: {path} is {_shown(value)}; it has to be true or false")
        elif name == "quantization_config" and not (value is None or isinstance(value, Mapping)):
            raise CheckpointError(f"{file}: {path} is {_shown(value)}; it has to be an object with fields")


def _fields(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Path, name and value of every field of the model, and of the models inside it."""
    for name, value in fields.items():
        yield name, name, value
        if name.endswith("_config") and name != "quantization_config" and isinstance(value, Mapping):
            yield from ((f"{name}.{path}", last, inner) for path, last, inner in _fields(value))


def _check_size(value: Any, name: str, where: str) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise CheckpointError(f"{where} is {_shown(value)}; it has to be a number")
    least = 1 if name in _NEVER_ZERO else -1  # -1 and 0 stand for none in some configurations
    if not least <= value <= _LARGEST[name]:
        raise CheckpointError(f"{where} is {value}; it has to be from {max(least, 0)} to {_LARGEST[name]}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
