"""GGUF files are read back by the gguf package and by transformers: same weights, same settings, same tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize

from gguf_files import export_model, read_model, read_tokenizer
from gossamer.compress.export import export
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models import resolve_model
from gossamer.models.quiet import quiet_transformers
from gossamer.texts import reference_text
from native_checkpoints import (
    LLAMA3_ROPE,
    VOCAB,
    dequantized_model,
    dequantized_tensors,
    divergence,
    save_model,
    write_native,
)

ARCHITECTURES = ["llama", "llama3", "mistral", "qwen2", "qwen3", "gemma3"]


def metadata(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in GGUFReader(file).fields.items()}


# --- weights and settings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_transformers_reads_the_same_model(name, tmp_path):
    native, file = export_model(name, tmp_path)
    expected, found = dequantized_model(native), read_model(file)
    for parameter, weight in expected.state_dict().items():
        bound = 1e-6
        if weight.dim() == 2:
            largest = weight.unflatten(1, (-1, 32)).abs().amax(-1, keepdim=True).expand(-1, -1, 32).flatten(1)
            bound = largest / 127 * 0.51 + largest * 2**-11  # half a step, and the rounding of the step to 16 bit
        assert ((found.state_dict()[parameter] - weight).abs() <= bound).all(), parameter
    for setting in ("hidden_size", "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "vocab_size"):
        assert getattr(found.config, setting) == pytest.approx(getattr(expected.config, setting)), setting
    if name == "llama3":  # transformers does not read these factors; llama.cpp does
        found.config.rope_parameters = LLAMA3_ROPE
        found.model.rotary_emb = type(found.model.rotary_emb)(found.config)
    ids = torch.randint(0, VOCAB, (1, 50))
    with torch.no_grad():
        reference = expected(ids).logits
        assert divergence(reference, found(ids).logits) < 0.01 * divergence(reference, reference.roll(1, dims=1))


def test_biases_are_there_and_turn_with_the_rows_they_belong_to(tmp_path):
    native, file = export_model("llama_biases", tmp_path)
    expected = dequantized_tensors(native)
    found = {t.name: torch.tensor(dequantize(t.data, t.tensor_type)) for t in GGUFReader(file).tensors}
    names = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_output": "self_attn.o_proj"}
    for gguf_name, name in (names | {"ffn_up": "mlp.up_proj"}).items():
        bias, weight = (expected[f"model.layers.1.{name}.{last}"] for last in ("bias", "weight"))
        if gguf_name in ("attn_q", "attn_k"):  # rows i and i + 16 of a head of 32 become neighbours
            order = [32 * head + i + half for head in range(len(bias) // 32) for i in range(16) for half in (0, 16)]
            bias, weight = bias[order], weight[order]
        assert torch.equal(found[f"blk.1.{gguf_name}.bias"], bias)
        torch.testing.assert_close(found[f"blk.1.{gguf_name}.weight"], weight, atol=0.005, rtol=0)


def test_the_llama3_factors_are_the_ones_transformers_applies(tmp_path):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    native, file = export_model("llama3", tmp_path)
    factors = next(tensor for tensor in GGUFReader(file).tensors if tensor.name == "rope_freqs.weight")
    config = dequantized_model(native).config
    plain = 1 / LLAMA3_ROPE["rope_theta"] ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(plain / torch.tensor(factors.data), LlamaRotaryEmbedding(config).inv_freq)
    assert len(set(factors.data.tolist())) > 2


def test_rows_that_are_no_multiple_of_32_are_f16(tmp_path):
    native = write_native(save_model("llama", tmp_path / "model", intermediate_size=72), tmp_path / "int8")
    report = export(native, tmp_path / "model.gguf", "gguf")
    expected = dequantized_tensors(native)
    kinds = {tensor.name: tensor.tensor_type for tensor in GGUFReader(report.path).tensors}
    halves = {name for name, kind in kinds.items() if kind == GGMLQuantizationType.F16}
    assert halves == {"blk.0.ffn_down.weight", "blk.1.ffn_down.weight"}
    assert any("2 tensors" in warning and "F16" in warning for warning in report.warnings)
    found = read_model(report.path).state_dict()["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(found, expected["model.layers.0.mlp.down_proj.weight"].half().float())


def test_exact_outlier_columns_are_used(tmp_path):
    source = save_model("llama", tmp_path / "model")
    native = write_native(source, tmp_path / "int8", outlier_columns=64)  # all columns of the layers of width 64
    export(native, tmp_path / "model.gguf", "gguf")
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    found = torch.from_numpy(dequantize(tensors["blk.0.ffn_up.weight"].data, GGMLQuantizationType.Q8_0))
    with quiet_transformers():
        exact = hf.AutoModelForCausalLM.from_pretrained(source).model.layers[0].mlp.up_proj.weight
    codes_only = dequantized_tensors(write_native(source, tmp_path / "plain"))["model.layers.0.mlp.up_proj.weight"]
    assert (found - exact).abs().mean() < (codes_only - exact).abs().mean()


def test_a_tied_head_is_left_out_and_an_own_one_is_there(tmp_path):
    for tied in (True, False):
        (tmp_path / str(tied)).mkdir()
        _, file = export_model("llama", tmp_path / str(tied), tie_word_embeddings=tied)
        assert ("output.weight" in {tensor.name for tensor in GGUFReader(file).tensors}) == (not tied)


def test_linear_rope_scaling_is_said(tmp_path):
    rope = {"rope_type": "linear", "rope_theta": 20000.0, "factor": 4.0}
    _, file = export_model("llama", tmp_path, rope_parameters=rope)
    found = metadata(file)
    assert (found["llama.rope.scaling.type"], found["llama.rope.scaling.factor"]) == ("linear", 4.0)
    assert found["llama.rope.freq_base"] == 20000.0


def test_a_window_that_readers_ignore_is_said(tmp_path):
    native = write_native(save_model("mistral", tmp_path / "model", sliding_window=32), tmp_path / "int8")
    assert any("beyond 32 tokens" in warning for warning in export(native, tmp_path / "m.gguf", "gguf").warnings)


YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
LONGROPE = YARN | {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("gpt2", {}, "these can: llama, mistral, qwen2, qwen3, gemma3_text"),
        ("llama", {"hidden_act": "gelu"}, "its activation is gelu"),
        ("llama", {"rope_parameters": YARN | {"beta_fast": 16.0}}, "the bounds of its YaRN"),
        ("llama", {"rope_parameters": LONGROPE}, "its RoPE type is longrope"),
        ("gemma3", {"rope_parameters": {"full_attention": YARN, "sliding_attention": PLAIN}}, "its RoPE type is yarn"),
        ("qwen2", {"rope_parameters": LLAMA3_ROPE}, "its RoPE type is llama3"),
        ("qwen3", {"attention_bias": True}, r"q_proj\.bias has no place"),
        ("gemma3", {"layer_types": ["full_attention"] * 7}, "take turns"),
        ("gemma3", {"query_pre_attn_scalar": 100}, "scales its queries by 100"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "caps its logits"),
        ("gemma3", {"rope_local_base_freq": 5000.0}, "RoPE of its sliding layers"),
    ],
)
def test_what_gguf_cannot_say_is_refused(name, changes, reason, tmp_path):
    with pytest.raises(UnsupportedModelError, match=reason):
        export_model(name, tmp_path, **changes)
    assert not (tmp_path / "model.gguf").exists()


def test_a_missing_tensor_is_named(tmp_path):
    native, _ = export_model("llama", tmp_path)
    config = json.loads((native / "config.json").read_text())
    (native / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(CheckpointError, match=r"layers\.2\..* is missing"):
        export(native, tmp_path / "other.gguf", "gguf")
    (native / "config.json").write_text(json.dumps(config | {"vocab_size": VOCAB + 8}))
    with pytest.raises(CheckpointError, match=r"embed_tokens.weight is \[400, 64\]; the model needs \[408, 64\]"):
        export(native, tmp_path / "other.gguf", "gguf")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m"])
def test_a_real_model_survives(name, tmp_path):
    native = write_native(resolve_model(name), tmp_path / "int8")
    file = export(native, tmp_path / "model.gguf", "gguf").path
    ours, theirs = hf.AutoTokenizer.from_pretrained(native), read_tokenizer(file)
    text = reference_text() + "  two  ñandú 中文 🙂\n\n\tx 12345"
    ids = ours(text)["input_ids"]
    assert theirs(text)["input_ids"] == ids
    assert theirs.chat_template == ours.chat_template
    window = torch.tensor([ids[:512]])
    with torch.no_grad():
        reference = dequantized_model(native)(window).logits
        assert divergence(reference, read_model(file)(window).logits) < 0.003
