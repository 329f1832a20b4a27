"""Experts in 4 bit: compress --int4 rounds each by what was sent to it, and such checkpoints are read as stored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from gossamer import LLM
from gossamer.compress.int4 import Int4Recipe, compress_int4
from gossamer.kernels.library import instruction_set
from gossamer.models.load import load_model
from gossamer.nn import StoredLinear
from gossamer.options import ModelOptions
from gossamer.texts import reference_text, token_windows
from native_checkpoints import VOCAB, byte_level

EXPERTS, LAYERS = 4, 2


def save(directory: Path, *, favourite: bool = False) -> Path:
    """A small Qwen3-MoE; routers that have a ``favourite`` never choose the last expert."""
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=EXPERTS,
        num_experts_per_tok=1 if favourite else 2,
        norm_topk_prob=True,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if favourite:
        for layer in model.model.layers:
            layer.mlp.gate.weight.data[-1] = layer.mlp.gate.weight.data[:-1].mean(0)  # never the largest
    model.save_pretrained(directory)
    byte_level().save_pretrained(directory)
    return directory


def ids_of(path: Path) -> torch.Tensor:
    _, tokenizer = load_model(path, "float32")
    return torch.stack(token_windows(tokenizer, reference_text()[50_000:60_000], 64, 8))


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Groups of 32, each to the nearest of 15 steps of its largest."""
    groups = weight.unflatten(1, (-1, 32))
    scale = groups.abs().amax(-1, keepdim=True) / 7
    return (torch.round(groups / scale).clamp(-8, 7) * scale).flatten(1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("experts") / "source")


@pytest.fixture(scope="module")
def compressed(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    recipe = Int4Recipe("w4a16", sequences=32, length=64)
    return compress_int4(source, tmp_path_factory.mktemp("experts") / "int4", recipe, reference_text()[:50_000])


def test_each_expert_is_stored_in_4_bit(compressed: Any) -> None:
    stored = load_file(compressed.path / "model.safetensors")
    of_experts = [name for name in stored if ".experts." in name and name.endswith("weight_packed")]
    assert len(of_experts) == LAYERS * EXPERTS * 3
    assert not any("gate_up_proj" in name for name in stored)
    config = json.loads((compressed.path / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert len(compressed.layers) == LAYERS * (4 + EXPERTS * 3)


def test_it_is_closer_to_the_original_than_the_nearest(source: Path, compressed: Any) -> None:
    original, _ = load_model(source, "float32")
    rounded, _ = load_model(compressed.path, options=ModelOptions(dtype="float32", weights="dequantized"))
    plain, _ = load_model(source, "float32")
    for name, parameter in plain.named_parameters():
        if ".experts." in name:
            for matrix in parameter.data:
                matrix.copy_(nearest(matrix))
        elif "_proj" in name:
            parameter.data.copy_(nearest(parameter.data))
    ids = ids_of(source)
    with torch.inference_mode():
        wanted = original(ids).logits
        ours, theirs = ((model(ids).logits - wanted).square().mean() for model in (rounded, plain))
    assert ours < 0.9 * theirs


@pytest.mark.skipif(instruction_set() is None, reason="the native kernels are not installed")
def test_they_are_computed_with_as_they_are_stored(compressed: Any) -> None:
    model, _ = load_model(compressed.path, options=ModelOptions(weights="as-stored"))
    assert sum(isinstance(module, StoredLinear) for module in model.modules()) == LAYERS * (4 + EXPERTS * 3)
    text = ids_of(compressed.path)[0].tolist()
    with LLM(compressed.path) as llm, LLM(compressed.path, weights="dequantized", dtype="float32") as plain:
        assert (llm.engine.runner.name, llm.weights) == ("native", f"as stored: G4BF16 {LAYERS * (4 + EXPERTS * 3)}")
        ours, expected = (
            torch.tensor(each.score({"prompt_token_ids": text}, use_tqdm=False)[0].token_logprobs[1:])
            for each in (llm, plain)
        )
    assert (ours - expected).abs().mean() < 0.06 * (expected - expected.roll(1)).abs().mean()


def test_experts_that_nothing_reaches_are_told(tmp_path: Path) -> None:
    source = save(tmp_path / "source", favourite=True)
    report = compress_int4(
        source, tmp_path / "int4", Int4Recipe("w4a16", sequences=4, length=32), reference_text()[:9000]
    )
    unreached = [layer.name for layer in report.layers if not layer.reached]
    assert unreached
    assert all(".experts." in name for name in unreached)
    assert f"{len(unreached)} weights of experts that no token of the text was sent to" in report.warnings[0]
    model, _ = load_model(report.path, options=ModelOptions(dtype="float32", weights="dequantized"))
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
