"""Int8 modules are ordinary modules: they move, copy, pickle and save; and quantizing a model says what it did."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from architectures import ARCHITECTURES, make_model
from gossamer.errors import ConfigurationError
from gossamer.models.quantize import quantize
from gossamer.nn import Int8Embedding, Int8Linear, Int8TiedHead
from gossamer.nn.int8_linear import Decomposition
from gossamer.nn.int8_weight import quantize_weight
from gossamer.nn.quantize import matches


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(96, 40)


@pytest.fixture
def layer(linear: nn.Linear) -> Int8Linear:
    return Int8Linear.from_linear(linear, outlier_columns=torch.tensor([7, 3]))


def with_outliers(*shape: int) -> torch.Tensor:
    x = torch.randn(*shape)
    x[..., 3] *= 50
    return x


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.detach().double() - b.detach().double()).norm() / b.detach().double().norm())


class TestInt8Linear:
    def test_close_to_the_layer_it_was_made_of(self, linear, layer):
        x = with_outliers(5, 96)
        assert relative(layer(x), linear(x)) < 0.01
        plain = Int8Linear.from_linear(linear, decomposition=Decomposition(outliers=None))
        assert relative(plain(x), linear(x)) > 2 * relative(layer(x), linear(x))

    def test_columns_of_the_store_are_exact(self, linear, layer):
        assert layer.outlier_columns.tolist() == [3, 7]
        assert torch.equal(layer.outlier_weight, linear.weight[:, [3, 7]].half())
        assert torch.equal(layer.dequantize().weight[:, [3, 7]], linear.weight[:, [3, 7]].half().float())

    def test_16_bit_weights_are_kept_as_they_are(self, linear):
        layer = Int8Linear.from_linear(linear.bfloat16(), outlier_columns=torch.tensor([1]))
        assert torch.equal(layer.outlier_weight, linear.weight[:, [1]])

    def test_weights_beyond_fp16_are_kept_as_bf16(self, linear):
        with torch.no_grad():
            linear.weight[0, 1] = 1e6
        layer = Int8Linear.from_linear(linear, outlier_columns=torch.tensor([1]))
        assert layer.outlier_weight.dtype == torch.bfloat16
        assert bool(layer.outlier_weight.isfinite().all())

    def test_dequantize_is_what_forward_multiplies_with(self, layer):
        x = torch.randn(3, 96)
        assert relative(layer(x), layer.dequantize()(x)) < 0.01
        assert layer.dequantize(torch.bfloat16).weight.dtype == torch.bfloat16

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_changing_type_loses_no_precision(self, layer, dtype):
        before = {name: tensor.clone() for name, tensor in layer.named_buffers()}
        layer.to(dtype)
        assert all(torch.equal(tensor, before[name]) for name, tensor in layer.named_buffers())
        assert layer.bias.dtype == dtype
        assert layer(torch.randn(2, 96, dtype=dtype)).dtype == dtype

    def test_training_mode_computes_the_same_and_the_gradient_flows(self, linear, layer):
        x = with_outliers(4, 96).requires_grad_()
        assert torch.equal(layer.train()(x), layer.eval()(x))
        layer(x).sum().backward()
        expected = layer.dequantize().weight.sum(0).expand(4, -1)
        torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-4)
        assert layer.bias.grad.tolist() == [4.0] * 40

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save", "state_dict", "safetensors"])
    def test_copies(self, layer, how, tmp_path):
        x = with_outliers(3, 96)
        if how == "deepcopy":
            other = copy.deepcopy(layer)
        elif how == "pickle":
            other = pickle.loads(pickle.dumps(layer))
        elif how == "torch.save":
            torch.save(layer, tmp_path / "layer.pt")
            other = torch.load(tmp_path / "layer.pt", weights_only=False)
        else:
            other = Int8Linear(96, 40, num_outlier_columns=2)
            state = layer.state_dict()
            if how == "safetensors":
                save_file(state, tmp_path / "layer.safetensors")
                state = load_file(tmp_path / "layer.safetensors")
            other.load_state_dict(state)
        assert torch.equal(other(x), layer(x))
        other.weight.zero_()
        assert bool(layer.weight.any()), "the copy must not share memory with the original"

    def test_meta_device(self, layer):
        empty = Int8Linear(96, 40, num_outlier_columns=2, device="meta")
        assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
        empty = empty.to_empty(device="cpu")
        empty.load_state_dict(layer.state_dict())
        x = torch.randn(2, 96)
        assert torch.equal(empty(x), layer(x))

    def test_conv1d_is_a_linear_layer(self):
        torch.manual_seed(1)
        conv = Conv1D(24, 16)
        x = torch.randn(3, 16)
        assert relative(Int8Linear.from_linear(conv)(x), conv(x)) < 0.02

    def test_large_weights_are_quantized_in_pieces(self):
        weight = torch.randn(3000, 1024)
        quantized = quantize_weight(weight)
        error = (quantized.codes.float() * quantized.scale[:, None] - weight).norm() / weight.norm()
        assert quantized.relative_error == pytest.approx(float(error), rel=1e-3)
        assert torch.equal(quantized.scale, weight.abs().amax(1) / 127)

    @pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0)])
    def test_empty_layers(self, shape):
        quantized = quantize_weight(torch.zeros(*shape))
        layer = Int8Linear.from_weight(quantized)
        assert layer(torch.zeros(2, shape[1])).shape == (2, shape[0])
        assert layer.dequantize().weight.shape == shape

    def test_bad_weights_are_refused(self, linear):
        with pytest.raises(ConfigurationError, match="float64"):
            Int8Linear.from_linear(linear.double())
        with torch.no_grad():
            linear.float().weight[2, 2] = float("nan")
        with pytest.raises(ConfigurationError, match="NaN or infinite"):
            Int8Linear.from_linear(linear)
        with pytest.raises(ConfigurationError, match="Bilinear is no linear layer"):
            Int8Linear.from_linear(nn.Bilinear(2, 2, 2))


class TestInt8Embedding:
    def test_rows(self):
        torch.manual_seed(0)
        embedding = nn.Embedding(30, 64)
        int8 = Int8Embedding.from_embedding(embedding)
        ids = torch.tensor([[3, 29], [0, 3]])
        assert relative(int8(ids), embedding(ids)) < 0.01
        assert int8.to(torch.bfloat16)(ids).dtype == torch.bfloat16
        assert int8.scale.dtype == torch.float32

    def test_embeddings_that_do_more_are_refused(self):
        class Other(nn.Embedding):
            pass

        for embedding in (Other(3, 2), nn.Embedding(3, 2, max_norm=1.0)):
            with pytest.raises(ConfigurationError):
                Int8Embedding.from_embedding(embedding)


class TestQuantize:
    @pytest.mark.parametrize("name", ARCHITECTURES)
    def test_every_architecture(self, name):
        model = make_model(name)
        tokens = torch.randint(3, 199, (2, 24), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model(tokens).logits
            report = quantize(model)
            got = model(tokens).logits
        most = {"phimoe": 0.3, "gemma4_experts": 0.6}.get(name, 0.15)  # another expert changes a token
        assert relative(got, expected) < most
        assert report.layers
        int8 = {path for path, module in model.named_modules() if isinstance(module, Int8Linear)}
        assert int8 == {layer.name for layer in report.layers}
        left = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
        assert left <= set(report.skipped), "every linear layer is either quantized or explained"
        assert any("packed" in reason for reason in report.skipped.values()) == (name == "gpt_oss")

    def test_half_the_bytes_of_16_bit(self):
        model = nn.Sequential(nn.Linear(2048, 512), nn.ReLU(), nn.Linear(512, 256)).bfloat16()
        x = torch.randn(4, 2048, dtype=torch.bfloat16)
        report = quantize(model, run=lambda: model(x))
        assert [layer.outlier_columns for layer in report.layers] == [31, 8]
        assert report.bytes_after <= 0.52 * report.bytes_before
        stored = sum(b.nbytes for b in model.buffers())
        assert stored == report.bytes_after

    def test_store_holds_the_columns_with_the_largest_inputs(self):
        model = nn.Sequential(nn.Linear(64, 8))
        x = torch.randn(10, 64)
        x[:, [5, 60]] *= 30
        quantize(model, outlier_store=2 / 64, run=lambda: model(x))
        assert model[0].outlier_columns.tolist() == [5, 60]

    @pytest.mark.parametrize("name", ["llama", "gemma3", "gemma"])
    def test_tied_head_shares_one_store(self, name):
        model = make_model(name)
        model.config.tie_word_embeddings = True
        model.tie_weights()
        tokens = torch.randint(3, 199, (1, 16))
        with torch.no_grad():
            expected = model(tokens).logits
            quantize(model, skip=())
            assert relative(model(tokens).logits, expected) < 0.15
        head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
        assert isinstance(head, Int8TiedHead) and isinstance(embedding, Int8Embedding)
        assert head.weight.data_ptr() == embedding.weight.data_ptr()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.get_output_embeddings().weight is other.get_input_embeddings().weight
            assert other.get_output_embeddings().weight is not head.weight
        model.tie_weights()
        assert [key for key in model.state_dict() if "lm_head" in key] == []

    def test_skip(self):
        assert matches("model.layers.1.mlp.gate", ["layers.1"]) is False
        assert matches("model.layers.1.mlp.gate", ["model.layers.1"])
        assert matches("model.layers.11.mlp.gate", ["model.layers.1"]) is False
        assert matches("model.layers.1.mlp.gate", [r"model\.layers\.\d+\.mlp\..*"])
        model = make_model("llama")
        report = quantize(model, skip=("down_proj", "lm_head"))
        assert {name.rsplit(".", 1)[-1] for name in report.skipped} == {"down_proj", "lm_head"}

    def test_twice_is_refused(self):
        model = make_model("llama")
        quantize(model)
        with pytest.raises(ConfigurationError, match="quantized already"):
            quantize(model)

    def test_failure_leaves_the_model_as_it_was(self):
        model = make_model("llama")
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight[0, 0] = float("inf")
        with pytest.raises(ConfigurationError, match=r"model\.layers\.1\.mlp\.down_proj"):
            quantize(model)
        assert not any(isinstance(module, Int8Linear) for module in model.modules())

    @pytest.mark.parametrize(
        "arguments",
        [
            {"threshold": 0.0},
            {"threshold": -1.0},
            {"threshold": float("nan")},
            {"criterion": "other"},
            {"outliers": "some"},
            {"outlier_store": 1.5},
            {"outlier_store": "0.1"},
            {"skip": ("model", "lm_head")},
        ],
    )
    def test_bad_arguments(self, arguments: dict[str, Any]):
        with pytest.raises(ConfigurationError):
            quantize(make_model("llama"), **arguments)

    def test_no_linear_layer(self):
        with pytest.raises(ConfigurationError, match="no linear layer"):
            quantize(nn.Sequential(nn.Conv2d(1, 1, 1)))

    def test_saved_after_quantizing_in_place(self, tmp_path: Path):
        from transformers import AutoModelForCausalLM

        model = make_model("qwen3")
        quantize(model, 5.0, criterion="absolute", outliers="batch")
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
        tokens = torch.randint(3, 199, (1, 9))
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        assert loaded.model.layers[0].mlp.up_proj.decomposition == Decomposition(5.0, "absolute", "batch")

    def test_a_layer_with_two_names_is_replaced_under_both(self):
        shared = nn.Linear(32, 32)
        model = nn.ModuleDict({"first": shared, "second": shared})
        report = quantize(model)
        assert model["first"] is model["second"] and isinstance(model["first"], Int8Linear)
        assert len(report.layers) == 1

    def test_a_bare_layer(self):
        with pytest.raises(ConfigurationError, match="from_linear"):
            quantize(nn.Linear(4, 4))

    def test_tied_store_is_reported(self):
        model = make_model("llama")
        model.config.tie_word_embeddings = True
        model.tie_weights()
        report = quantize(model, skip=())
        head = next(layer for layer in report.layers if layer.name == "lm_head")
        assert head.bytes_after == 199 * 48 + 4 * 199
