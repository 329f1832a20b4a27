"""GGUF files of Qwen3.5: a delta rule's tensors, with as many heads of values as of keys, and with more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers as hf

from gguf_files import add_tokenizer, finish
from gossamer.compress.gguf_metadata import add_measures
from gossamer.errors import CheckpointError, GossamerError
from gossamer.kernels.library import instruction_set
from gossamer.models.load import load_model
from gossamer.options import ModelOptions
from gossamer.runners.loading import load_for_runner
from test_native_runner import scores, scores_of

Q8_0 = gguf.GGMLQuantizationType.Q8_0
TEXT = torch.randint(3, 250, (60,), generator=torch.Generator().manual_seed(5)).tolist()


def make(value_heads: int) -> Any:
    torch.manual_seed(value_heads)
    config = hf.Qwen3_5TextConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        linear_num_key_heads=2,
        linear_num_value_heads=value_heads,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        max_position_embeddings=512,
        initializer_range=0.1,
        tie_word_embeddings=False,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter.data, std=0.2, mean=float(parameter.detach().mean()))
    return model.requires_grad_(False)


def tiled(rows: np.ndarray, keys: int, values: int) -> np.ndarray:
    """One value head of each key, then the next of each."""
    heads = [rows[k * (values // keys) + i] for i in range(values // keys) for k in range(keys)]
    return np.stack(heads)


def write(model: Any, path: Path, kind: gguf.GGMLQuantizationType | None, **keys: Any) -> Path:
    """As llama.cpp converts it, spelled out head by head."""
    config = model.config
    writer = gguf.GGUFWriter(path, "qwen35")
    add_measures(writer, config)
    add_tokenizer(writer, 300)
    nk, nv, dk, dv = 2, config.linear_num_value_heads, 32, 32
    fields = {"ssm.conv_kernel": 4, "ssm.state_size": dk, "ssm.group_count": nk, "ssm.time_step_rank": nv}
    fields |= {"ssm.inner_size": nv * dv, "full_attention_interval": 4, "rope.dimension_count": 8} | keys
    for name, value in fields.items():
        writer.add_uint32(f"qwen35.{name}", value)
    writer.add_rope_dimension_sections([2, 1, 1, 0])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN35, 4)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy()
        module, _, last = name.rpartition(".")
        stored = f"{names.get_name(module)}.{last}"
        if last == "A_log":
            stored, data = f"{names.get_name(name)}", -np.exp(tiled(data, nk, nv))
        elif last == "dt_bias":
            stored, data = f"blk.{name.split('.')[2]}.ssm_dt.bias", tiled(data, nk, nv)
        elif "in_proj_a" in name or "in_proj_b" in name:
            data = tiled(data, nk, nv)
        elif "in_proj_z" in name:
            data = tiled(data.reshape(nv, dv, -1), nk, nv).reshape(data.shape)
        elif "in_proj_qkv" in name or "conv1d" in name:
            data = data.reshape(len(data), -1)
            rest = tiled(data[2 * nk * dk :].reshape(nv, dv, -1), nk, nv).reshape(nv * dv, -1)
            data = np.concatenate([data[: 2 * nk * dk], rest])
        elif "out_proj" in name:
            data = tiled(data.T.reshape(nv, dv, -1), nk, nv).reshape(data.T.shape).T
        elif "norm" in name and "linear_attn" not in name:
            data = data + 1
        data = np.ascontiguousarray(data)
        if kind is not None and data.ndim == 2 and "conv1d" not in name:
            writer.add_tensor(stored, gguf.quants.quantize(data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(stored, data)
    return finish(writer, path)


@pytest.mark.parametrize("value_heads", [2, 6])
def test_weights_come_back(value_heads: int, tmp_path: Path) -> None:
    model = make(value_heads)
    found, _ = load_model(write(model, tmp_path / "x.gguf", None), options=ModelOptions(dtype="float32"))
    wanted = model.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.allclose(tensor, wanted[name], atol=1e-6), name
    ids = torch.tensor([TEXT])
    assert torch.allclose(found(ids).logits, model(ids).logits, atol=1e-3)


@pytest.mark.skipif(instruction_set() is None, reason="the native kernels are not installed")
@pytest.mark.parametrize("value_heads", [2, 6])
def test_blocks_stay_as_they_are(value_heads: int, tmp_path: Path) -> None:
    file = write(make(value_heads), tmp_path / "x.gguf", Q8_0)
    loaded = load_for_runner(file, max_rows=64)
    assert loaded.runner.name == "native" and loaded.weights.startswith("as stored: Q8_0 ")
    plain, _ = load_model(file, options=ModelOptions(dtype="float32", weights="dequantized"))
    wanted = scores_of(plain, TEXT)
    difference = (scores(loaded.runner, TEXT) - wanted).abs()
    assert difference.mean() < 0.06 * (wanted - wanted.roll(1)).abs().mean()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ssm.state_size", 33),
        ("ssm.group_count", 3),
        ("ssm.time_step_rank", 0),
        ("ssm.inner_size", 4294967295),
        ("rope.dimension_count", 9),
    ],
)
def test_measures_that_do_not_fit_are_refused(key: str, value: int, tmp_path: Path) -> None:
    file = write(make(6), tmp_path / "x.gguf", None, **{key: value})
    with pytest.raises(CheckpointError, match=r"x\.gguf"):
        load_model(file)


@pytest.mark.parametrize("key", ["nextn_predict_layers", "ssm.unknown"])
def test_keys_that_nobody_reads_are_refused(key: str, tmp_path: Path) -> None:
    file = write(make(2), tmp_path / "x.gguf", None, **{key: 1})
    with pytest.raises(GossamerError, match=f"qwen35.{key}"):
        load_model(file)
