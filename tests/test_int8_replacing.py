"""A module that takes the place of another keeps all that it replaces; what it cannot keep, it leaves alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, weight_norm
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    DistilBertConfig,
    DistilBertForMaskedLM,
    PhiConfig,
    PhiForCausalLM,
)

from gossamer import LLM, GossamerInt8Config, SamplingParams
from gossamer.errors import ConfigurationError
from gossamer.models.load import load_model
from gossamer.models.quantize import quantize
from gossamer.nn import Int8Linear, Int8TiedHead

SMALL = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
IDS = torch.arange(12)[None]
TIED_WITH_BIAS: dict[str, Callable[[], Any]] = {
    "bert": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "distilbert": lambda: DistilBertForMaskedLM(
        DistilBertConfig(vocab_size=96, dim=32, hidden_dim=64, n_layers=1, n_heads=4)
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SMALL, tie_word_embeddings=True)),
}


def biased(name: str) -> Any:
    torch.manual_seed(0)
    model = TIED_WITH_BIAS[name]().eval()
    with torch.no_grad():
        model.get_output_embeddings().bias.normal_(std=4)
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


class TestTiedHeads:
    @pytest.mark.parametrize("name", TIED_WITH_BIAS)
    def test_the_bias_is_kept(self, name, tmp_path):
        model = biased(name)
        bias = model.get_output_embeddings().bias
        expected = logits(model)
        quantize(model, skip=[])
        head = model.get_output_embeddings()
        assert isinstance(head, Int8TiedHead) and head.bias is bias
        assert (logits(model) - expected).abs().max() < 0.1 < bias.abs().max()
        model.save_pretrained(tmp_path)
        again = type(model).from_pretrained(tmp_path)
        assert isinstance(again.get_output_embeddings(), Int8TiedHead)
        assert torch.equal(logits(again), logits(model))

    @pytest.mark.parametrize("name", TIED_WITH_BIAS)
    def test_the_bias_is_kept_while_loading(self, name, tmp_path):
        model = biased(name)
        model.save_pretrained(tmp_path)
        settings = GossamerInt8Config(skip=[], outlier_store=0.0)
        quantize(model, skip=[], outlier_store=0.0)
        assert torch.equal(logits(type(model).from_pretrained(tmp_path, quantization_config=settings)), logits(model))


class TestReadersOfWeights:
    """PyTorch's own modules, and others, read ``.weight`` of a layer instead of calling it."""

    @pytest.mark.parametrize("training", [False, True])
    def test_encoder_layers_keep_working(self, training):
        torch.manual_seed(0)
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2)
        model = nn.ModuleDict({"encoder": encoder, "head": nn.Linear(32, 8)}).train(training)
        x = torch.randn(3, 7, 32)
        padding = torch.arange(7)[None] >= torch.tensor([7, 5, 3])[:, None]
        with torch.no_grad():
            expected = model["encoder"](x, src_key_padding_mask=padding)
            report = quantize(model)
            assert torch.equal(model["encoder"](x, src_key_padding_mask=padding), expected)
        assert isinstance(model["head"], Int8Linear)
        assert report.skipped["encoder.layers.0.linear1"] == "TransformerEncoderLayer reads its weight by itself"
        assert "in_proj_weight" in report.skipped["encoder.layers.1.self_attn"]
        assert "encoder.layers.1.self_attn.out_proj" in report.skipped

    def test_decoder_layers_call_theirs(self):
        torch.manual_seed(0)
        layer = nn.TransformerDecoderLayer(32, 4, 64, batch_first=True).eval()
        x, memory = torch.randn(2, 5, 32), torch.randn(2, 6, 32)
        with torch.no_grad():
            expected = layer(x, memory)
            report = quantize(layer)
            assert (layer(x, memory) - expected).abs().max() < 0.05
        assert isinstance(layer.linear1, Int8Linear) and isinstance(layer.linear2, Int8Linear)
        assert {"self_attn", "multihead_attn"} < set(report.skipped)

    def test_a_class_of_ones_own(self):
        class Reads(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.read, self.called = nn.Linear(16, 16), nn.Linear(16, 16)
                self.called.weight = nn.Parameter(self.called.weight * 2)  # that is no use of it

            def forward(self, x: Tensor) -> Tensor:
                return self.called(nn.functional.linear(x.to(self.read.weight.dtype), self.read.weight))

        model = Reads()
        x = torch.randn(4, 16)
        expected = model(x)
        report = quantize(model)
        assert list(report.skipped) == ["read"] and isinstance(model.called, Int8Linear)
        assert (model(x) - expected).abs().max() < 0.05

    def test_the_reason_is_told_when_nothing_is_left(self):
        with pytest.raises(ConfigurationError, match="reads its weight by itself"):
            quantize(nn.TransformerEncoderLayer(8, 2))


class TestSurroundings:
    def test_mode_hooks_and_attributes(self):
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 4)).eval()
        model[0].train()
        model[0].note = "mine"
        seen: list[str] = []
        before = model[0].register_forward_pre_hook(lambda *_: seen.append("before"))
        model[0].register_forward_hook(lambda *_: seen.append("after"))
        model[1].register_full_backward_hook(lambda *_: seen.append("backward"))
        quantize(model)
        assert (model[0].training, model[1].training, model[0].note) == (True, False, "mine")
        x = torch.randn(2, 16, requires_grad=True)
        model(x).sum().backward()
        before.remove()
        model(x)
        assert seen == ["before", "after", "backward", "after"]

    @pytest.mark.parametrize("change", ["weight_norm", "pruned", "parametrized", "forward"])
    def test_computed_weights_are_left_alone(self, change):
        layer = nn.Linear(16, 16)
        model = nn.Sequential(layer, nn.Linear(16, 4))
        if change == "weight_norm":
            weight_norm(layer)
        elif change == "pruned":
            prune.l1_unstructured(layer, "weight", 0.5)
        elif change == "parametrized":
            parametrizations.weight_norm(layer)
        else:
            layer.forward = lambda x: nn.Linear.forward(layer, x) + 1  # as accelerate's hooks do
        x = torch.randn(3, 16)
        expected = model(x)
        report = quantize(model)
        assert list(report.skipped) == ["0"] and isinstance(model[1], Int8Linear)
        assert (model(x) - expected).abs().max() < 0.05


