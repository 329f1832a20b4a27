"""4-bit weights of compressed-tensors and AutoRound are read here as they read them themselves (`make test-peers`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gossamer import LLM, SamplingParams
from gossamer.models.load import load_model
from gossamer.options import ModelOptions
from int4_checkpoints import Layer, Numbers, compressed_tensors_config, draw, pack_quantized, write_layer
from test_foreign_int4 import read

pytestmark = pytest.mark.peers


def compress(numbers: Numbers, settings: dict[str, Any]) -> tuple[Layer, torch.Tensor]:
    """What the project stores for a weight with these scales, and what it reads back, in the type of the scales."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    scheme = QuantizationScheme.model_validate(settings["config_groups"]["group_0"])
    compressor = BaseCompressor.get_value_from_registry("pack-quantized")
    state = {"weight": numbers.weight.to(numbers.scale.dtype), "weight_scale": numbers.scale}
    if not scheme.weights.symmetric:
        state["weight_zero_point"] = torch.from_numpy(numbers.zero - 8).to(torch.int8)
    stored = compressor.compress(state, scheme)
    again = compressor.decompress(dict(stored), scheme)["weight"]
    return Layer({name: tensor.contiguous() for name, tensor in stored.items()}, numbers.weight), again


@pytest.mark.parametrize("scale_type", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, 128, -1])
def test_packed_weights_are_what_the_project_reads(group_size, symmetric, scale_type, tmp_path):
    numbers = draw(40, 256, group_size, symmetric=symmetric, scale_type=scale_type)
    settings = compressed_tensors_config(group_size, symmetric)
    layer, again = compress(numbers, settings)
    ours = pack_quantized(numbers).tensors
    assert layer.tensors.keys() == ours.keys()
    assert all(torch.equal(layer.tensors[name], ours[name]) for name in ours)
    weight = read(write_layer(tmp_path / "a", layer), settings, (40, 256)).dequantize()
    assert torch.equal(weight, numbers.weight)
    assert torch.equal(weight.to(scale_type), again)  # the project rounds to the type of the scales


def test_a_model_is_read_as_transformers_reads_it(tmp_path: Path):
    import transformers as hf

    from int4_checkpoints import write_model

    write_model(tmp_path / "a", "pack_quantized", kind="mistral")
    theirs = hf.AutoModelForCausalLM.from_pretrained(
        tmp_path / "a",
        quantization_config=hf.CompressedTensorsConfig(run_compressed=False),
        dtype=torch.float16,
    )
    ours, _ = load_model(tmp_path / "a", "float16")
    weights = {name: tensor for name, tensor in theirs.state_dict().items() if name.endswith("proj.weight")}
    assert len(weights) == 14
    for name, tensor in weights.items():
        assert torch.equal(ours.state_dict()[name], tensor)


@pytest.mark.parametrize(
    ("format", "symmetric"), [("auto_gptq", True), ("auto_awq", False), ("auto_round", True), ("auto_round", False)]
)
def test_a_real_model_of_auto_round_is_what_it_computed(format, symmetric, smollm2_path, tmp_path):
    auto_round = pytest.importorskip("auto_round")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    def quantize(name: str) -> Path:
        """The real model with weights rounded to 4 bit by the project, in one of its formats."""
        model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float16)
        how = {"scheme": "W4A16", "group_size": 64, "sym": symmetric, "iters": 0, "disable_opt_rtn": True}
        rounded = auto_round.AutoRound(model, AutoTokenizer.from_pretrained(smollm2_path), device_map="cpu", **how)
        rounded.quantize_and_save(output_dir=str(tmp_path / name), format=name)
        return next((tmp_path / name).glob("**/config.json")).parent

    theirs = load_file(quantize("fake") / "model.safetensors")  # in floating point
    directory = quantize(format)
    ours, _ = load_model(directory, options=ModelOptions(dtype="float32", weights="dequantized"))
    weights = {name: tensor for name, tensor in ours.state_dict().items() if name.endswith("proj.weight")}
    assert len(weights) == 210
    for name, tensor in weights.items():
        assert torch.equal(tensor, theirs[name].float()), name
    llm = LLM(directory)
    assert str(llm.weights).startswith("as stored")
    [output] = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert output.outputs[0].text == " Paris."
