"""What the files of a checkpoint say decides, whoever reads them; what no model can be is refused by a field's name."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, LlamaForCausalLM

from gossamer import GossamerInt8Config
from gossamer.compress.export import export
from gossamer.compress.int8 import compress_int8
from gossamer.errors import CheckpointError, GossamerError
from gossamer.models.checkpoint import check_directory
from gossamer.models.encoder import load_encoder
from gossamer.models.load import load_config, load_model
from gossamer.models.quantize import quantize
from gossamer.models.resolve import resolve_model
from gossamer.models.shard_reader import ShardReader

pytestmark = pytest.mark.usefixtures("private_cache")
INDEX = "model.safetensors.index.json"
ALL_INT8 = GossamerInt8Config(skip=[])


@pytest.fixture
def model(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "model")


def edit(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def split(directory: Path, stray: str | None = None, value: float = 7.0) -> dict[str, Tensor]:
    """Divide the weights between two shards; the second one has a copy of ``stray`` that the index says nothing of."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    names = sorted(weights)
    files = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in files.items():
        tensors = {name: weights[name] for name in held}
        if stray and stray not in held:
            tensors[stray] = torch.full_like(weights[stray], value)
        save_file(tensors, directory / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (directory / INDEX).write_text(json.dumps(index))
    return weights


class TestIndex:
    @pytest.mark.parametrize("stray", ["lm_head.weight", "model.norm.weight"])
    def test_the_index_decides_for_every_reader(self, model, tmp_path, stray):
        weights = split(model, stray)
        assert torch.equal(load_model(model)[0].state_dict()[stray], weights[stray])
        with ShardReader(model) as reader:
            assert torch.equal(reader.tensor(stray), weights[stray])
        compress_int8(model, tmp_path / "int8", GossamerInt8Config())
        loaded = load_model(tmp_path / "int8")[0]
        assert torch.equal(loaded.state_dict()[stray], weights[stray])

    @pytest.mark.parametrize("format", ["compressed-tensors", "bitsandbytes", None])
    def test_the_index_decides_for_int8_checkpoints(self, format, model, tmp_path):
        compress_int8(model, tmp_path / "int8", GossamerInt8Config(outlier_store=0.0))
        directory = tmp_path / "int8"
        if format:
            directory = tmp_path / "other"
            export(tmp_path / "int8", directory, format)
        expected = load_model(directory)[0].state_dict()
        split(directory, "model.layers.0.mlp.up_proj.weight", value=5)
        found = load_model(directory)[0].state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)

    def test_transformers_alone_would_take_the_stray(self, model):
        split(model, "lm_head.weight")
        with pytest.raises(CheckpointError, match=r"lm_head\.weight is in another file"):
            AutoModelForCausalLM.from_pretrained(model, quantization_config=GossamerInt8Config())

    def test_a_tensor_that_the_index_assigns_and_the_file_lacks_is_named(self, model):
        split(model)
        index = json.loads((model / INDEX).read_text())
        index["weight_map"]["model.norm.weight"] = "a.safetensors"
        (model / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"a\.safetensors lacks 1 of the tensors.*model\.norm\.weight"):
            load_model(model)

    def test_a_tensor_without_an_entry_is_no_part_of_the_checkpoint(self, model):
        split(model)
        index = json.loads((model / INDEX).read_text())
        del index["weight_map"]["model.norm.weight"]
        (model / INDEX).write_text(json.dumps(index))
        with pytest.raises(CheckpointError, match=r"lack 1 tensors, among them model\.norm\.weight"):
            load_model(model)

    @pytest.mark.parametrize(
        "weight_map", [None, {}, ["a.safetensors"], {"model.norm.weight": 3}, {"model.norm.weight": "../a.safetensors"}]
    )
    def test_an_index_of_another_kind_is_refused(self, model, weight_map):
        split(model)
        edit(model / INDEX, weight_map=weight_map)
        with pytest.raises(CheckpointError, match="weight_map"):
            load_model(model)

    def test_the_index_decides_for_encoders(self, tmp_path):
        settings = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        bert = BertForMaskedLM(BertConfig(vocab_size=8, max_position_embeddings=16, **settings))
        bert.save_pretrained(tmp_path)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        name = "bert.embeddings.LayerNorm.weight"
        weights = split(tmp_path, name)
        assert torch.equal(load_encoder(tmp_path)[0].embeddings.LayerNorm.weight, weights[name])


