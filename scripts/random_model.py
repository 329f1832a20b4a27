"""Writes a model with random weights, to be timed and not to be read: a directory, or a GGUF file.

Shapes: `qwen3_moe`, 3 billion weights in experts, of which 0.6 billion are used for a token (random weights choose
experts as evenly as can be, which reads the most of them); `qwen3_5`, 0.75 billion weights, three of four layers gated
delta rules.

    python scripts/random_model.py --shape qwen3_moe --tokenizer smollm2.gguf --type Q4_K moe.gguf
    gossamer bench decode --model moe.gguf --batch 1,16 --prefix 1024
    gossamer bench serve --model moe.gguf --peers llama.cpp --clients 16 --prefix 1024

    python scripts/random_model.py --shape qwen3_5 --tokenizer smollm2.gguf qwen35
    gossamer bench decode --model qwen35 --peers transformers --batch 1,16 --prefix 1024

Weights of a file are random blocks with scales of usual size. A file of `qwen3_5` is for llama.cpp alone. The
tokenizer is that of another GGUF file, with more tokens if the shape has more.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import gguf
import numpy as np

# name -> configuration, model, and what they are made with
SHAPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", "Qwen3MoeForCausalLM", {
        "vocab_size": 49152, "hidden_size": 1024, "intermediate_size": 3072, "moe_intermediate_size": 640,
        "num_hidden_layers": 24, "num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64, "num_experts": 64,
        "num_experts_per_tok": 8, "norm_topk_prob": True, "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {
        "vocab_size": 248320, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 24,
        "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "linear_num_key_heads": 16,
        "linear_num_value_heads": 16, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
    }),
}  # fmt: skip

DRAW = np.random.default_rng(0)
# Where scales stand in a block (offset, of float16), and what makes weights of about 0.02 with random codes.
SCALES = {"Q8_0": [(0, 2.7e-4)], "Q4_0": [(0, 4.3e-3)], "Q4_K": [(0, 7e-5), (2, 3.5e-4)], "Q6_K": [(208, 1.7e-5)]}


def blocks(kind: gguf.GGMLQuantizationType, *shape: int) -> np.ndarray:
    """Random bytes, (..., bytes of a row)."""
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    data = DRAW.integers(0, 256, (*shape[:-1], shape[-1] // weights, size), dtype=np.uint8)
    for offset, scale in SCALES[kind.name]:
        data[..., offset : offset + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
    return data.reshape(*shape[:-1], -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="qwen3_moe")
    parser.add_argument("--type", choices=SCALES, default="Q8_0")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a GGUF file, whose tokenizer is taken over")
    parser.add_argument("--layers", type=int)
    parser.add_argument("output", type=Path, help="a directory, or a file that ends in .gguf")
    given = parser.parse_args()
    if given.output.suffix == ".gguf":
        write_file(given)
    else:
        write_directory(given)


def write_directory(given: argparse.Namespace) -> None:
    """As transformers saves a model in bf16."""
    import torch
    import transformers

    from gossamer.models.gguf_weights import read_gguf

    config_class, model_class, fields = SHAPES[given.shape]
    fields |= {"num_hidden_layers": given.layers} if given.layers else {}
    torch.manual_seed(0)
    with torch.device("meta"):
        model = getattr(transformers, model_class)(getattr(transformers, config_class)(**fields))
    model = model.to(torch.bfloat16).to_empty(device="cpu").requires_grad_(False)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(given.output)
    read_gguf(given.tokenizer).tokenizer.save_pretrained(given.output)


def write_file(given: argparse.Namespace) -> None:
    """As llama.cpp reads a model."""
    fields = SHAPES[given.shape][2] | ({"num_hidden_layers": given.layers} if given.layers else {})
    kind = gguf.GGMLQuantizationType[given.type]
    reader = gguf.GGUFReader(given.tokenizer)
    tokens = fields["vocab_size"]
    hidden, heads, dim = fields["hidden_size"], fields["num_attention_heads"], fields["head_dim"]
    kv = fields["num_key_value_heads"]
    writer = gguf.GGUFWriter(
        given.output, {"qwen3_moe": "qwen3moe", "qwen3_5": "qwen35"}[given.shape], use_temp_file=True
    )
    take_tokenizer(writer, reader, tokens)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(hidden)
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(1e6)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(f"{name}.weight", blocks(kind, *shape), raw_dtype=kind)

    def plain(name: str, *shape: int, value: float | None = None, suffix: str = ".weight") -> None:
        data = np.full(shape, value) if value is not None else DRAW.normal(0, 0.02, shape)
        writer.add_tensor(name + suffix, data.astype(np.float32))

    add("token_embd", tokens, hidden)
    plain("output_norm", hidden, value=1.0)
    for layer in range(fields["num_hidden_layers"]):
        at = f"blk.{layer}"
        plain(f"{at}.attn_norm", hidden, value=1.0)
        plain(f"{at}.{'ffn_norm' if given.shape == 'qwen3_moe' else 'post_attention_norm'}", hidden, value=1.0)
        if given.shape == "qwen3_5" and layer % 4 != 3:
            delta_rule(add, plain, at, fields)
        else:
            add(f"{at}.attn_q", heads * dim * (2 if given.shape == "qwen3_5" else 1), hidden)  # gates beside queries
            add(f"{at}.attn_k", kv * dim, hidden)
            add(f"{at}.attn_v", kv * dim, hidden)
            add(f"{at}.attn_output", hidden, heads * dim)
            plain(f"{at}.attn_q_norm", dim, value=1.0)
            plain(f"{at}.attn_k_norm", dim, value=1.0)
        if given.shape == "qwen3_moe":
            experts, inner = fields["num_experts"], fields["moe_intermediate_size"]
            plain(f"{at}.ffn_gate_inp", experts, hidden)
            add(f"{at}.ffn_gate_exps", experts, inner, hidden)
            add(f"{at}.ffn_up_exps", experts, inner, hidden)
            add(f"{at}.ffn_down_exps", experts, hidden, inner)
        else:
            add(f"{at}.ffn_gate", fields["intermediate_size"], hidden)
            add(f"{at}.ffn_up", fields["intermediate_size"], hidden)
            add(f"{at}.ffn_down", hidden, fields["intermediate_size"])
    if given.shape == "qwen3_moe":
        writer.add_expert_count(fields["num_experts"])
        writer.add_expert_used_count(fields["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(fields["moe_intermediate_size"])
    else:
        values = fields["linear_num_value_heads"]
        writer.add_ssm_conv_kernel(4)
        writer.add_ssm_state_size(fields["linear_key_head_dim"])
        writer.add_ssm_group_count(fields["linear_num_key_heads"])
        writer.add_ssm_time_step_rank(values)
        writer.add_ssm_inner_size(values * fields["linear_value_head_dim"])
        writer.add_full_attention_interval(4)
        writer.add_rope_dimension_count(dim // 4)
        writer.add_rope_dimension_sections([11, 11, 10, 0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def delta_rule(add: Any, plain: Any, at: str, fields: dict[str, Any]) -> None:
    """The tensors of a gated delta rule."""
    hidden, keys, values = fields["hidden_size"], fields["linear_num_key_heads"], fields["linear_num_value_heads"]
    key, value = keys * fields["linear_key_head_dim"], values * fields["linear_value_head_dim"]
    add(f"{at}.attn_qkv", 2 * key + value, hidden)
    add(f"{at}.attn_gate", value, hidden)
    plain(f"{at}.ssm_conv1d", 2 * key + value, 4)
    plain(f"{at}.ssm_dt", values, value=1.0, suffix=".bias")
    plain(f"{at}.ssm_a", values, value=-1.0, suffix="")
    add(f"{at}.ssm_beta", values, hidden)
    add(f"{at}.ssm_alpha", values, hidden)
    plain(f"{at}.ssm_norm", fields["linear_value_head_dim"], value=1.0)
    add(f"{at}.ssm_out", hidden, value)


def take_tokenizer(writer: gguf.GGUFWriter, reader: gguf.GGUFReader, tokens: int) -> None:
    """Copy the keys of a tokenizer, and add tokens that no text has, or leave the last ones out."""
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            kind, value = field.types[0], field.contents()
            inner = field.types[-1] if kind is gguf.GGUFValueType.ARRAY else None
            if name == "tokenizer.ggml.tokens":
                value = (value + [f"<unused {number}>" for number in range(tokens)])[:tokens]
            if name == "tokenizer.ggml.token_type":
                value = (value + [5] * tokens)[:tokens]
            writer.add_key_value(name, value, kind, sub_type=inner)


if __name__ == "__main__":
    main()
