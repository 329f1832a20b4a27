"""The configuration of a model from the keys of its GGUF file.

Readers of GGUF have each architecture's computation built in; the keys give its measures. A key that is neither used
nor known to change nothing is refused by name, since the model would be another one without it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gguf import LlamaFileType
from transformers import CONFIG_MAPPING, PreTrainedConfig

from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.gguf_gemma4 import KEYS, refine_gemma4
from gossamer.models.gguf_rope import ROPE_KEYS, rope_parameters
from gossamer.models.gguf_tokenizer import GGUFVocabulary
from gossamer.models.quiet import quiet_transformers

_EMBEDDING = "token_embd.weight"
MOST = 1 << 24  # of anything that is counted
_MEASURES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_HEADS = ("attention.key_length", "attention.value_length", "rope.dimension_count", "attention.head_count_kv")
# Values at which a key changes nothing.
_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "vocab_size": lambda value: True,  # the embedding decides
    "tensor_data_layout": lambda value: True,  # where the weights came from
    "attention.causal": lambda value: value is True,
    "attention.sliding_window": lambda value: value == 0,
    "attention.max_alibi_bias": lambda value: value == 0,
    "attention.clamp_kqv": lambda value: value == 0,
    "attention.scale": lambda value: value == 0,
    "expert_count": lambda value: value == 0,
    "expert_used_count": lambda value: value == 0,
    "pooling_type": lambda value: value == 0,
    "leading_dense_block_count": lambda value: value == 0,
    "logit_scale": lambda value: value in (0, 1),
}


@dataclass(frozen=True)
class _Architecture:
    """How a model of transformers is written in GGUF.

    Attributes:
        model_type: transformers' name.
        measures: keys that other architectures lack, and the fields of the configuration they become.
        settings: what readers compute whatever the file says, where the configuration may say otherwise.
        has_head_size: whether heads may have another size than hidden size / heads.
        partial: whether heads may be rotated in part.
        by_layer: measures that may differ from layer to layer, for ``refine`` to read.
        own_rope: whether ``refine`` says all about the rotation.
        refine: what remains to be said, from the fields so far and the file.
    """

    model_type: str
    measures: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    has_head_size: bool = True
    partial: bool = False
    by_layer: tuple[str, ...] = ()
    own_rope: bool = False
    refine: Callable[[dict[str, Any], GGUFFile], None] = lambda fields, file: None


def _sliding(fields: dict[str, Any], file: GGUFFile) -> None:
    """Gemma 3: five layers with a window and a plain RoPE, one without a window and with the file's RoPE."""
    local = {"rope_type": "default", "rope_theta": float(file.get(f"{file.architecture}.rope.freq_base_swa", 10000.0))}
    fields["rope_parameters"] = {"full_attention": fields["rope_parameters"], "sliding_attention": local}
    period = file.get(f"{file.architecture}.attention.sliding_window_pattern", 6)
    if not isinstance(period, int) or period < 1:
        raise UnsupportedModelError(f"{file.path}: gemma3.attention.sliding_window_pattern is {period!r}")
    if not fields.get("sliding_window"):
        period = 1  # no window at all
        fields["sliding_window"] = fields["max_position_embeddings"]
    places = range(1, fields["num_hidden_layers"] + 1)
    fields["layer_types"] = ["sliding_attention" if place % period else "full_attention" for place in places]
    fields.setdefault("final_logit_softcapping", None)
    _scale_of_queries(fields, largest=62)


def _scale_of_queries(fields: dict[str, Any], largest: int) -> None:
    """Gemma scales queries by the size of a head, but in its largest model, which is known by its layers."""
    heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
    scale = hidden // heads if fields["num_hidden_layers"] == largest else fields["head_dim"]
    fields["query_pre_attn_scalar"] = scale


def _gemma2(fields: dict[str, Any], file: GGUFFile) -> None:
    fields.setdefault("attn_logit_softcapping", 50.0)
    fields.setdefault("final_logit_softcapping", 30.0)
    _scale_of_queries(fields, largest=46)


