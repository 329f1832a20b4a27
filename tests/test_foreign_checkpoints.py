"""Checkpoints in other projects' formats are read as native ones, or refused with the reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from foreign_checkpoints import LAYER, SAFETENSORS, quantization_config, read_as_native
from gossamer.compress.export import export
from gossamer.errors import (
    CheckpointError,
    UnsupportedModelError,
)
from gossamer.models import bitsandbytes_int8, compressed_tensors_int8
from gossamer.models.shard_reader import ShardReader
from gossamer.models.shards import TensorSpec
from native_checkpoints import save_model, write_native


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama with tied embeddings in int8, without an outlier store."""
    model = save_model("llama", tmp_path_factory.mktemp("models") / "llama")
    return write_native(model, model.parent / "llama-int8")


@pytest.mark.parametrize("format", SAFETENSORS)
def test_an_export_reads_back_as_the_native_checkpoint(format, native, tmp_path):
    export(native, tmp_path / "out", format)
    again, ours = read_as_native(tmp_path / "out", SAFETENSORS[format]), load_file(native / "model.safetensors")
    assert again.keys() == ours.keys()
    # 127 * scale / 127 may differ from scale in the last bit.
    assert all(torch.allclose(again[name].float(), ours[name].float(), rtol=2e-7, atol=0) for name in ours)
    config = SAFETENSORS[format].read_config(quantization_config(tmp_path / "out"))
    assert config["outliers"] == ("batch" if format == "bitsandbytes" else None)
    assert config["skip"] == ["lm_head"]


# --- reading foreign checkpoints -------------------------------------------------------------------------------------