@pytest.mark.usefixtures("private_cache")
class TestServed:
    def test_a_tied_int8_head_with_a_bias(self, make_tiny_llama: Callable[..., Path], tmp_path: Path):
        tokenizer_from = make_tiny_llama(tmp_path / "tokenizer")
        torch.manual_seed(0)
        phi = PhiForCausalLM(PhiConfig(**SMALL | {"vocab_size": 257}, tie_word_embeddings=True, eos_token_id=0))
        torch.nn.init.normal_(phi.lm_head.bias, std=4)
        phi.save_pretrained(tmp_path / "phi")
        for file in tokenizer_from.glob("token*"):
            (tmp_path / "phi" / file.name).write_bytes(file.read_bytes())
        settings = GossamerInt8Config(skip=[], outlier_store=0.0)
        quantized, _ = load_model(tmp_path / "phi", quantization=settings)
        quantized.save_pretrained(tmp_path / "int8")
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "phi")
        for file in tokenizer_from.glob("token*"):
            (tmp_path / "int8" / file.name).write_bytes(file.read_bytes())
        greedy = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
        [answer] = LLM(tmp_path / "int8").generate({"prompt_token_ids": [5, 6, 7]}, greedy, use_tqdm=False)
        with torch.no_grad():
            best = exact(torch.tensor([[5, 6, 7]])).logits[0, -1].argmax()
        assert answer.outputs[0].token_ids == [int(best)]