class TestTies:
    @pytest.fixture
    def untied(self, make_tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
        """A head with weights of its own, under a configuration that says it is tied."""
        directory = make_tiny_llama(tmp_path / "untied", initializer_range=0.4)
        edit(directory / "config.json", tie_word_embeddings=True)
        return directory

    @staticmethod
    def logits(model: Any) -> Tensor:
        with torch.no_grad():
            return model(torch.arange(1, 9)[None]).logits

    def expected(self, untied: Path) -> Tensor:
        network = LlamaForCausalLM.from_pretrained(untied, tie_word_embeddings=False)
        head = load_file(untied / "model.safetensors")["lm_head.weight"]
        assert not torch.equal(network.model.embed_tokens.weight, head) and torch.equal(network.lm_head.weight, head)
        return self.logits(network)

    def test_the_weights_decide(self, untied):
        loaded = load_model(untied)[0]
        assert torch.equal(self.logits(loaded), self.expected(untied))
        assert loaded.config.tie_word_embeddings is False

    @pytest.mark.parametrize("skip", [[], ["lm_head"]])
    def test_the_weights_decide_in_int8(self, untied, skip, tmp_path):
        settings = GossamerInt8Config(skip=skip, outlier_store=0.0)
        expected = self.expected(untied)
        exact = LlamaForCausalLM.from_pretrained(untied, tie_word_embeddings=False)
        quantize(exact, skip=skip, outlier_store=0.0)
        in_memory = self.logits(exact)
        assert (in_memory - expected).abs().max() < 0.1 * expected.abs().max()
        assert torch.equal(self.logits(load_model(untied, quantization=settings)[0]), in_memory)
        compress_int8(untied, tmp_path / "int8", settings)
        for loaded in (
            load_model(tmp_path / "int8")[0],
            AutoModelForCausalLM.from_pretrained(tmp_path / "int8"),
            AutoModelForCausalLM.from_pretrained(untied, quantization_config=settings),
        ):
            assert torch.equal(self.logits(loaded), in_memory)
        edit(tmp_path / "int8" / "config.json", tie_word_embeddings=True)  # as older versions wrote it
        assert torch.equal(self.logits(load_model(tmp_path / "int8")[0]), in_memory)
        export(tmp_path / "int8", tmp_path / "out", "compressed-tensors")
        assert "lm_head.weight" in ShardReader(tmp_path / "out").specs

    def test_a_head_that_was_untied_in_memory_is_quantized_as_it_is(self, make_tiny_llama, tmp_path):
        network = LlamaForCausalLM.from_pretrained(make_tiny_llama(tmp_path / "tied", tie_word_embeddings=True))
        network.lm_head.weight = torch.nn.Parameter(torch.randn_like(network.lm_head.weight))
        expected = self.logits(network)
        quantize(network, skip=[], outlier_store=0.0)
        assert (self.logits(network) - expected).abs().max() < 0.1 * expected.abs().max()

    @pytest.mark.parametrize("settings", [None, ALL_INT8])
    def test_equal_copies_are_tied(self, make_tiny_llama, tmp_path, settings):
        directory = make_tiny_llama(tmp_path / "tied", tie_word_embeddings=True)
        expected = self.logits(load_model(directory, quantization=settings)[0])
        weights = load_file(directory / "model.safetensors")
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        save_file(weights, directory / "model.safetensors", {"format": "pt"})
        loaded = load_model(directory, quantization=settings)[0]
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert torch.equal(self.logits(loaded), expected)


class TestLeftovers:
    def test_a_bias_that_the_model_has_no_place_for_is_refused(self, model):
        weights = load_file(model / "model.safetensors")
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.ones(32)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            CheckpointError, match=r"q_proj\.bias, for which the model of its config\.json has no place"
        ):
            load_model(model)

    @pytest.mark.parametrize("name", ["model.layers.0.self_attn.q_proj.bias", "reward_head.weight"])
    def test_what_changes_nothing_stays_unread(self, model, name):
        weights = load_file(model / "model.safetensors")
        weights[name] = torch.zeros(32) if name.endswith("bias") else torch.ones(1, 32)
        save_file(weights, model / "model.safetensors", {"format": "pt"})
        load_model(model)