def _gpt_oss(fields: dict[str, Any], file: GGUFFile) -> None:
    """YaRN between fractions of pairs, as gpt-oss's own configuration says; its file does not."""
    fields["rope_parameters"]["truncate"] = False
    experts, chosen, _ = _counts(file, "expert_count", "expert_used_count", "attention.sliding_window")
    if chosen > experts:
        raise CheckpointError(f"{file.path}: gpt-oss.expert_used_count is {chosen}, of {experts} experts")
    wanted = [
        f"blk.{n}.attn_{part}.bias" for n in range(fields["num_hidden_layers"]) for part in ("q", "k", "v", "output")
    ]
    if missing := [name for name in ("output.weight", *wanted) if name not in file.tensors]:
        raise CheckpointError(f"{file.path} lacks the tensor {missing[0]}, which gpt-oss has")


def _counts(file: GGUFFile, *keys: str) -> list[int]:
    """Keys that a file must have, as counts.

    Raises:
        CheckpointError: one is missing, or no count.
    """
    if missing := [key for key in keys if f"{file.architecture}.{key}" not in file]:
        raise CheckpointError(f"{file.path} lacks the key {file.architecture}.{missing[0]}")
    return [_measure(file, key, 0) for key in keys]


def _qwen35(fields: dict[str, Any], file: GGUFFile) -> None:
    """One layer of so many attends, the others are delta rules. Of several positions, text has all alike."""
    period, places = _measure(file, "full_attention_interval", 4), range(1, fields["num_hidden_layers"] + 1)
    fields["layer_types"] = ["linear_attention" if place % period else "full_attention" for place in places]
    names = ("ssm.inner_size", "ssm.time_step_rank", "ssm.group_count", "ssm.state_size", "ssm.conv_kernel")
    inner, values, keys, _, _ = _counts(file, *names)
    if inner % values or values % keys:
        raise CheckpointError(
            f"{file.path}: qwen35.ssm.inner_size {inner}, ssm.time_step_rank {values} and ssm.group_count {keys} do "
            "not divide one another"
        )
    fields["linear_value_head_dim"] = inner // values
    (rotated,), size = _counts(file, "rope.dimension_count"), fields["head_dim"]
    if rotated % 2 or rotated > size:
        raise CheckpointError(f"{file.path}: qwen35.rope.dimension_count is {rotated}, of heads of {size}")
    fields["rope_parameters"]["partial_rotary_factor"] = rotated / size


_SLIDING = {"attention.sliding_window": "sliding_window"}
_EXPERTS = {
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
}
_GEMMA = {"hidden_activation": "gelu_pytorch_tanh"}
ARCHITECTURES = {
    "llama": _Architecture("llama"),
    "qwen2": _Architecture("qwen2", has_head_size=False),
    "qwen3": _Architecture("qwen3"),
    "qwen3moe": _Architecture("qwen3_moe", _EXPERTS, {"norm_topk_prob": True}),
    "qwen35": _Architecture(
        "qwen3_5_text",
        {
            "ssm.conv_kernel": "linear_conv_kernel_dim",
            "ssm.state_size": "linear_key_head_dim",
            "ssm.group_count": "linear_num_key_heads",
            "ssm.time_step_rank": "linear_num_value_heads",
        },
        partial=True,
        refine=_qwen35,
    ),
    "gpt-oss": _Architecture(
        "gpt_oss",
        _SLIDING
        | {
            "expert_count": "num_local_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "intermediate_size",
        },
        refine=_gpt_oss,
    ),
    "gemma2": _Architecture(
        "gemma2",
        _SLIDING
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        _GEMMA | {"sliding_window": 4096},
        refine=_gemma2,
    ),
    "gemma4": _Architecture(
        "gemma4_text",
        _SLIDING
        | {
            "final_logit_softcapping": "final_logit_softcapping",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        _GEMMA,
        by_layer=("feed_forward_length", "attention.head_count_kv"),
        own_rope=True,
        refine=refine_gemma4,
    ),
    "gemma3": _Architecture(
        "gemma3_text",
        _SLIDING | {"final_logit_softcapping": "final_logit_softcapping"},
        _GEMMA | {"attn_logit_softcapping": None},
        refine=_sliding,
    ),
}
_KEYS_OF_REFINEMENTS = {
    "gemma3": ("rope.freq_base_swa", "attention.sliding_window_pattern"),
    "gemma4": KEYS,
    "qwen35": ("full_attention_interval", "ssm.inner_size", "rope.dimension_sections"),
}


def check_architecture(file: GGUFFile) -> None:
    """Refuses an architecture whose keys and tensors are not known here.

    Raises:
        UnsupportedModelError: names those that are known.
    """
    if file.architecture not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{file.path}: GGUF files of the architecture {file.architecture} are not supported; these are: "
            f"{', '.join(ARCHITECTURES)}"
        )


