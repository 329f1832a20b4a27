"""Small int8 checkpoints in Gossamer's own format, written by hand, and what they stand for."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from gossamer.models.quiet import quiet_transformers
from gossamer.texts import reference_text

VOCAB = 400
_SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# name -> (model type, what differs from _SMALL). Sizes are such that every reader takes its defaults for what it lacks.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 32}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 128}),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 256,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "num_hidden_layers": 7,
            "sliding_window": 9,
        },
    ),
    "mixtral": ("mixtral", {"num_local_experts": 2}),
    "gpt_oss": (
        "gpt_oss",
        {
            "head_dim": 16,
            "sliding_window": 10,
            "num_local_experts": 4,
            "intermediate_size": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256}),
}


def save_model(name: str, directory: Path, **changes: Any) -> Path:
    """A random fp32 model, norms and biases included, with a byte-level tokenizer, in a new directory."""
    model_type, differences = MODELS[name]
    settings = _SMALL | differences | changes
    torch.manual_seed(sum(name.encode()))
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_config(
            hf.AutoConfig.for_model(model_type, **settings), dtype=torch.float32
        )
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.normal_(parameter.data, std=0.1, mean=float(parameter.mean()))
        model.save_pretrained(directory)
        byte_level().save_pretrained(directory)
    return directory


@functools.cache
def byte_level(*first: str, words: str | None = None) -> hf.PreTrainedTokenizerFast:
    """A byte-level BPE trained on real text.

    Args:
        first: kinds of pre-tokenizers before the byte level.
        words: a regular expression in place of GPT-2's.
    """
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True) for kind in first if kind == "Digits"]
    if words is not None:
        steps.append(pre_tokenizers.Split(Regex(words), "isolated"))
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if len(steps) > 1 else steps[0]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB - 10,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([reference_text()[:50_000]], trainer)
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes [N, K] and float32 scales [N]: absmax of each row over 127."""
    scale = weight.float().abs().amax(1) / 127
    codes = torch.round(weight.float() / scale.clamp_min(1e-30)[:, None]).clamp(-127, 127)
    return codes.to(torch.int8), scale


def write_native(
    source: Path,
    target: Path,
    *,
    keep: tuple[str, ...] = ("lm_head", "embed", "wte", "wpe"),
    outlier_columns: int = 0,
    **quantization: Any,
) -> Path:
    """Quantizes a checkpoint of one file.

    Args:
        keep: weights of two dimensions whose name contains one of these stay as they are.
        outlier_columns: so many columns of each layer are kept in 16 bit as well.
        quantization: differences from the usual configuration.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "gossamer.json"):
            shutil.copy(path, target)
    config = json.loads((source / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        path = name.removesuffix(".weight")
        if weight.dim() != 2 or any(part in name for part in keep):
            tensors[name] = weight
            continue
        if config["model_type"] == "gpt2" and "wte" not in name:
            weight = weight.T.contiguous()
        tensors[name], tensors[f"{path}.scale"] = quantize_rows(weight)
        if outlier_columns:
            columns = torch.randperm(weight.shape[1])[:outlier_columns].sort().values
            tensors[f"{path}.outlier_columns"] = columns
            tensors[f"{path}.outlier_weight"] = weight[:, columns].to(torch.bfloat16)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    usual = {"quant_method": "gossamer_int8", "threshold": 6.0, "criterion": "absolute", "outliers": "batch"}
    config["quantization_config"] = usual | {"skip": ["lm_head"]} | quantization
    (target / "config.json").write_text(json.dumps(config))
    return target


def dequantized_tensors(directory: Path) -> dict[str, Tensor]:
    """The float32 weights that an int8 checkpoint stands for."""
    tensors = load_file(directory / "model.safetensors")
    for scale_name in [name for name in tensors if name.endswith(".scale")]:
        path = scale_name.removesuffix(".scale")
        weight = tensors[f"{path}.weight"].float() * tensors.pop(scale_name)[:, None]
        if (columns := tensors.pop(f"{path}.outlier_columns", None)) is not None:
            weight[:, columns] = tensors.pop(f"{path}.outlier_weight").float()
        tensors[f"{path}.weight"] = weight
    return tensors


def dequantized_model(directory: Path) -> Any:
    """The float32 model that an int8 checkpoint of ``nn.Linear`` layers stands for."""
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]
    with quiet_transformers():
        model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**config), dtype=torch.float32)
    missing, unexpected = model.load_state_dict(dequantized_tensors(directory), strict=False)
    assert unexpected == [] and set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def divergence(reference: Tensor, other: Tensor) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions, in nats."""
    log_p, log_q = reference.float().log_softmax(-1), other.float().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
