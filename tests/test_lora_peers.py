"""PEFT's own adapters, as PEFT writes them, answer here as they do there. `make test-peers` runs these."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from architectures import make_model, reference
from gossamer import LLM, SamplingParams
from gossamer.engine.engine import Engine
from gossamer.errors import AdapterError
from gossamer.models.lora import load_adapter
from gossamer.runners.transformers import IMPLEMENTATION
from references import load_reference, logprobs
from test_exactness import NumberTokenizer
from test_lora import answers, make

pytestmark = pytest.mark.peers
peft = pytest.importorskip("peft")

PROMPTS = [list(range(3, 40)), [*range(3, 30), 7, 5], [11, 12]]
CONFIGS: dict[str, dict[str, Any]] = {
    "default": {"target_modules": ["q_proj", "v_proj"]},
    "all": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "rslora": {"target_modules": r".*\.(gate|up)_proj", "use_rslora": True, "lora_alpha": 4},
    "patterns": {
        "target_modules": ["k_proj", "o_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\.self_attn\.o_proj": 2, "down_proj": 6},
        "alpha_pattern": {"o_proj": 3, r"0\.mlp\.down_proj": 20},
    },
    "layers": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*\.0\.mlp\..*"},
}


def adapt(model: Any, directory: Path, **config: Any) -> Any:
    """A copy of the model with a random adapter of PEFT, which is written to the directory."""
    torch.manual_seed(3)
    adapted = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    adapted.save_pretrained(directory)
    return adapted.eval()


@pytest.mark.parametrize("runner", ["transformers", "native"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_tokens_are_pefts(name: str, runner: str, tmp_path: Path) -> None:
    model = make_model(name, tie_word_embeddings=False)
    adapted = {each: adapt(model, tmp_path / each, **config) for each, config in CONFIGS.items()}
    loaded = [load_adapter(each, tmp_path / each, model) for each in CONFIGS]
    for each, adapter in zip(CONFIGS, loaded, strict=True):
        names = {layer.removeprefix("base_model.model.") for layer in adapted[each].targeted_module_names}
        assert set(adapter.layers) == names
    expected = [reference(adapted[each])(prompt, 6) for prompt in PROMPTS for each in CONFIGS]
    model.set_attn_implementation(IMPLEMENTATION)
    engine = Engine(make(runner, model, loaded), NumberTokenizer())
    assert answers(engine, [(each, prompt) for prompt in PROMPTS for each in CONFIGS]) == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"target_modules": ["q_proj"], "bias": "lora_only"}, "bias"),
        ({"target_modules": ["q_proj"], "use_dora": True}, "use_dora"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["q_proj"], "lora_bias": True}, "lora_bias"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"target_modules": ["q_proj"], "init_lora_weights": "olora"}, "init_lora_weights"),
    ],
)
def test_what_is_not_served_is_named(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    model = make_model("llama", tie_word_embeddings=False)
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(**config)).save_pretrained(tmp_path / "it")
    with pytest.raises(AdapterError, match=words):
        load_adapter("it", tmp_path / "it", model)


def test_a_real_model_answers_as_with_peft(smollm2_path: Path, tmp_path: Path) -> None:
    """Two adapters and none in the same steps, in fp32, over shared prefixes."""
    base = load_reference(smollm2_path)
    names = ("a", "b")
    targets = {"a": ["q_proj", "k_proj", "v_proj", "o_proj"], "b": "all-linear"}
    models: dict[str | None, Any] = {None: base}
    for name in names:
        torch.manual_seed(ord(name))
        model = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(target_modules=targets[name], r=8))
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_B" in key:
                    parameter.copy_(torch.randn_like(parameter) * 0.02)
        model.save_pretrained(tmp_path / name)
        models[name] = model.eval()
    system = "You are a patient librarian, who answers in one short sentence and never asks back. "
    prompts = [system + question for question in ("What is a comma?", "Who reads?")]
    with LLM(smollm2_path, dtype="float32", lora={name: tmp_path / name for name in names}) as llm:
        asked = [(name, prompt) for prompt in prompts for name in models]
        outputs = llm.generate(
            [{"prompt": prompt, "adapter": name} for name, prompt in asked],
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        )
        for (name, prompt), output in zip(asked, outputs, strict=True):
            ids = llm.tokenizer(prompt)["input_ids"]
            assert output.outputs[0].token_ids == reference(models[name])(ids, 12)
            got = torch.tensor(llm.score(prompt, adapter=name)[0].token_logprobs[1:])
            expected = logprobs(models[name], ids)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]
            assert torch.allclose(got, expected, atol=1e-3)