DEEP = "[" * 100_000 + "]" * 100_000


class TestConfigurations:
    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
            ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000"),
            ({"num_attention_heads": 0}, "num_attention_heads is 0"),
            ({"num_key_value_heads": -2}, "num_key_value_heads is -2"),
            ({"hidden_size": 2**40}, "hidden_size is 1099511627776"),
            ({"hidden_size": True}, "hidden_size is True"),
            ({"hidden_size": [32, "wide"]}, "hidden_size is 'wide'"),
            ({"vocab_size": "many"}, "vocab_size is 'many'"),
            ({"eos_token_id": 2**70}, "eos_token_id is a number of 71 bits"),
            ({"eos_token_id": [0, [1]]}, r"eos_token_id is \[0, \[1\]\]"),
            ({"bos_token_id": "<s>"}, "bos_token_id is '<s>'"),
            ({"model_type": ["llama"]}, "model_type is"),
            ({"architectures": [["LlamaForCausalLM"]]}, "architectures is"),
            ({"architectures": "LlamaForCausalLM"}, "architectures is"),
            ({"dtype": 32}, "dtype is 32"),
            ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
            ({"quantization_config": "int8"}, "quantization_config is 'int8'"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
            ({"text_config": {"num_hidden_layers": 0}}, r"text_config\.num_hidden_layers is 0"),
            ({"deep": {"a": json.loads("[" * 80 + "]" * 80)}}, r"deep\.a.* is nested more than 64 deep"),
        ],
    )
    def test_the_field_is_named(self, model, changes, field):
        edit(model / "config.json", **changes)
        for read in (load_config, load_model):
            with pytest.raises(CheckpointError, match=r"config\.json: " + field):
                read(model)

    @pytest.mark.parametrize("name", ["config.json", "generation_config.json", "gossamer.json"])
    def test_depth_has_an_end(self, model, name):
        from gossamer.models.manifest import verify

        (model / name).write_text(DEEP)
        if name == "gossamer.json":
            assert "nested too deep" in verify(model)[0]
        else:
            with pytest.raises(CheckpointError, match=re.escape(name)):
                load_model(model)

    @pytest.mark.parametrize("changes", [{"eos_token_id": "end"}, {"eos_token_id": 2**64}])
    def test_generation_settings_are_read_or_refused(self, model, changes):
        edit(model / "generation_config.json", **changes)
        with pytest.raises(CheckpointError, match=r"generation_config\.json"):
            load_model(model)

    def test_generation_settings_reach_the_model(self, model, tmp_path):
        edit(model / "generation_config.json", eos_token_id=[0, 5], temperature=0.2, do_sample=True)
        compress_int8(model, tmp_path / "int8", GossamerInt8Config())
        export(tmp_path / "int8", tmp_path / "out", "compressed-tensors")
        for directory in (model, tmp_path / "int8", tmp_path / "out"):
            settings = load_model(directory)[0].generation_config
            assert (settings.eos_token_id, settings.temperature) == ([0, 5], 0.2)

    def test_a_model_far_larger_than_its_files_is_refused_before_memory_is_taken(self, model):
        edit(model / "config.json", intermediate_size=10**7, hidden_size=10**5, num_attention_heads=10)
        with pytest.raises(CheckpointError, match=r"config\.json describes a model of"):
            load_model(model)

    def test_more_layers_than_tensors_are_refused_before_they_are_made(self, model):
        edit(model / "config.json", num_hidden_layers=9000)
        with pytest.raises(CheckpointError, match=r"num_hidden_layers is 9000, and the weights have 21 tensors"):
            load_model(model)

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "generation_config.json"])
    @pytest.mark.parametrize("kind", ["pipe", "directory", "dangling link"])
    def test_only_regular_files_are_read(self, model, name, kind):
        (model / name).unlink()
        if kind == "pipe":
            os.mkfifo(model / name)  # a reader would wait for a writer
        elif kind == "directory":
            (model / name).mkdir()
        else:
            (model / name).symlink_to(model / "nowhere")
        for read in (check_directory, resolve_model, load_model):
            with pytest.raises(GossamerError, match=re.escape(name)):
                read(model)
