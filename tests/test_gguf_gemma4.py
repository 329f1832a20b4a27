"""GGUF files of Gemma 4: small with inputs of layers and shared keys, large with keys as values, and with experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from architectures import make_model
from gguf_files import add_tokenizer, finish, rewrite
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.kernels.library import instruction_set
from gossamer.models.load import load_model
from gossamer.options import ModelOptions
from gossamer.runners.loading import load_for_runner
from test_native_runner import scores, scores_of

Q8_0 = gguf.GGMLQuantizationType.Q8_0
KINDS = ("gemma4", "gemma4_large", "gemma4_experts")
TEXT = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(5)).tolist()
SIZES = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32, "global_head_dim": 64, "vocab_size": 300}
SIZES |= {"vocab_size_per_layer_input": 300, "initializer_range": 0.1}
# llama.cpp takes the last two layers that keep keys to be one with a window and one without.
SIZES |= {"layer_types": [f"{kind}_attention" for kind in ("sliding", "sliding", "full", "sliding", "full")]}


def make(name: str) -> Any:
    more = {"hidden_size_per_layer_input": 32} if name == "gemma4" else {"moe_intermediate_size": 32}
    return make_model(name, **SIZES, **more)


def write(model: Any, path: Path, kind: gguf.GGMLQuantizationType | None, **changes: Any) -> Path:
    """As llama.cpp converts it."""
    config = model.config
    sliding = [each == "sliding_attention" for each in config.layer_types]
    layers, shared = len(sliding), config.num_kv_shared_layers
    heads = [
        each.self_attn.k_proj.out_features if hasattr(each.self_attn, "k_proj") else 0 for each in model.model.layers
    ]
    sizes = [32 if each else 64 for each in sliding]
    heads = [
        width // size or (2 if config.num_kv_shared_layers else 1) for width, size in zip(heads, sizes, strict=True)
    ]
    keys: dict[str, Any] = {
        "context_length": 512,
        "embedding_length": 64,
        "block_count": layers,
        "feed_forward_length": [layer.mlp.intermediate_size for layer in model.model.layers],
        "attention.head_count": 4,
        "attention.head_count_kv": heads if len(set(heads)) > 1 else heads[0],
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.sliding_window": 11,
        "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared,
        "attention.key_length": 64,
        "attention.value_length": 64,
        "attention.key_length_swa": 32,
        "attention.value_length_swa": 32,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input,
        "rope.freq_base": 1e6,
        "rope.freq_base_swa": 1e4,
        "rope.dimension_count": 64,
        "rope.dimension_count_swa": 32,
    }
    if config.enable_moe_block:
        keys |= {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 32}
    writer = gguf.GGUFWriter(path, "gemma4")
    for name, value in (keys | changes).items():
        adders = {int: writer.add_uint32, float: writer.add_float32, list: writer.add_array, str: writer.add_string}
        adders[type(value)](f"gemma4.{name}", value)
    add_tokenizer(writer, 300)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GEMMA4, layers)
    for name, tensor in model.state_dict().items():
        data = np.ascontiguousarray(tensor.numpy())
        module, _, last = name.rpartition(".")
        block = f"blk.{name.split('.')[2]}" if ".layers." in name else ""
        if name == "lm_head.weight":
            continue
        stored = {
            "layer_scalar": f"{block}.layer_output_scale.weight",
            "scale": f"{block}.ffn_gate_inp.scale",
            "per_expert_scale": f"{block}.ffn_down_exps.scale",
            "gate_up_proj": f"{block}.ffn_gate_up_exps.weight",
            "down_proj": f"{block}.ffn_down_exps.weight",
        }.get(last) or f"{names.get_name(module)}.{last}"
        if kind is not None and data.ndim > 1 and "ffn_gate_inp" not in stored:
            writer.add_tensor(stored, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    frequencies = model.model.rotary_emb.full_attention_inv_freq
    writer.add_tensor("rope_freqs.weight", np.where(frequencies.numpy() > 0, 1.0, 1e30).astype(np.float32))
    return finish(writer, path)


@pytest.mark.parametrize("name", KINDS)
def test_weights_come_back(name: str, tmp_path: Path) -> None:
    model = make(name)
    found, _ = load_model(write(model, tmp_path / "x.gguf", None), options=ModelOptions(dtype="float32"))
    wanted = model.state_dict()
    assert found.state_dict().keys() == wanted.keys()
    for each, tensor in found.state_dict().items():
        assert torch.equal(tensor, wanted[each]), each
    ids = torch.tensor([TEXT])
    assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-3)  # experts are summed in another order


@pytest.mark.skipif(instruction_set() is None, reason="the native kernels are not installed")
@pytest.mark.parametrize("name", KINDS)
def test_blocks_stay_as_they_are(name: str, tmp_path: Path) -> None:
    """Rounding rows to int8 changes no more than rounding the weights of such a random model to 8 bit has."""
    model = make(name)
    file = write(model, tmp_path / "x.gguf", Q8_0)
    loaded = load_for_runner(file, max_rows=64)
    assert loaded.runner.name == "native" and loaded.weights.startswith("as stored: Q8_0 ")
    plain, _ = load_model(file, options=ModelOptions(dtype="float32", weights="dequantized"))
    exact, rounded = scores_of(model, TEXT), scores_of(plain, TEXT)
    assert (scores(loaded.runner, TEXT) - rounded).abs().mean() < 1.5 * (rounded - exact).abs().mean()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window_pattern", [True] * 5),
        ("attention.head_count_kv", [2, 1, 1, 2, 1]),
        ("attention.head_count_kv", [2, 2, 1]),
        ("attention.head_count_kv", 0),
        ("attention.value_length_swa", 16),
        ("attention.key_length_swa", "wide"),
        ("attention.shared_kv_layers", 4294967295),
        ("attention.sliding_window", 0),
        ("embedding_length_per_layer_input", -1.0),
        ("rope.freq_base", float("nan")),
        ("rope.freq_base_swa", "far"),
        ("feed_forward_length", [96, 96, 96, 96, 192]),
        ("attention.unknown", 1),
    ],
)
def test_files_of_another_kind_are_refused(key: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises((CheckpointError, UnsupportedModelError), match=rf"gemma4\.{key}"):
        load_model(write(make("gemma4"), tmp_path / "x.gguf", None, **{key: value}))


@pytest.mark.parametrize("chosen", [0, 5, 4294967295])
def test_experts_are_at_least_one_and_at_most_all(chosen: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gemma4\.expert_used_count"):
        load_model(write(make("gemma4_experts"), tmp_path / "x.gguf", None, expert_used_count=chosen))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ["rope_freqs.weight"]}, "lacks the tensor rope_freqs.weight"),
        ({"tensors": {"per_layer_token_embd.weight": np.zeros((299, 160), np.float32)}}, "has 299 rows"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = rewrite(write(make("gemma4"), tmp_path / "x.gguf", None), tmp_path / "y.gguf", **change)
    with pytest.raises(CheckpointError, match=message):
        load_model(file)