def embedding_rows(file: GGUFFile) -> int:
    """How many tokens the model knows.

    Raises:
        CheckpointError: the file has no embedding.
    """
    if _EMBEDDING not in file.tensors or len(file.tensors[_EMBEDDING].shape) != 2:
        raise CheckpointError(f"{file.path} lacks the tensor {_EMBEDDING}, or it is no matrix")
    return file.tensors[_EMBEDDING].shape[0]


def stored_as(file: GGUFFile) -> str:
    """How a file stores its weights, such as ``Q4_1``: what it says, or the type of most of its bytes."""
    try:
        return LlamaFileType(file.get("general.file_type")).name.removeprefix("MOSTLY_").removeprefix("ALL_")
    except ValueError:
        bytes_of = Counter[str]()
        for tensor in file.tensors.values():
            bytes_of[tensor.type.name] += tensor.data.nbytes
        return bytes_of.most_common(1)[0][0]


def read_config(file: GGUFFile, vocabulary: GGUFVocabulary) -> PreTrainedConfig:
    """The configuration of a file.

    Raises:
        CheckpointError: a key is missing, or its value does not fit the weights.
        UnsupportedModelError: an architecture, or a key of it, that is unknown here.
    """
    check_architecture(file)
    architecture = ARCHITECTURES[file.architecture]
    _refuse_unknown_keys(file, architecture)
    fields: dict[str, Any] = dict(architecture.settings)
    for key, name in (_MEASURES | dict(architecture.measures)).items():
        if (value := file.get(f"{file.architecture}.{key}")) is not None:
            fields[name] = _single(
                file, key, value[0] if key in architecture.by_layer and isinstance(value, list) else value
            )
        elif key in _MEASURES:
            raise CheckpointError(f"{file.path} lacks the key {file.architecture}.{key}")
    if "attention.head_count_kv" in architecture.by_layer:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    else:
        fields["num_key_value_heads"] = _measure(file, "attention.head_count_kv", fields["num_attention_heads"])
    _check_sizes(file, fields)
    _add_heads(file, fields, architecture)
    if not architecture.own_rope:
        fields["rope_parameters"] = rope_parameters(file, fields["max_position_embeddings"])
    architecture.refine(fields, file)
    fields |= _biases(file, architecture)
    fields["vocab_size"] = embedding_rows(file)
    fields["tie_word_embeddings"] = "output.weight" not in file.tensors
    fields |= _special_tokens(vocabulary)
    fields["gguf_file_type"] = stored_as(file)
    try:
        with quiet_transformers():
            return CONFIG_MAPPING[architecture.model_type](**fields)
    except Exception as error:  # config classes check their fields with assorted builtin and strict-dataclass errors
        raise CheckpointError(f"{file.path} has a value that {file.architecture} does not accept: {error}") from error


