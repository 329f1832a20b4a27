"""gpt-oss's own checkpoints: experts in MXFP4, computed as they are stored, in floating point or as int8."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from architectures import make_model, reference
from gguf_files import rewrite, write_model
from gossamer.errors import CheckpointError, GossamerError, UnsupportedModelError
from gossamer.kernels.library import instruction_set
from gossamer.models.load import load_model
from gossamer.options import ModelOptions, RunnerOptions
from gossamer.runners.loading import load_for_runner
from native_checkpoints import VOCAB, save_model
from test_exactness import NumberTokenizer, answers
from test_native_runner import scores, scores_of

needs_native = pytest.mark.skipif(instruction_set() is None, reason="the native kernels are not installed")
PROMPTS = [[5, 6, 7, 8, *range(20, 60)], [5, 6, 7, 8, *range(20, 50), 3], [1]]
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
YARN |= {"truncate": False}
EXPERTS = "model.layers.1.mlp.experts"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random blocks in the place of the experts' weights."""
    directory = save_model("gpt_oss", tmp_path_factory.mktemp("mxfp4") / "model", hidden_size=64, intermediate_size=32)
    tensors = load_file(directory / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        count, inputs, outputs = tensors.pop(name).shape
        shape = count, outputs, inputs // 32
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(122, 126, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="module")
def expected(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, list[list[int]]]:
    """The model with the values that transformers says these blocks have, and its answers."""
    directory = save_model("gpt_oss", tmp_path_factory.mktemp("plain") / "model", hidden_size=64, intermediate_size=32)
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name.removesuffix("_blocks") for name in tensors if name.endswith("_blocks")]:
        blocks, scales = tensors.pop(f"{name}_blocks"), tensors.pop(f"{name}_scales")
        tensors[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    generate = reference(model)
    return model, [generate(prompt, 8) for prompt in PROMPTS]


def answers_of(checkpoint: Path, options: ModelOptions, runner: str = "auto") -> tuple[str, str, list[list[int]]]:
    from gossamer.engine.engine import Engine

    loaded = load_for_runner(checkpoint, options, RunnerOptions(runner=runner, kv_dtype="auto"), max_rows=64)
    return loaded.weights, loaded.runner.name, answers(Engine(loaded.runner, NumberTokenizer()), PROMPTS, 8)


def test_the_values_are_those_of_transformers(checkpoint: Path, expected: Any) -> None:
    model, _ = load_model(checkpoint, options=ModelOptions(dtype="float32", weights="dequantized"))
    for (name, tensor), (other, wanted) in zip(
        sorted(model.state_dict().items()), sorted(expected[0].state_dict().items()), strict=True
    ):
        assert name == other and torch.equal(tensor, wanted), name
    stored, _ = load_model(checkpoint, options=ModelOptions(weights="as-stored"))
    experts = stored.model.layers[1].mlp.experts
    wanted = expected[0].model.layers[1].mlp.experts
    assert len(experts) == wanted.num_experts
    for index, expert in enumerate(experts):
        both = wanted.gate_up_proj[index].t()
        assert torch.equal(expert.gate_proj.stored.dequantize(), both[0::2])
        assert torch.equal(expert.up_proj.stored.dequantize([3, 1]), both[1::2][[3, 1]])
        assert torch.equal(expert.down_proj.stored.dequantize(), wanted.down_proj[index].t())
        assert torch.equal(expert.up_proj.bias.float(), wanted.gate_up_proj_bias[index, 1::2])


@needs_native
def test_as_stored_by_itself(checkpoint: Path, expected: Any) -> None:
    """Rows are int8 where they meet blocks, so tokens are as probable as in floating point, not the same to the bit."""
    loaded = load_for_runner(checkpoint, max_rows=64)
    count = 3 * sum(len(layer.mlp.experts.gate_up_proj) for layer in expected[0].model.layers)
    assert (loaded.runner.name, loaded.weights) == ("native", f"as stored: MXFP4 {count}")
    text = PROMPTS[0]
    wanted = scores_of(expected[0], text)
    difference = (scores(loaded.runner, text) - wanted).abs()
    assert difference.mean() < 0.05 and wanted.std() > 1


@needs_native
@pytest.mark.parametrize("runner", ["native", "transformers"])
def test_in_floating_point(checkpoint: Path, expected: Any, runner: str) -> None:
    weights, name, found = answers_of(checkpoint, ModelOptions(dtype="float32", weights="dequantized"), runner)
    assert (weights, name, found) == ("float32", runner, expected[1])


def test_the_reference_computes_stored_experts(checkpoint: Path, expected: Any) -> None:
    model, _ = load_model(checkpoint, options=ModelOptions(weights="as-stored"))
    ids = torch.tensor([PROMPTS[0]])
    with torch.inference_mode():
        assert torch.allclose(model(ids).logits, expected[0](ids).logits, atol=2e-2)


@needs_native
def test_int8(checkpoint: Path, expected: Any) -> None:
    weights, _, found = answers_of(checkpoint, ModelOptions(quantization="int8"))
    assert weights == "int8" and all(0 <= token < VOCAB for answer in found for token in answer)


@needs_native
@pytest.mark.parametrize("kind", [None, gguf.GGMLQuantizationType.MXFP4])
def test_files_of_gguf(kind: Any, tmp_path: Path) -> None:
    """With biases and sinks; the same in fp32, and nearly so with blocks, which are multiplied with int8 rows."""
    model = make_model("gpt_oss", hidden_size=64, intermediate_size=32, vocab_size=300, rope_parameters=YARN)
    keys = {"expert_count": 4, "expert_used_count": 4, "expert_feed_forward_length": 32, "attention.sliding_window": 10}
    keys |= {"rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 64, "rope.scaling.type": "yarn"}
    file = write_model(model, gguf.MODEL_ARCH.GPT_OSS, tmp_path / "x.gguf", keys, tokens=300, type=kind)
    plain, _ = load_model(file, options=ModelOptions(dtype="float32", weights="dequantized"))
    ids = torch.tensor([PROMPTS[0]])
    if kind is None:
        assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in plain.state_dict().items())
        assert torch.allclose(plain(ids).logits, model(ids).logits, atol=1e-4)
        return
    loaded = load_for_runner(file, max_rows=64)
    assert loaded.runner.name == "native" and loaded.weights.startswith("as stored: MXFP4 ")
    wanted = scores_of(plain, PROMPTS[0])
    difference = (scores(loaded.runner, PROMPTS[0]) - wanted).abs()
    assert difference.mean() < 0.06 * (wanted - wanted.roll(1)).abs().mean()


@pytest.mark.parametrize("lost", ["output.weight", "blk.1.attn_q.bias", "blk.0.ffn_up_exps.bias"])
def test_files_of_gguf_that_lack_something_are_refused(lost: str, tmp_path: Path) -> None:
    model = make_model("gpt_oss", hidden_size=64, intermediate_size=32, vocab_size=300)
    keys = {"expert_count": 4, "expert_used_count": 4, "expert_feed_forward_length": 32, "attention.sliding_window": 10}
    file = write_model(model, gguf.MODEL_ARCH.GPT_OSS, tmp_path / "x.gguf", keys, tokens=300)
    load_model(file)
    with pytest.raises(CheckpointError, match=lost.partition("ffn_")[2] or lost):
        load_model(rewrite(file, tmp_path / "y.gguf", drop=[lost]))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(f"{EXPERTS}.down_proj_scales"), CheckpointError, "lacks .*down_proj_scales"),
        (
            lambda t: t[f"{EXPERTS}.down_proj_scales"].view(-1)[5:6].fill_(255),
            CheckpointError,
            r"down_proj_scales holds NaN \(255\)",
        ),
        (
            lambda t: t.update(
                {"model.layers.1.mlp.experts.gate_up_proj_blocks": torch.zeros(3, 2, 1, 16, dtype=torch.uint8)}
            ),
            CheckpointError,
            r"gate_up_proj_blocks is \[3, 2, 1, 16\], and has to be \[4, 64, 2, 16\]",
        ),
        (
            lambda t: t.update({"model.layers.1.self_attn.q_proj.weight_blocks": torch.zeros(1, dtype=torch.uint8)}),
            UnsupportedModelError,
            "q_proj.weight_blocks is in MXFP4, but not of experts",
        ),
    ],
)
def test_damaged_files(
    checkpoint: Path, tmp_path: Path, change: Callable[[Tensors], Any], error: type[GossamerError], message: str
) -> None:
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for weights in ("as-stored", "dequantized"):
        with pytest.raises(error, match=message):
            load_model(tmp_path, options=ModelOptions(weights=weights))  # type: ignore[arg-type]  # one of them


def test_settings_that_nobody_knows(checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["rotation"] = "hadamard"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"quantization_config\.rotation is 'hadamard'"):
        load_model(tmp_path)
