"""Real weights, real text: the contract of test_exactness.py for SmolLM2, through the public API."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from gossamer import LLM, SamplingParams
from gossamer.options import SHARING_MODES
from gossamer.texts import reference_text

QUESTIONS = ["What is this text about?", "Which statement is described here?", "Give an example of its use."]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    """Two levels of sharing: a document, then a section of it, then a question."""
    text = reference_text()
    document, sections = text[:2400], (text[2400:3000], text[5000:5400])
    return [f"{document}\n{section}\nQuestion: {q}\nAnswer:" for section in sections for q in QUESTIONS] + [
        text[9000:9100]
    ]


@pytest.fixture(scope="module")
def expected(smollm2_path: Path, prompts: list[str]) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    with LLM(smollm2_path) as llm:
        encoded = [llm.tokenizer.encode(prompt) for prompt in prompts]
    answers = []
    for ids in encoded:
        out = model.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=24, do_sample=False
        )
        answers.append(out[0, len(ids) :].tolist())
    return answers


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_greedy_tokens_equal_transformers(
    smollm2_path: Path, prompts: list[str], expected: list[list[int]], sharing: str
) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(smollm2_path, dtype="float32", sharing=sharing, max_num_batched_tokens=300) as llm:  # type: ignore[arg-type]
        for _ in range(2):  # cold, then warm
            outputs = llm.generate(prompts, params)
            assert [output.outputs[0].token_ids for output in outputs] == expected
        saved = llm.stats().saved_tokens
        assert (saved > 5 * 600) == (sharing != "off")


def test_bfloat16_stays_close(smollm2_path: Path, prompts: list[str]) -> None:
    """Not exact, but the same distribution: the log-likelihood of the text changes by little."""
    with LLM(smollm2_path, dtype="float32") as llm:
        exact = sum(llm.score(prompts[-1])[0].token_logprobs[1:])  # type: ignore[index]
    with LLM(smollm2_path, dtype="bfloat16") as llm:
        rounded = sum(llm.score(prompts[-1])[0].token_logprobs[1:])  # type: ignore[index]
    assert abs(rounded - exact) < 0.02 * abs(exact)
