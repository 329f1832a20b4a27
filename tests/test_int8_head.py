"""The output layer in int8 by itself: the embedding that it was tied to stays as it is."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import nn

from architectures import make_model
from gossamer import LLM, SamplingParams
from gossamer.errors import ConfigurationError
from gossamer.models.load import load_model
from gossamer.models.quantize import quantize
from gossamer.nn import Int8Linear, Int8TiedHead
from gossamer.nn.int8_head import quantize_head
from gossamer.options import ModelOptions, RunnerChoice

TOKENS = torch.tensor([[3, 17, 42, 8, 5]])


@pytest.mark.parametrize("name", ["llama", "gemma3", "qwen2"])  # of these, gemma3 ties its embeddings
def test_only_the_output_layer_changes(name: str) -> None:
    model = make_model(name)
    table = model.get_input_embeddings().weight.detach().clone()
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        report = quantize_head(model)
        after = model(input_ids=TOKENS).logits
    head = model.get_output_embeddings()
    assert isinstance(head, Int8Linear) and not any(isinstance(m, Int8Linear) for m in model.model.modules())
    assert torch.equal(model.get_input_embeddings().weight, table)
    assert head.outlier_columns is not None and len(head.outlier_columns) == max(1, round(0.015 * head.in_features))
    assert report is not None and report.name == "lm_head" and 0 < report.relative_error < 0.02
    assert 0 < (after - before).norm() < 0.02 * before.norm()


def test_one_that_is_int8_already_is_left_alone() -> None:
    model = make_model("gemma3")
    quantize(model, skip=[])
    head = model.get_output_embeddings()
    assert quantize_head(model) is None
    assert model.get_output_embeddings() is head and isinstance(head, Int8TiedHead)


def test_a_model_without_an_output_layer_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the output layer of Linear is a NoneType"):
        quantize_head(nn.Linear(4, 4))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_both_runners_serve_it_and_the_report_says_so(tiny: Path, quantization: Literal["int8"] | None) -> None:
    answers = []
    runners: tuple[RunnerChoice, ...] = ("native", "transformers")
    for runner in runners:
        llm = LLM(tiny, quantization=quantization, int8_head=True, runner=runner)
        report = llm.quantization_report
        if quantization:
            assert report is not None and "lm_head" in {layer.name for layer in report.layers}
            assert "lm_head" not in report.skipped
        (answer,) = llm.generate(
            [{"prompt_token_ids": TOKENS[0].tolist()}], SamplingParams(temperature=0, max_tokens=4)
        )
        answers.append(answer.outputs[0].token_ids[: 1 if quantization else 4])  # int8 models have bf16 K/V natively
    assert answers[0] == answers[1]


def test_the_real_table_is_not_rounded(smollm2_path: Path) -> None:
    plain, _ = load_model(smollm2_path)
    model, _ = load_model(smollm2_path, options=ModelOptions(int8_head=True))
    assert torch.equal(model.get_input_embeddings().weight, plain.get_input_embeddings().weight)
    assert model.get_output_embeddings().weight.dtype == torch.int8