def _refuse_unknown_keys(file: GGUFFile, architecture: _Architecture) -> None:
    used = {*_MEASURES, *architecture.measures, *_HEADS, *ROPE_KEYS, *_KEYS_OF_REFINEMENTS.get(file.architecture, ())}
    for key in file.names:
        name = key.removeprefix(f"{file.architecture}.")
        if name == key or name in used or (name in _NEUTRAL and _NEUTRAL[name](file.get(key))):
            continue
        raise UnsupportedModelError(
            f"{file.path}: the key {key} ({str(file.get(key))[:60]}) is not known here, and leaving it out would "
            "change the model"
        )


def _single(file: GGUFFile, key: str, value: Any) -> Any:
    """A measure; a list has one for each layer."""
    values = set(value) if isinstance(value, list) else {value}
    if len(values) != 1:
        raise UnsupportedModelError(f"{file.path}: {file.architecture}.{key} differs from layer to layer")
    (only,) = values
    if not isinstance(only, int | float) or only < 0:
        raise CheckpointError(f"{file.path}: {file.architecture}.{key} is {only!r}")
    return only


def _measure(file: GGUFFile, key: str, default: int) -> int:
    value = _single(file, key, file.get(f"{file.architecture}.{key}", default))
    if not isinstance(value, int) or not 0 < value <= MOST:
        raise CheckpointError(f"{file.path}: {file.architecture}.{key} is {value!r}, not a count")
    return value


def _check_sizes(file: GGUFFile, fields: Mapping[str, Any]) -> None:
    """Measures that the weights show too, before anything is built from them."""
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size"):
        if not isinstance(fields[name], int) or fields[name] < 1:
            raise CheckpointError(f"{file.path}: {name} is {fields[name]!r}")
    width = file.tensors[_EMBEDDING].shape[1]
    blocks = {name.split(".")[1] for name in file.tensors if name.startswith("blk.")}
    for name, key, found in (
        ("hidden_size", "embedding_length", width),
        ("num_hidden_layers", "block_count", len(blocks)),
    ):
        if fields[name] != found:
            raise CheckpointError(f"{file.path}: {file.architecture}.{key} is {fields[name]}, the weights have {found}")


def _add_heads(file: GGUFFile, fields: dict[str, Any], architecture: _Architecture) -> None:
    usual = max(fields["hidden_size"] // fields["num_attention_heads"], 1)
    size = _measure(file, "attention.key_length", usual)
    others = ("attention.value_length",) if architecture.partial else ("attention.value_length", "rope.dimension_count")
    for key in others:
        # rope.dimension_count tells the size where key_length is missing.
        other = _measure(file, key, size)
        if other != size and f"{file.architecture}.attention.key_length" not in file and key == "rope.dimension_count":
            size = other
        elif other != size:
            raise UnsupportedModelError(
                f"{file.path}: {file.architecture}.{key} is {other} and its heads have {size}; such models are not "
                "supported"
            )
    if architecture.has_head_size:
        fields["head_dim"] = size
    elif size != usual:
        raise UnsupportedModelError(
            f"{file.path}: {file.architecture}.attention.key_length is {size}, and {architecture.model_type} of "
            f"transformers has heads of {usual}"
        )


def _biases(file: GGUFFile, architecture: _Architecture) -> dict[str, bool]:
    """Biases that a model may or may not have are told by the tensors."""
    known = CONFIG_MAPPING[architecture.model_type]()
    parts = {name.split(".")[2] for name in file.tensors if name.startswith("blk.") and name.endswith(".bias")}
    found = {
        "attention_bias": bool(parts & {"attn_q", "attn_k", "attn_v", "attn_output"}),
        "mlp_bias": bool(parts & {"ffn_gate", "ffn_up", "ffn_down"}),
    }
    return {name: value for name, value in found.items() if hasattr(known, name)}


def _special_tokens(vocabulary: GGUFVocabulary) -> dict[str, Any]:
    ends = vocabulary.ends
    return {
        "bos_token_id": vocabulary.ids.get("bos"),
        "eos_token_id": (ends if len(ends) > 1 else ends[0]) if ends else None,
        "pad_token_id": vocabulary.ids.get("padding"),
    }