def changed(config: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    """A copy in which the entry at ``path`` has another value."""
    config = json.loads(json.dumps(config))
    *parents, last = path.split("/")
    entry = config
    for parent in parents:
        entry = entry[parent]
    entry[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "reason"),
    [
        ("format", "pack-quantized", "'pack-quantized'"),
        ("config_groups", {}, "config_groups are empty"),
        ("config_groups/group_0", ["Linear"], "not spelled out"),
        ("config_groups/group_0/weights/num_bits", 4, "4-bit int"),
        ("config_groups/group_0/weights/type", "float", "8-bit float"),
        ("config_groups/group_0/weights/strategy", "group", "one scale per group"),
        ("config_groups/group_0/weights/symmetric", False, "zero-points"),
        ("config_groups/group_0/input_activations", None, "activations of group_0 are not int8"),
        ("config_groups/group_0/input_activations/dynamic", False, "static scales"),
        ("config_groups/group_0/input_activations/strategy", "tensor", "one scale per token"),
        ("config_groups/group_0/output_activations", {"num_bits": 8}, "outputs of group_0"),
        ("kv_cache_scheme", {"num_bits": 8}, "kv_cache_scheme"),
        ("sparsity_config", {"format": "sparse-24-bitmask"}, "'sparse-24-bitmask'"),
        ("config_groups/group_0/input_activations/dynamic", "local", "static scales"),
        ("transform_config", {"config_groups": {"u": {"type": "hadamard"}}}, "quantization_config.transform_config is"),
        ("config_groups/group_0/rotation", "hadamard", "config_groups.group_0.rotation is 'hadamard'"),
        ("config_groups/group_0/weights/actorder", "group", "config_groups.group_0.weights.actorder is 'group'"),
        ("config_groups/group_0/input_activations/clip", 0.9, "config_groups.group_0.input_activations.clip is 0.9"),
    ],
)
def test_other_compressed_tensors_schemes_are_refused_with_the_reason(path, value, reason, native, tmp_path):
    export(native, tmp_path / "out", "compressed-tensors")
    config = quantization_config(tmp_path / "out")
    compressed_tensors_int8.read_config(config)
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        compressed_tensors_int8.read_config(changed(config, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("transform_config", {}),
        ("transform_config", None),
        ("ignore", None),
        ("config_groups/group_0/weights/scale_dtype", "bfloat16"),
        ("run_compressed", True),
    ],
)
def test_keys_that_ask_for_nothing_are_passed_over(path, value, native, tmp_path):
    export(native, tmp_path / "out", "compressed-tensors")
    config = quantization_config(tmp_path / "out")
    assert compressed_tensors_int8.read_config(changed(config, path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [("ignore", 7), ("ignore", [["lm_head"]]), ("config_groups/group_0/weights", "int8"), ("sparsity_config", "dense")],
)
def test_settings_of_another_kind_are_named(path, value, native, tmp_path):
    export(native, tmp_path / "out", "compressed-tensors")
    config = quantization_config(tmp_path / "out")
    with pytest.raises(CheckpointError, match=re.escape(f"quantization_config.{path.replace('/', '.')} is")):
        compressed_tensors_int8.read_config(changed(config, path, value))


def test_what_bitsandbytes_settings_ask_for_is_known_or_refused():
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.rotation is 'hadamard'"):
        bitsandbytes_int8.read_config(config | {"rotation": "hadamard"})
    for threshold in ("six", -1.0, True):
        with pytest.raises(CheckpointError, match="llm_int8_threshold"):
            bitsandbytes_int8.read_config(config | {"llm_int8_threshold": threshold})
    with pytest.raises(CheckpointError, match="llm_int8_skip_modules"):
        bitsandbytes_int8.read_config(config | {"llm_int8_skip_modules": "lm_head"})


def test_four_bit_bitsandbytes_is_refused():
    with pytest.raises(UnsupportedModelError, match="4-bit"):
        bitsandbytes_int8.read_config({"quant_method": "bitsandbytes", "load_in_4bit": True})


def test_minus_128_is_kept():
    codes = torch.full((2, 3), -128, dtype=torch.int8)
    for foreign in SAFETENSORS.values():
        assert torch.equal(foreign.native_tensor("fc.weight", codes), codes)


@pytest.mark.parametrize("wrong", [-1.0, float("inf"), float("nan")])
def test_impossible_scales_are_refused(wrong):
    with pytest.raises(CheckpointError, match=r"fc\.SCB"):
        bitsandbytes_int8.native_tensor("fc.SCB", torch.tensor([1.0, wrong]))
    with pytest.raises(CheckpointError, match=r"fc\.weight_scale"):
        compressed_tensors_int8.native_tensor("fc.weight_scale", torch.tensor([[1.0], [wrong]]))


def test_other_layouts_and_zero_points_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"fc\.weight_format is 2"):
        bitsandbytes_int8.native_tensor("fc.weight_format", torch.tensor(2, dtype=torch.uint8))
    zeros = torch.zeros(3, 1, dtype=torch.int8)
    assert compressed_tensors_int8.native_tensor("fc.weight_zero_point", zeros) is None
    with pytest.raises(UnsupportedModelError, match=r"fc\.weight_zero_point is not zero"):
        compressed_tensors_int8.native_tensor("fc.weight_zero_point", zeros + 1)


@pytest.mark.parametrize(("format", "scale"), [("bitsandbytes", "SCB"), ("compressed-tensors", "weight_scale")])
def test_missing_partners_and_wrong_shapes_are_named(format, scale, native, tmp_path):
    export(native, tmp_path / "out", format)
    with ShardReader(tmp_path / "out") as reader:
        specs = reader.specs
    check = SAFETENSORS[format].check_layers
    assert len(check(specs)) == 14
    weight, name = f"{LAYER}.weight", f"{LAYER}.{scale}"
    with pytest.raises(CheckpointError, match=re.escape(f"has no {name}")):
        check({key: spec for key, spec in specs.items() if key != name})
    with pytest.raises(CheckpointError, match=re.escape(f"no int8 tensor {weight}")):
        check({key: spec for key, spec in specs.items() if key != weight})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        check(specs | {name: specs[name]._replace(shape=(95,))})
    with pytest.raises(CheckpointError, match=re.escape(name)):
        check(specs | {name: specs[name]._replace(dtype=torch.int8)})


def test_static_activation_scales_are_refused():
    with pytest.raises(UnsupportedModelError, match=r"fc\.input_scale is a static scale"):
        compressed_tensors_int8.check_layers({"fc.input_scale": TensorSpec("fc.input_scale", torch.float32, (1,))})
