"""Experts as linear layers of their own: the same results, and what is made for linear layers reaches them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as hf

from architectures import VOCAB, make_model
from gguf_files import write_model
from gossamer import LLM, GossamerInt8Config
from gossamer.errors import CheckpointError, UnsupportedModelError
from gossamer.models.gguf_weights import open_weights, read_gguf
from gossamer.models.load import load_model
from gossamer.models.quantize import quantize
from gossamer.nn import Int8Linear, StoredLinear
from gossamer.nn.experts import SeparateExperts, separate_experts, separated
from gossamer.options import ModelOptions
from gossamer.pruning import LayerGram, Magnitude, MFACFisher
from gossamer.pruning.blocks import decoder_blocks
from gossamer.pruning.patterns import Unstructured
from gossamer.pruning.pruner import Pruner

MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "ernie4_5_moe"]
IDS = torch.randint(VOCAB, (2, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MIXTURES)
def test_separate_experts_compute_the_same(name: str) -> None:
    model = make_model(name)
    expected = model(IDS).logits
    packed = dict(model.named_parameters())
    with separated(model):
        assert any(isinstance(module, SeparateExperts) for module in model.modules())
        assert torch.allclose(model(IDS).logits, expected, atol=1e-5)
        layer = next(module for module in model.modules() if isinstance(module, SeparateExperts))
        with torch.no_grad():
            layer[1].down_proj.weight.zero_()  # a view: who changes it changes the tensor
    assert dict(model.named_parameters()).keys() == packed.keys()
    (down, *_) = [tensor for path, tensor in model.named_parameters() if path.endswith("experts.down_proj")]
    assert not down[1].any() and down[0].any()


def test_experts_of_another_kind_are_left() -> None:
    model = make_model("gpt_oss")  # with biases, and a gate of its own
    assert separate_experts(model) == {}


def test_experts_are_int8_and_stay_so_when_saved(tmp_path: Path) -> None:
    for name in MIXTURES:
        model = make_model(name, initializer_range=0.1)
        model.save_pretrained(tmp_path / name)
        plain = model(IDS).logits
        report = quantize(model, skip=("lm_head",))
        layers = [layer for layer in report.layers if ".experts." in layer.name]
        assert layers and not any("three dimensions" in reason for reason in report.skipped.values()), name
        kinds = {type(module) for path, module in model.named_modules() if path.endswith("down_proj")}
        assert kinds == {Int8Linear}, name
        expected = model(IDS).logits
        assert 0 < (expected - plain).norm() < 0.1 * plain.norm(), name
        # the same while it is loaded, and again from what was saved
        loading = (
            type(model)
            .from_pretrained(tmp_path / name, quantization_config=GossamerInt8Config(skip=["lm_head"]), dtype="auto")
            .eval()
        )
        # which columns are outliers is found by watching the int8 layers instead
        assert (loading(IDS).logits - expected).norm() < 0.05 * expected.norm(), name
        loading.save_pretrained(tmp_path / f"{name}-int8")
        again = type(model).from_pretrained(tmp_path / f"{name}-int8", dtype="auto").eval()
        assert isinstance(next(m for m in again.modules() if isinstance(m, SeparateExperts))[0].up_proj, Int8Linear)
        assert torch.allclose(again(IDS).logits, loading(IDS).logits, atol=1e-5), name


def test_a_model_that_cannot_be_quantized_keeps_its_experts() -> None:
    model = make_model("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    before = copy.deepcopy(dict(model.named_parameters()))
    with pytest.raises(Exception, match=r"experts\.2\.down_proj"):
        quantize(model)
    assert dict(model.named_parameters()).keys() == before.keys()


# --- pruning ---------------------------------------------------------------------------------------------------------


def _with_an_idle_expert() -> Any:
    """A model whose router never chooses the last of its experts."""
    model = make_model("qwen3_moe", mlp_only_layers=[], norm_topk_prob=True)
    for layer in model.model.layers:
        layer.mlp.gate.weight[-1] = -layer.mlp.gate.weight[:-1].sum(0)  # below the mean, whatever the input is
    return model


@pytest.mark.parametrize("curvature", [LayerGram(), MFACFisher(), Magnitude()], ids=str)
def test_experts_are_pruned_by_what_they_see(curvature: Any) -> None:
    model = _with_an_idle_expert()
    batches = [{"input_ids": IDS, "labels": IDS}]
    layers = [layer.mlp.experts for layer in model.model.layers]
    before = [layer.down_proj.clone() for layer in layers]
    used = [_chosen(model, index) for index in range(len(layers))]
    with separated(model):
        gradients = curvature.source == "gradients"
        pruner = Pruner(
            model,
            curvature,
            Unstructured("layer"),
            blocks=decoder_blocks(model) if curvature.source == "inputs" else None,
        )
        for parameter in model.parameters():
            parameter.requires_grad_(gradients)
        report = pruner.prune_to(0.5, batches, lambda outputs, batch: outputs.loss)
    for index, layer in enumerate(layers):
        for expert, weight in enumerate(layer.down_proj):
            reached = curvature.source == "nothing" or expert in used[index]
            share = float((weight == 0).float().mean())
            assert share == pytest.approx(0.5, abs=0.01) if reached else torch.equal(weight, before[index][expert])
    idle = {path for path in report.unreached if path.endswith("down_proj.weight")}
    expected = {
        f"model.layers.{index}.mlp.experts.{expert}.down_proj.weight"
        for index, chosen in enumerate(used)
        for expert in set(range(4)) - chosen
    }
    assert idle == (set() if curvature.source == "nothing" else expected)
    assert not idle or "no token reached" in str(report)


def _chosen(model: Any, index: int) -> set[int]:
    seen: list[torch.Tensor] = []
    experts = model.model.layers[index].mlp.experts
    handle = experts.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    model(IDS)
    handle.remove()
    return set(torch.cat(seen).flatten().tolist())


# --- as a file stores them -------------------------------------------------------------------------------------------

SIZES = {"vocab_size": 300, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
KEYS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96}


def _file(path: Path, kind: gguf.GGMLQuantizationType, **keys: Any) -> Path:
    torch.manual_seed(0)
    config = hf.Qwen3MoeConfig(
        **SIZES,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=2,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return write_model(model, gguf.MODEL_ARCH.QWEN3MOE, path, KEYS | keys, tokens=300, type=kind)


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q5_1"])
def test_experts_stay_as_the_file_stores_them(kind: str, tmp_path: Path) -> None:
    file = _file(tmp_path / "x.gguf", gguf.GGMLQuantizationType[kind])
    prompt = IDS[0].tolist()
    scores = []
    for weights in ("as-stored", "dequantized"):
        model, _ = load_model(file, options=ModelOptions(weights=weights))  # type: ignore[arg-type]  # one of them
        stored = [path for path, module in model.named_modules() if isinstance(module, StoredLinear)]
        assert len([path for path in stored if ".experts." in path]) == (2 * 4 * 3 if weights == "as-stored" else 0)
        scores.append(model(IDS).logits)
    assert torch.allclose(scores[0], scores[1], atol=1e-2 * scores[1].std())
    with LLM(file, runner="native") as llm, LLM(file, weights="dequantized", dtype="float32") as plain:
        experts = llm.engine.runner.decoder.layers[0].experts.layers  # type: ignore[attr-defined]  # it is native
        assert {each.block_types for each in (*experts.gate_up, *experts.down)} == {(kind,)}
        ours, expected = (
            torch.tensor(each.score({"prompt_token_ids": prompt}, use_tqdm=False)[0].token_logprobs[1:])
            for each in (llm, plain)
        )
    spread = (expected - expected.roll(1)).abs().mean()
    assert (ours - expected).abs().mean() < 0.06 * spread  # what is multiplied with 4-bit weights is rounded to int8


def test_files_whose_experts_do_not_fit_are_refused(tmp_path: Path) -> None:
    file = _file(tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q4_0, expert_count=3)
    with pytest.raises(CheckpointError, match=r"experts\.3\."):
        load_model(file, options=ModelOptions(weights="as-stored"))
    file = _file(tmp_path / "y.gguf", gguf.GGMLQuantizationType.Q4_0, expert_count=5)
    with pytest.raises(CheckpointError, match="experts"):
        load_model(file, options=ModelOptions(weights="as-stored"))


def test_experts_that_are_not_in_blocks_are_told(tmp_path: Path) -> None:
    file = _file(tmp_path / "x.gguf", gguf.GGMLQuantizationType.Q4_0)
    opened = read_gguf(file)
    tensor = opened.file.tensors["blk.1.ffn_up_exps.weight"]
    plain = gguf.GGMLQuantizationType.F32
    object.__setattr__(tensor, "type", plain)
    with pytest.raises(UnsupportedModelError, match=r"blk\.1\.ffn_up_exps\.weight is stored as F32"):
        open_weights(opened.file, opened.config, as_stored=True)
