"""Adapter directories: what PEFT's configurations mean, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import make_model
from gossamer import LLM
from gossamer.errors import (
    AdapterError,
    CheckpointError,
    ConfigurationError,
    GossamerError,
    ModelNotFoundError,
)
from gossamer.models.lora import load_adapter
from lora_adapters import (
    ATTENTION,
    MLP,
    PREFIX,
    change_config,
    change_tensors,
    linear_layers,
    write_adapter,
)

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("llama")


@pytest.fixture
def adapter(model: Any, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", model, ("q_proj", "down_proj"))


def scale(model: Any, directory: Path, layer: str, alpha: float, rank: int, *, root: bool = False) -> bool:
    """Whether a layer's second factor is the file's times ``alpha / rank``, or ``alpha / sqrt(rank)``."""
    low_rank = load_adapter("it", directory, model).layers[layer]
    (before,) = load_adapter("it", change_config(directory, **_plain(rank)), model).layers[layer].up[:1]
    return torch.allclose(low_rank.up[0], before * (alpha / rank ** (0.5 if root else 1)))


def _plain(rank: int) -> dict[str, Any]:
    """A configuration with which factors are as they are in the file."""
    return {"lora_alpha": rank, "alpha_pattern": {}, "use_rslora": False}


@pytest.mark.parametrize(
    ("targets", "others", "expected"),
    [
        (["q_proj"], {}, {"q_proj": (0, 1)}),
        (["model.layers.1.mlp.up_proj"], {}, {"up_proj": (1,)}),
        (r".*\.self_attn\.[qv]_proj", {}, {"q_proj": (0, 1), "v_proj": (0, 1)}),
        ("all-linear", {}, dict.fromkeys(ATTENTION + MLP, (0, 1))),
        ("all-linear", {"exclude_modules": ["mlp.up_proj", *ATTENTION]}, {"gate_proj": (0, 1), "down_proj": (0, 1)}),
        (["q_proj", "up_proj"], {"exclude_modules": r".*\.0\..*"}, {"q_proj": (1,), "up_proj": (1,)}),
        (["q_proj"], {"layers_to_transform": 1}, {"q_proj": (1,)}),
        (["q_proj"], {"layers_to_transform": [0], "layers_pattern": "layers"}, {"q_proj": (0,)}),
        (r".*q_proj", {"layers_to_transform": None, "layers_pattern": None}, {"q_proj": (0, 1)}),
    ],
)
def test_targets_are_pefts(
    model: Any, tmp_path: Path, targets: Any, others: dict[str, Any], expected: dict[str, tuple[int, ...]]
) -> None:
    layers = [
        name for name in linear_layers(model) if int(name.split(".")[2]) in expected.get(name.rsplit(".", 1)[-1], ())
    ]
    directory = write_adapter(tmp_path / "it", model, (), layers=layers)
    change_config(directory, target_modules=targets, **others)
    assert sorted(load_adapter("it", directory, model).layers) == sorted(layers)


def test_ranks_and_scales_are_pefts(model: Any, tmp_path: Path) -> None:
    """A pattern is a regular expression for the end of a name; the first that fits counts."""
    first, second = "model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"
    directory = write_adapter(
        tmp_path / "it",
        model,
        ("up_proj",),
        rank=4,
        ranks={first: 2},
        lora_alpha=6,
        rank_pattern={r"layers\.0\.mlp\.up_proj": 2},
        alpha_pattern={r"1\.mlp\.up_proj": 10, "up_proj": 3},
    )
    layers = load_adapter("it", directory, model).layers
    assert layers[first].rank == 2 and layers[second].rank == 4
    assert scale(model, directory, first, 3, 2)
    change_config(directory, alpha_pattern={r"1\.mlp\.up_proj": 10, "up_proj": 3}, lora_alpha=6)
    assert scale(model, directory, second, 10, 4)
    change_config(directory, use_rslora=True, lora_alpha=6)
    assert scale(model, directory, second, 6, 4, root=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_factors_may_be_of_any_floating_point_type(model: Any, adapter: Path, dtype: torch.dtype) -> None:
    name = f"{PREFIX}{Q}.lora_A.weight"
    down = load_adapter("it", adapter, model).layers[Q].down
    change_tensors(adapter, **{name: down.to(dtype)})
    assert torch.equal(load_adapter("it", adapter, model).layers[Q].down, down.to(dtype).float())


def test_conv1d_layers_are_adapted(tmp_path: Path) -> None:
    """GPT-2 stores its weights transposed, which the factors of an adapter are not."""
    gpt2 = make_model("gpt2")
    layer = "transformer.h.0.attn.c_attn"
    directory = write_adapter(tmp_path / "it", gpt2, (), target_modules=[layer], fan_in_fan_out=True)
    change_tensors(
        directory,
        **{
            f"{PREFIX}{layer}.lora_A.weight": torch.ones(4, 48),
            f"{PREFIX}{layer}.lora_B.weight": torch.ones(144, 4),
        },
    )
    assert load_adapter("it", directory, gpt2).layers[layer].up.shape == (144, 4)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"something_new": {"a": 1}}, "something_new"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        ({"target_modules": ["q_proj", "down_proj", "embed_tokens"]}, "embed_tokens, which reads tokens"),
        ({"target_modules": ["q_proj", "down_proj", "lm_head"]}, "lm_head, which reads tokens or writes logits"),
        ({"target_modules": ["q_proj", "down_proj", "input_layernorm"]}, "input_layernorm, a LlamaRMSNorm"),
        ({"target_modules": ["q_proj", "down_proj", "c_attn"]}, "'c_attn', and the model has no such layer"),
        ({"target_modules": ["q_proj"]}, "has weights for model.layers.0.mlp.down_proj, which target_modules leaves"),
        ({"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [7]}, "no layer of the model is left"),
        ({"r": 5}, r"is \(4, 48\), and the model and the rank ask for \(5, 48\)"),
    ],
)
def test_what_cannot_be_computed_is_named(model: Any, adapter: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(AdapterError, match=words):
        load_adapter("it", change_config(adapter, **fields), model)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"r": 0}, "r is '0'"),
        ({"r": "eight"}, "r is 'eight'"),
        ({"r": True}, "r is 'True'"),
        ({"lora_alpha": None}, "lora_alpha is 'None'"),
        ({"target_modules": None}, "target_modules is empty"),
        ({"target_modules": [3]}, "target_modules is"),
        ({"target_modules": "("}, "no regular expression"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern.q_proj"),
        ({"rank_pattern": {"[": 2}}, "no regular expression"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"layers_to_transform": ["first"]}, "layers_to_transform"),
    ],
)
def test_a_damaged_configuration_is_named(model: Any, adapter: Path, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=words):
        load_adapter("it", change_config(adapter, **fields), model)


@pytest.mark.parametrize(
    ("tensors", "error", "words"),
    [
        ({f"{PREFIX}{Q}.lora_B.weight": None}, CheckpointError, f"lacks {PREFIX}{Q}.lora_B.weight"),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.full((4, 48), torch.nan)}, CheckpointError, "not finite"),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 48, dtype=torch.int32)}, CheckpointError, "torch.int32"),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(4, 40)}, AdapterError, "another model"),
        ({f"{PREFIX}{Q}.lora_B.weight": torch.ones(40, 4)}, AdapterError, "another model"),
        ({f"{PREFIX}{Q}.lora_A.weight": torch.ones(48)}, AdapterError, "another model"),
        ({f"{PREFIX}{Q}.lora_magnitude_vector": torch.ones(48)}, AdapterError, "lora_magnitude_vector"),
        ({f"{PREFIX}model.embed_tokens.lora_embedding_A": torch.ones(4)}, AdapterError, "lora_embedding_A"),
        ({"model.norm.weight": torch.ones(48)}, AdapterError, "model.norm.weight"),
        ({f"{PREFIX}model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 48)}, AdapterError, "does not have"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    model: Any, adapter: Path, tensors: dict[str, Any], error: type[GossamerError], words: str
) -> None:
    with pytest.raises(error, match=words):
        load_adapter("it", change_tensors(adapter, **tensors), model)


def test_the_model_it_was_trained_on_is_told(model: Any, adapter: Path) -> None:
    change_config(adapter, base_model_name_or_path="org/another", r=3)
    with pytest.raises(AdapterError, match="It was trained on org/another"):
        load_adapter("it", adapter, model)
    change_config(adapter, r=4)
    assert load_adapter("it", adapter, model).base == "org/another"


def test_files_that_are_missing_pickled_or_cut_are_named(model: Any, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="there is no directory"):
        load_adapter("it", tmp_path / "nothing", model)
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is missing"):
        load_adapter("it", tmp_path, model)
    weights = adapter / "adapter_model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-40])
    with pytest.raises(CheckpointError, match="damaged or cut off"):
        load_adapter("it", adapter, model)
    weights.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        load_adapter("it", adapter, model)
    (adapter / "adapter_model.bin").write_bytes(b"a stand-in")
    with pytest.raises(CheckpointError, match="pickled"):
        load_adapter("it", adapter, model)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        load_adapter("it", adapter, model)


@pytest.mark.parametrize("name", ["", "a\nb", "x" * 257, 5])
def test_a_name_is_a_short_line(name: Any) -> None:
    with pytest.raises(ConfigurationError, match="1 to 256 printable characters"):
        LLM("smollm2-135m", lora={name: "somewhere"})


def test_the_models_own_name_is_not_for_an_adapter() -> None:
    with pytest.raises(ConfigurationError, match="has the model's own name"):
        LLM("smollm2-135m", lora={"smollm2-135m": "somewhere"})
