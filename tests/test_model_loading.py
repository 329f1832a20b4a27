"""Models are loaded ready for inference; kinds that cannot run are refused before anything is computed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from gossamer.errors import (
    CheckpointError,
    ConfigurationError,
    UnsupportedModelError,
)
from gossamer.models.load import load_model, load_tokenizer
from gossamer.models.support import SUPPORTED_MODEL_TYPES, check_supported

pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def tiny(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


class TestLoad:
    def test_model_is_ready_for_inference(self, tiny, capfd):
        model, tokenizer = load_model(tiny)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        assert tokenizer.decode(tokenizer.encode("naïve")) == "naïve"
        assert capfd.readouterr() == ("", "")

    def test_dtype(self, make_tiny_llama, tmp_path):
        directory = make_tiny_llama(tmp_path / "half", dtype="bfloat16")
        assert load_model(directory, dtype="float32")[0].dtype == torch.float32
        with pytest.raises(ConfigurationError, match="int4"):
            load_model(directory, dtype="int4")

    def test_auto_dtype_is_the_checkpoints(self, tiny):
        weights = load_file(tiny / "model.safetensors")
        halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
        save_file(halves, tiny / "model.safetensors", metadata={"format": "pt"})
        edit_config(tiny, dtype="bfloat16")
        assert load_model(tiny)[0].dtype == torch.bfloat16

    def test_truncated_weights_are_named(self, tiny):
        weights = tiny / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-100])
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged or cut off"):
            load_model(tiny)

    def test_missing_tensor_is_not_filled_with_random_numbers(self, tiny):
        weights = load_file(tiny / "model.safetensors")
        del weights["model.layers.1.mlp.up_proj.weight"]
        save_file(weights, tiny / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=r"lack 1 tensors, among them model\.layers\.1\.mlp\.up_proj\.weight"):
            load_model(tiny)

    def test_weights_of_another_shape(self, tiny):
        edit_config(tiny, intermediate_size=96)
        with pytest.raises(CheckpointError, match="do not fit"):
            load_model(tiny)

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"model_type": "llama", "hidden_size": "wide"}'])
    def test_damaged_config(self, tiny, text):
        (tiny / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json"):
            load_model(tiny)

    @pytest.mark.parametrize(("name", "value"), [("model_max_length", ["x"]), ("model_input_names", 5)])
    def test_settings_of_a_tokenizer_that_show_in_use_only(self, tiny, name, value):
        file = tiny / "tokenizer_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {name: value}))
        with pytest.raises(CheckpointError, match=r"the tokenizer in .* cannot be read"):
            load_tokenizer(tiny)

    def test_damaged_tokenizer(self, tiny):
        (tiny / "tokenizer.json").write_text("{")
        with pytest.raises(CheckpointError, match="tokenizer"):
            load_model(tiny)

    def test_unknown_model_type_names_its_architecture_and_runs_no_code(self, tiny):
        (tiny / "code.py").write_text("raise SystemExit('remote code was run')")
        edit_config(
            tiny,
            model_type="webspinner",
            architectures=["WebSpinner"],
            auto_map={"AutoConfig": "code.WebSpinnerConfig"},
        )
        with pytest.raises(UnsupportedModelError, match=r"'webspinner' \(WebSpinner\).*is not run"):
            load_model(tiny)

    def test_length_dependent_rope_is_refused_before_loading(self, tiny):
        edit_config(tiny, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0})
        with pytest.raises(UnsupportedModelError, match="longest sequence of the batch"):
            load_model(tiny)


def edit_config(directory: Path, **changes: object) -> None:
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | changes))


class TestSupport:
    @pytest.mark.parametrize("model_type", SUPPORTED_MODEL_TYPES)
    def test_named_types_are_accepted(self, model_type):
        check_supported(CONFIG_MAPPING[model_type]())

    @pytest.mark.parametrize(
        ("model_type", "reason"),
        [
            ("t5", "encoder-decoder"),
            ("bart", "encoder-decoder"),
            ("bert", "not causal"),
            ("vit", "no causal language model"),
            ("rwkv", "recurrent state"),
            ("gptj", "GPTJForCausalLM: its class in transformers does not let the attention"),
            ("bloom", "does not let the attention"),
        ],
    )
    def test_other_kinds_are_refused_with_the_reason(self, model_type, reason):
        with pytest.raises(UnsupportedModelError, match=reason) as caught:
            check_supported(CONFIG_MAPPING[model_type]())
        assert "llama, mistral" in str(caught.value)

    @pytest.mark.parametrize("rope_type", ["linear", "llama3", "yarn"])
    def test_fixed_rope_is_accepted(self, rope_type):
        config = CONFIG_MAPPING["llama"]()
        config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 2.0}
        check_supported(config)

    @pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
    @pytest.mark.parametrize("field", ["rope_type", "type"])
    def test_length_dependent_rope_is_refused_in_every_place(self, rope_type, field):
        parameters = {field: rope_type, "rope_theta": 10000.0}
        nested = {"sliding_attention": {"rope_type": "default"}, "full_attention": parameters}
        for model_type, value in (("llama", parameters), ("gemma3_text", nested)):
            config = CONFIG_MAPPING[model_type]()
            config.rope_parameters = value
            with pytest.raises(UnsupportedModelError, match=f"RoPE type '{rope_type}'"):
                check_supported(config)

    @pytest.mark.parametrize("model_type", ["mamba", "lfm2", "qwen3_5_text", "nemotron_h"])
    def test_recurrent_layers_are_accepted(self, model_type):
        check_supported(CONFIG_MAPPING[model_type]())

    def test_layers_that_attend_in_another_way_are_refused(self):
        config = CONFIG_MAPPING["qwen3"](num_hidden_layers=2)
        config.layer_types = ["chunked_attention", "full_attention"]
        with pytest.raises(UnsupportedModelError, match="layers of type chunked_attention"):
            check_supported(config)

    def test_bidirectional_gemma_is_refused(self):
        with pytest.raises(UnsupportedModelError, match="not causal"):
            check_supported(CONFIG_MAPPING["gemma3_text"](use_bidirectional_attention=True))
