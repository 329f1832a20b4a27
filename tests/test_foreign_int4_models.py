"""Whole models in 4 bit: as stored, in floating point and as int8 they compute what their weights mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from gossamer import LLM, SamplingParams
from gossamer.compress.int8 import compress_int8
from gossamer.errors import CheckpointError, ConfigurationError, UnsupportedModelError
from gossamer.models.int8_quantizer import GossamerInt8Config
from gossamer.models.load import load_model
from gossamer.nn import Int8Linear, StoredLinear
from gossamer.options import ModelOptions
from int4_checkpoints import FORMATS, config, draw, write_model
from native_checkpoints import save_model

IDS = torch.arange(3, 43)[None]


def reference(directory: Path, dense: dict[str, Tensor]) -> nn.Module:
    """transformers' model with the weights of the checkpoint in floating point."""
    fields = json.loads((directory / "config.json").read_text())
    del fields["quantization_config"]
    model = hf.AutoModelForCausalLM.from_config(hf.AutoConfig.for_model(**fields), dtype=torch.float32)
    model.load_state_dict({name: tensor.float() for name, tensor in dense.items()}, strict=False)
    model.tie_weights()
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits.float()


@pytest.mark.parametrize(
    ("format", "settings"),
    [
        ("gptq", {"symmetric": True}),
        ("gptq_v2", {"act_order": True}),
        ("awq", {}),
        ("pack_quantized", {}),
    ],
)
def test_a_model_computes_with_what_its_weights_mean(format, settings, tmp_path):
    dense = write_model(tmp_path / "a", format, kind="llama_biases", **settings)
    expected = logits(reference(tmp_path / "a", dense))
    floating, _ = load_model(tmp_path / "a", "float32")
    for name, tensor in floating.state_dict().items():
        assert torch.equal(tensor, dense[name].float())
    assert torch.equal(logits(floating), expected)
    stored, _ = load_model(tmp_path / "a", options=ModelOptions(weights="as-stored"))
    layers = [layer for layer in stored.modules() if isinstance(layer, StoredLinear)]
    assert len(layers) == 14 and all(layer.bias is not None for layer in layers)
    nn.Module.float(stored)  # norms, biases and the embedding; transformers keeps this from quantized models
    assert torch.allclose(logits(stored), expected, atol=1e-4, rtol=1e-4)


def test_rows_of_blocks_multiply_inputs_in_their_order(tmp_path):
    """What native kernels do with a layer in act-order, against the layer itself."""
    write_model(tmp_path / "a", "gptq", act_order=True)
    model, _ = load_model(tmp_path / "a", options=ModelOptions(weights="as-stored"))
    layer = model.model.layers[1].mlp.down_proj
    assert isinstance(layer, StoredLinear) and layer.input_order is not None
    x = torch.randn(3, 96)
    blocks = torch.from_numpy(layer.stored._block.dequantize(layer.stored.rows().reshape(-1, 20))).view(64, 96)
    assert torch.allclose(x[:, layer.input_order] @ blocks.t(), layer(x), atol=1e-5)


@pytest.mark.parametrize("format", ["gptq", "pack_quantized"])
def test_an_output_layer_in_4_bit_is_not_tied(format, tmp_path):
    dense = write_model(tmp_path / "a", format, head=True, kind="mistral")
    model, _ = load_model(tmp_path / "a", options=ModelOptions(weights="as-stored"))
    assert isinstance(model.lm_head, StoredLinear)
    assert torch.equal(model.lm_head.stored.dequantize(), dense["lm_head.weight"])


def test_int8_is_made_of_4_bit_weights(tmp_path):
    dense = write_model(tmp_path / "a", "awq")
    model, _ = load_model(tmp_path / "a", options=ModelOptions(quantization="int8"))
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, Int8Linear)
    weight = dense["model.layers.0.mlp.up_proj.weight"]
    error = (layer.weight.float() * layer.scale[:, None] - weight).norm() / weight.norm()
    assert 0 < error < 0.01


def test_zero_biases_that_the_model_does_not_have_are_passed_over(tmp_path):
    write_model(tmp_path / "a", "gptq")
    file = tmp_path / "a" / "model.safetensors"
    tensors, name = load_file(file), "model.layers.0.self_attn.q_proj.bias"
    save_file(tensors | {name: torch.zeros(64)}, file, metadata={"format": "pt"})
    for weights in ("as-stored", "dequantized"):
        load_model(tmp_path / "a", options=ModelOptions(weights=weights))
    save_file(tensors | {name: torch.ones(64)}, file, metadata={"format": "pt"})
    for weights in ("as-stored", "dequantized"):
        with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
            load_model(tmp_path / "a", options=ModelOptions(weights=weights))


def test_transposed_layers_are_read_in_floating_point_only(tmp_path):
    directory = save_model("gpt2", tmp_path / "a")
    tensors, path = load_file(directory / "model.safetensors"), "transformer.h.0.mlp.c_fc"
    weight = tensors.pop(f"{path}.weight")  # (K, N)
    layer = FORMATS["gptq"](draw(weight.shape[1], weight.shape[0], 32))
    tensors |= {f"{path}.{last}": tensor for last, tensor in layer.tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text()) | {"quantization_config": config("gptq", 32)}
    (directory / "config.json").write_text(json.dumps(fields))
    model, _ = load_model(directory, "float32")
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, layer.weight.t())
    int8, _ = load_model(directory, options=ModelOptions(quantization="int8"))
    assert torch.allclose(int8.transformer.h[0].mlp.c_fc.dequantize().weight, layer.weight, atol=0.01)
    with pytest.raises(UnsupportedModelError, match="transposed layer"):
        load_model(directory, options=ModelOptions(weights="as-stored"))


def test_layers_that_are_there_twice_are_refused(tmp_path):
    dense = write_model(tmp_path / "a", "gptq")
    file, name = tmp_path / "a" / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    save_file(load_file(file) | {name: dense[name]}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight is there as well"):
        load_model(tmp_path / "a")


def test_weights_without_blocks_cannot_be_as_stored(tmp_path):
    with pytest.raises(UnsupportedModelError, match="4-bit blocks"):
        load_model(save_model("llama", tmp_path / "a"), options=ModelOptions(weights="as-stored"))


def test_compressing_again_is_refused(tmp_path):
    write_model(tmp_path / "a", "gptq")
    with pytest.raises(ConfigurationError, match="quantized"):
        compress_int8(tmp_path / "a", tmp_path / "out", GossamerInt8Config())


@pytest.mark.parametrize("format", FORMATS)
def test_llm_answers_as_transformers_does_with_the_same_weights(format, tmp_path):
    dense = write_model(tmp_path / "a", format)
    model = reference(tmp_path / "a", dense)
    prompt = IDS[0, :12].tolist()
    expected = model.generate(IDS[:, :12], max_new_tokens=8, do_sample=False, eos_token_id=None)[0, 12:].tolist()
    llm = LLM(tmp_path / "a", dtype="float32", max_model_len=64, memory="64MB")
    (output,) = llm.generate(
        {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True), use_tqdm=False
    )
    assert output.outputs[0].token_ids == expected
