"""Pruning block by block: blocks one after the other are the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.errors import ConfigurationError, UnsupportedModelError
from gossamer.pruning import (
    NM,
    BlockFisher,
    LayerGram,
    Pruner,
    Reconstruction,
    Unstructured,
    decoder_blocks,
)
from gossamer.pruning.blocks import BlockRun
from pruning_models import language_batches, language_loss, language_model, perceptron, same, state


class TestBlocks:
    @pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
    def test_blocks_one_after_the_other_are_the_model(self, kind: str) -> None:
        model = language_model(kind)
        data, hidden = language_batches(), []
        blocks = decoder_blocks(model)
        run = BlockRun(model, blocks, data)
        for index in range(len(blocks)):
            run.hidden = run.outputs(index, run.hidden)
        norm = getattr(model.base_model, "norm", None) or model.base_model.ln_f
        with torch.no_grad():
            hidden = [model.lm_head(norm(part)) for part in run.hidden]
            wanted = [model(input_ids=batch["input_ids"]).logits for batch in data]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(hidden, wanted, strict=True))

    @pytest.mark.parametrize("kind", ["llama", "gpt2"])
    @pytest.mark.parametrize("curvature", [LayerGram(), BlockFisher(16)], ids=lambda c: type(c).__name__)
    def test_reconstruction_brings_blocks_closer_and_leaves_zeros(self, kind: str, curvature: Any) -> None:
        model = language_model(kind)
        pruner = Pruner(
            model, curvature, NM(2, 4), blocks=decoder_blocks(model), reconstruction=Reconstruction(epochs=3, lr=2e-4)
        )
        report = pruner.prune_to(0.5, language_batches(), language_loss)
        assert len(report.reconstruction) == 2
        assert all(after < before for before, after in report.reconstruction)
        for name, mask in pruner.masks.items():
            assert not bool((model.get_parameter(name)[~mask] != 0).any())
        assert not any(parameter.requires_grad is False for parameter in model.parameters())

    def test_a_model_with_eager_attention_is_run_causally(self) -> None:
        results = []
        for attention in ("sdpa", "eager"):
            model = language_model("llama")
            model.set_attn_implementation(attention)
            Pruner(model, LayerGram(), NM(2, 4), blocks=decoder_blocks(model)).prune_to(0.5, language_batches())
            assert model.config._attn_implementation == attention
            results.append(state(model))
        assert same(*results)

    def test_an_interruption_restores_the_whole_model(self) -> None:
        model = language_model("llama")
        before = state(model)

        def stop(phase: str, done: int, total: int) -> None:
            if phase == "blocks":
                raise KeyboardInterrupt

        pruner = Pruner(
            model, LayerGram(), Unstructured("row"), blocks=decoder_blocks(model), reconstruction=Reconstruction(1)
        )
        with pytest.raises(KeyboardInterrupt):
            pruner.prune_to(0.5, language_batches(), progress=stop)
        assert same(before, state(model)) and not pruner.masks

    def test_settings_that_contradict_are_refused(self) -> None:
        model = language_model("llama")
        blocks = decoder_blocks(model)
        with pytest.raises(ConfigurationError, match="one stage"):
            Pruner(model, LayerGram(), blocks=blocks, recompute=2)
        with pytest.raises(ConfigurationError, match="one stage"):
            Pruner(model, LayerGram(), Unstructured("global"), blocks=blocks)
        with pytest.raises(ConfigurationError, match="pass the model's `blocks`"):
            Pruner(model, LayerGram(), reconstruction=Reconstruction())
        with pytest.raises(ConfigurationError, match="lies in none of the blocks"):
            Pruner(model, LayerGram(), blocks=blocks[:1])
        with pytest.raises(ConfigurationError, match="do not divide blocks of 6"):
            Pruner(model, BlockFisher(6), NM(2, 4))
        with pytest.raises(ConfigurationError, match="in one stage"):
            Pruner(model, BlockFisher(), NM(2, 4), recompute=2)
        half = language_model("llama").bfloat16()
        with pytest.raises(ConfigurationError, match="trained in float32"):
            Pruner(half, LayerGram(), NM(2, 4), blocks=decoder_blocks(half), reconstruction=Reconstruction()).prune_to(
                0.5, language_batches()
            )
        with pytest.raises(UnsupportedModelError, match="no list of decoder blocks"):
            decoder_blocks(perceptron())
        uneven = [*language_batches(), *language_batches(length=5)]
        with pytest.raises(ConfigurationError, match="of one length"):
            Pruner(model, LayerGram(), blocks=blocks).prune_to(0.5, uneven)
