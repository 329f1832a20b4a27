"""4-bit weights of GPTQ, AWQ and compressed-tensors mean what their formats say, or are refused with the reason."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig

from gossamer.errors import CheckpointError, GossamerError, UnsupportedModelError
from gossamer.models import awq_int4, compressed_tensors_int4, gptq_int4
from gossamer.models.foreign_int4 import int4_format, read_int4
from gossamer.models.shard_reader import ShardReader
from gossamer.nn.stored_matrix import StoredMatrix
from int4_checkpoints import FORMATS, Layer, config, draw, write_layer

CASES = [
    pytest.param("gptq", {"symmetric": True}, id="gptq-symmetric"),
    pytest.param("gptq", {}, id="gptq-asymmetric"),
    pytest.param("gptq_v2", {}, id="gptq_v2"),
    pytest.param("gptq", {"act_order": True}, id="gptq-act-order"),
    pytest.param("gptq_v2", {"act_order": True, "scale_type": torch.bfloat16}, id="gptq_v2-act-order-bf16"),
    pytest.param("awq", {}, id="awq"),
    pytest.param("awq", {"scale_type": torch.bfloat16}, id="awq-bf16"),
    pytest.param("pack_quantized", {"symmetric": True, "scale_type": torch.bfloat16}, id="pack-quantized-symmetric"),
    pytest.param("pack_quantized", {}, id="pack-quantized-asymmetric"),
    pytest.param("pack_quantized", {"act_order": True}, id="pack-quantized-act-order"),
]
SHAPE = 24, 128  # outputs and inputs


def read(directory: Path, settings: dict[str, Any], shape: tuple[int, int] = SHAPE) -> StoredMatrix:
    """The weight of ``fc`` in a checkpoint with these settings."""
    outputs, inputs = shape
    model = nn.ModuleDict({"fc": nn.Linear(inputs, outputs, device="meta")})
    described = LlamaConfig(quantization_config=settings)
    format = int4_format(described)
    assert format is not None
    with ShardReader(directory) as reader:
        weights = read_int4(reader, described, format, model, as_stored=True)
    assert list(weights) == ["fc.weight"] and not hasattr(described, "quantization_config")
    return weights["fc.weight"]


def told(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: settings[key] for key in ("symmetric", "act_order") if key in settings}


@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize(("format", "settings"), CASES)
def test_values_are_those_of_the_format_to_the_bit(format, settings, group_size, tmp_path):
    layer = FORMATS[format](draw(*SHAPE, group_size, **settings))
    matrix = read(write_layer(tmp_path / "a", layer), config(format, group_size, **told(settings)))
    assert matrix.shape == SHAPE
    assert torch.equal(matrix.dequantize(), layer.weight)
    assert torch.equal(matrix.dequantize(slice(3, 21)), layer.weight[3:21])
    assert torch.equal(matrix.dequantize([5, 1]), layer.weight[[5, 1]])


@pytest.mark.parametrize(("format", "settings"), CASES)
def test_blocks_hold_the_inputs_in_the_order_that_is_told(format, settings, tmp_path):
    numbers = draw(*SHAPE, 32, **settings)
    matrix = read(write_layer(tmp_path / "a", FORMATS[format](numbers)), config(format, 32, **told(settings)))
    rows = matrix.rows()
    assert rows.shape == (24, 4 * 20) and rows.dtype == np.uint8 and rows.flags.c_contiguous
    blocks = rows.reshape(24, 4, 20)
    order = np.arange(128) if matrix.input_order is None else matrix.input_order.numpy()
    assert (matrix.input_order is not None) == settings.get("act_order", False)
    for output, block in np.ndindex(24, 4):
        inputs = order[32 * block : 32 * block + 32]
        (group,) = set(numbers.groups[inputs])
        scale, zero = blocks[output, block, :2], blocks[output, block, 2:4].view(np.uint16)
        assert torch.from_numpy(scale.copy()).view(numbers.scale.dtype) == numbers.scale[output, group]
        assert zero == numbers.zero[output, group]
        for j, byte in enumerate(blocks[output, block, 4:]):
            assert (byte & 15, byte >> 4) == tuple(numbers.codes[output, inputs[[j, 16 + j]]])


@pytest.mark.parametrize("outputs", [1, 7, 40])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2", "awq"])
def test_any_number_of_outputs(format, outputs, tmp_path):
    numbers = draw(-(-outputs // 8) * 8, 64, 32)
    layer = FORMATS[format](numbers)
    tensors = {name: tensor[..., :outputs] if name == "scales" else tensor for name, tensor in layer.tensors.items()}
    if format != "awq":
        tensors["qweight"] = tensors["qweight"][:, :outputs]
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    matrix = read(write_layer(tmp_path / "a", Layer(tensors, layer.weight)), config(format, 32), (outputs, 64))
    assert torch.equal(matrix.dequantize(), layer.weight[:outputs])
    assert torch.equal(matrix.dequantize(slice(outputs // 2, outputs)), layer.weight[outputs // 2 : outputs])


def test_a_last_group_of_gptq_may_be_shorter(tmp_path):
    numbers = draw(*SHAPE, 96)
    assert numbers.scale.shape == (24, 2)
    layer = FORMATS["gptq"](numbers)
    del layer.tensors["g_idx"]  # the settings say the same
    assert torch.equal(read(write_layer(tmp_path / "a", layer), config("gptq", 96)).dequantize(), layer.weight)


def test_zero_points_of_early_compressed_tensors_are_not_packed(tmp_path):
    numbers = draw(*SHAPE, 32)
    layer = FORMATS["pack_quantized"](numbers)
    layer.tensors["weight_zero_point"] = torch.from_numpy((numbers.zero - 8).astype(np.int8))
    settings = config("pack_quantized", 32)
    assert torch.equal(read(write_layer(tmp_path / "a", layer), settings).dequantize(), layer.weight)
    layer.tensors["weight_zero_point"][3, 2] = 8
    with pytest.raises(CheckpointError, match=r"fc\.weight_zero_point\[3, 2\] is 8, beyond the range -8 to 7"):
        read(write_layer(tmp_path / "a", layer), settings)


def test_an_unused_list_of_groups_says_nothing(tmp_path):
    layer = FORMATS["pack_quantized"](draw(*SHAPE, 32))
    layer.tensors["weight_g_idx"] = torch.full((128,), -1, dtype=torch.int32)
    matrix = read(write_layer(tmp_path / "a", layer), config("pack_quantized", 32))
    assert matrix.input_order is None and torch.equal(matrix.dequantize(), layer.weight)


def test_blocks_may_stand_in_any_order(tmp_path):
    numbers = draw(*SHAPE, 32)._replace(groups=np.repeat([2, 0, 3, 1], 32))
    layer = FORMATS["gptq"](numbers)
    matrix = read(write_layer(tmp_path / "a", layer), config("gptq", 32, act_order=True))
    assert matrix.input_order is None and torch.equal(matrix.dequantize(), layer.weight)


AUTO_ROUND = {
    "quant_method": "auto-round",
    "autoround_version": "0.16.1",
    "data_type": "int",
    "bits": 4,
    "group_size": 32,
}


@pytest.mark.parametrize(
    ("packing", "format"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "awq"),
    ],
)
def test_auto_round_packs_as_others_do(packing, format, tmp_path):
    layer = FORMATS[format](draw(*SHAPE, 32))
    settings = AUTO_ROUND | {"packing_format": packing, "sym": False, "iters": 200, "block_name_to_quantize": "layers"}
    assert torch.equal(read(write_layer(tmp_path / "a", layer), settings).dequantize(), layer.weight)


def test_auto_round_tells_others_more_than_they_know(tmp_path):
    layer = FORMATS["gptq"](draw(*SHAPE, 32))
    settings = config("gptq", 32) | {
        "autoround_version": "0.16.1",
        "data_type": "int",
        "amp": False,
        "provider": "auto-round",
    }
    assert torch.equal(read(write_layer(tmp_path / "a", layer), settings).dequantize(), layer.weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format is 'auto_round:llm_compressor'"),
        ({"packing_format": None}, "packing_format is None"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp'"),
        ({"act_bits": 8}, "act_bits is 8"),
        ({"rotation_config": {"block_size": 32}}, "rotation_config is {'block_size': 32}"),
    ],
)
def test_what_auto_round_does_otherwise_is_refused(change, reason, tmp_path):
    layer = FORMATS["gptq"](draw(*SHAPE, 32))
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        read(write_layer(tmp_path / "a", layer), AUTO_ROUND | {"packing_format": "auto_round"} | change)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def broken(name: str, change: Any) -> Any:
    """Changes a tensor of a layer; ``None`` removes it."""

    def apply(layer: Layer) -> None:
        if change is None:
            del layer.tensors[name]
        else:
            changed = layer.tensors[name].clone()
            layer.tensors[name] = found if (found := change(changed)) is not None else changed

    return apply


def put(place: Any, value: float) -> Any:
    def change(tensor: Tensor) -> None:
        tensor[place] = value

    return change


DAMAGED = [
    ("gptq", {}, broken("g_idx", put(7, 4)), r"fc\.g_idx has the group 4; the scales are of groups 0 to 3"),
    ("gptq", {}, broken("g_idx", put(7, -1)), r"fc\.g_idx has the group -1"),
    ("gptq", {}, broken("g_idx", put(slice(32, 64), 0)), r"fc\.g_idx gives group 1 of 4 0 inputs"),
    ("gptq", {}, broken("g_idx", put(32, 0)), r"fc\.g_idx gives group 0 of 4 33 inputs"),
    ("gptq", {}, broken("g_idx", lambda x: x[:96]), r"fc\.g_idx is int32 \[96\]; .* needs .* \[128\]"),
    ("gptq", {"act_order": True}, broken("g_idx", None), r"has no fc\.g_idx, which desc_act needs"),
    ("gptq", {}, broken("qzeros", put((1, 0), -1)), r"fc\.qzeros gives output 0 in group 1 the zero point 16"),
    ("gptq", {}, broken("qzeros", None), r"has no fc\.qzeros"),
    ("gptq", {}, broken("scales", None), r"has no fc\.scales"),
    ("gptq", {}, broken("scales", put((2, 5), np.inf)), r"fc\.scales\[2, 5\] is inf"),
    ("gptq", {}, broken("scales", lambda x: x[:3].contiguous()), r"fc\.g_idx has the group 3"),
    ("gptq", {}, broken("scales", lambda x: x[0].contiguous()), r"\[24\] is no shape of fc\.scales"),
    ("gptq", {}, broken("qweight", lambda x: x.repeat(2, 1)), r"fc\.qweight is int32 \[32, 24\]"),
    ("gptq", {}, broken("qweight", lambda x: x.long()), r"fc\.qweight is int64"),
    ("gptq", {}, broken("qweight", None), r"has no fc\.qweight beside it"),
    ("awq", {}, broken("scales", put((0, 0), np.nan)), r"fc\.scales\[0, 0\] is nan"),
    ("awq", {}, broken("scales", lambda x: x[:2].contiguous()), r"fc\.scales is float16 \[2, 24\]"),
    ("awq", {}, broken("qzeros", None), r"has no fc\.qzeros"),
    ("awq", {}, broken("qweight", lambda x: x.t().contiguous()), r"fc\.qweight is int32 \[3, 128\]"),
    ("pack_quantized", {}, broken("weight_zero_point", None), r"has no fc\.weight_zero_point, which symmetric=false"),
    ("pack_quantized", {}, broken("weight_scale", None), r"has no fc\.weight_scale"),
    ("pack_quantized", {}, broken("weight_shape", None), r"has no fc\.weight_shape"),
    ("pack_quantized", {}, broken("weight_shape", put(1, 64)), r"fc\.weight_shape is \[24, 64\]"),
    ("pack_quantized", {}, broken("weight_scale", put((9, 1), np.inf)), r"fc\.weight_scale\[9, 1\] is inf"),
    ("pack_quantized", {}, broken("weight_scale", lambda x: x[:, :2].contiguous()), r"2 groups of 128 inputs"),
    ("pack_quantized", {"act_order": True}, broken("weight_g_idx", put(5, 9)), r"fc\.weight_g_idx has the group 9"),
    ("pack_quantized", {"act_order": True}, broken("weight_g_idx", None), r"has no fc\.weight_g_idx, which actorder"),
]


@pytest.mark.parametrize(("format", "settings", "change", "reason"), DAMAGED)
def test_damage_is_refused_and_named(format, settings, change, reason, tmp_path):
    layer = FORMATS[format](draw(*SHAPE, 32, **settings))
    change(layer)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read(write_layer(tmp_path / "a", layer), config(format, 32, **settings))
    assert "has no" in str(caught.value) or "model.safetensors" in str(caught.value)


def test_zero_points_of_a_symmetric_scheme_are_refused(tmp_path):
    layer = FORMATS["pack_quantized"](draw(*SHAPE, 32))
    with pytest.raises(CheckpointError, match=r"fc\.weight_zero_point is not zero, though .* symmetric"):
        read(write_layer(tmp_path / "a", layer), config("pack_quantized", 32, symmetric=True))


def test_scales_in_fp32_are_refused(tmp_path):
    layer = FORMATS["gptq"](draw(*SHAPE, 32, scale_type=torch.float32))
    with pytest.raises(UnsupportedModelError, match=r"fc\.scales is float32; only scales of 16 bit"):
        read(write_layer(tmp_path / "a", layer), config("gptq", 32))


def test_inputs_that_fill_no_block_are_refused(tmp_path):
    for format in FORMATS:
        layer = FORMATS[format](draw(8, 48, -1))
        with pytest.raises(UnsupportedModelError, match=r"fc has 48 inputs; 4-bit weights need a multiple of 32"):
            read(write_layer(tmp_path / format, layer), config(format, -1), (8, 48))


def test_a_layer_that_the_model_does_not_have_is_refused(tmp_path):
    layer = FORMATS["awq"](draw(*SHAPE, 32))
    with pytest.raises(
        CheckpointError, match=r"experts\.0\.qweight is in 4 bit, but the model has no such linear layer"
    ):
        read(write_layer(tmp_path / "a", layer, "experts.0"), config("awq", 32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 8}, "quantization_config.bits is 8"),
        ({"bits": None}, "quantization_config.bits is None"),
        ({"group_size": 16}, "quantization_config.group_size is 16; only groups of a multiple of 32"),
        ({"group_size": 0}, "quantization_config.group_size is 0; it has to be"),
        ({"group_size": "all"}, "quantization_config.group_size is 'all'"),
        ({"checkpoint_format": "marlin"}, "quantization_config.checkpoint_format is 'marlin'"),
        ({"checkpoint_format": "gptq_p"}, "quantization_config.checkpoint_format is 'gptq_p'"),
        ({"pack_dtype": "int64"}, "quantization_config.pack_dtype is 'int64'"),
        ({"is_marlin_format": True}, "quantization_config.is_marlin_format is True"),
        ({"rotation": "hadamard"}, "quantization_config.rotation is 'hadamard'"),
        ({"adapter": {"name": "lora"}}, "quantization_config.adapter is"),
    ],
)
def test_other_gptq_settings_are_refused(change, reason):
    settings = config("gptq", 128)
    gptq_int4.read_config(settings)
    with pytest.raises(GossamerError, match=re.escape(reason)):
        gptq_int4.read_config(settings | change)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"version": "gemv"}, "quantization_config.version is 'gemv'"),
        ({"version": "GEMV_FAST"}, "quantization_config.version is 'GEMV_FAST'"),
        ({"backend": "llm-awq"}, "quantization_config.backend is 'llm-awq'"),
        ({"bits": 3}, "quantization_config.bits is 3"),
        ({"group_size": 48}, "quantization_config.group_size is 48"),
        ({"krot": 8}, "quantization_config.krot is 8"),
    ],
)
def test_other_awq_settings_are_refused(change, reason):
    settings = config("awq", 128)
    awq_int4.read_config(settings | {"version": "GEMM"})
    with pytest.raises(UnsupportedModelError, match=re.escape(reason)):
        awq_int4.read_config(settings | change)


@pytest.mark.parametrize(
    ("place", "change", "reason"),
    [
        ("weights", {"num_bits": 8}, "the weights of group_0 are 8-bit int"),
        ("weights", {"type": "float"}, "the weights of group_0 are 4-bit float"),
        ("weights", {"strategy": "tensor"}, "one scale per tensor"),
        ("weights", {"strategy": "block", "block_structure": [128, 128]}, "scales per block"),
        ("weights", {"group_size": 16}, "config_groups.group_0.weights.group_size is 16"),
        ("weights", {"group_size": None}, "config_groups.group_0.weights.group_size is None"),
        ("weights", {"rotation": "hadamard"}, "config_groups.group_0.weights.rotation is 'hadamard'"),
        ("weights", {"actorder": "random"}, "the activation ordering of group_0 is 'random'"),
        ("weights", {"dynamic": True}, "dynamic scales"),
        ("group", {"input_activations": {"num_bits": 8, "type": "float"}}, "activations of group_0 are not int8"),
        ("group", {"output_activations": {"num_bits": 8}}, "the outputs of group_0 are quantized"),
        ("group", {"format": "int-quantized"}, "the format of group_0 is 'int-quantized'"),
        ("config", {"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme"),
        ("config", {"transform_config": {"config_groups": {"u": {}}}}, "quantization_config.transform_config is"),
    ],
)
def test_other_schemes_of_compressed_tensors_are_refused(place, change, reason):
    settings = config("pack_quantized", 128, symmetric=True)
    compressed_tensors_int4.read_config(settings)
    group = settings["config_groups"]["group_0"]
    {"weights": group["weights"], "group": group, "config": settings}[place].update(change)
    with pytest.raises(GossamerError, match=re.escape(reason)):
        compressed_tensors_int4.read_config(settings)


def test_dynamic_int8_activations_may_be_asked_for():
    settings = config("pack_quantized", 128, symmetric=True)
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True, "symmetric": True}
    settings["config_groups"]["group_0"]["input_activations"] = inputs
    compressed_tensors_int4.read_config(settings)
    inputs["dynamic"] = False
    with pytest.raises(UnsupportedModelError, match="static scales"):
        compressed_tensors_int4.read_config(settings)


def test_which_format_a_configuration_has():
    for format in FORMATS:
        assert int4_format(LlamaConfig(quantization_config=config(format, 32))) is not None
    mixed = config("pack_quantized", 32) | {"format": "mixed-precision"}
    mixed["config_groups"]["group_0"]["format"] = "pack-quantized"
    assert int4_format(LlamaConfig(quantization_config=mixed)) is not None
    for other in ({"quant_method": "bitsandbytes"}, {"quant_method": "compressed-tensors", "format": "int-quantized"}):
        assert int4_format(LlamaConfig(quantization_config=other)) is None
    assert int4_format(LlamaConfig()) is None
