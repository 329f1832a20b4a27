"""Real weights, real text: the contract of test_exactness.py for SmolLM2, through the public API."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
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
    document, sections = text[:1200], (text[1200:1500], text[5000:5200])
    return [f"{document}\n{section}\nQuestion: {q}\nAnswer:" for section in sections for q in QUESTIONS] + [
        text[9000:9100]
    ]


@pytest.fixture(scope="module")
def greedy(smollm2_path: Path) -> Callable[[tuple[int, ...], tuple[int, ...]], tuple[int, ...]]:
    """A function of a prompt and an answer: what transformers finds most probable after each token before the next.

    These are the tokens of the answer if, and only if, it is the one that transformers decodes greedily. All of them
    take one pass, where decoding takes one for each.
    """
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()

    @cache
    @torch.inference_mode()
    def following(prompt: tuple[int, ...], answer: tuple[int, ...]) -> tuple[int, ...]:
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return tuple(logits.argmax(-1).tolist())

    return following


@pytest.mark.parametrize("sharing", SHARING_MODES)
def test_greedy_tokens_equal_transformers(
    smollm2_path: Path, prompts: list[str], greedy: Callable[..., tuple[int, ...]], sharing: str
) -> None:
    params = SamplingParams(temperature=0, max_tokens=24)
    with LLM(smollm2_path, dtype="float32", sharing=sharing, max_num_batched_tokens=150) as llm:  # type: ignore[arg-type]  # a mode by name
        end = llm.tokenizer.eos_token_id
        for _ in range(2):  # cold, then warm
            outputs = llm.generate(prompts, params)
            for output in outputs:
                answer = tuple(output.outputs[0].token_ids)
                assert greedy(tuple(output.prompt_token_ids), answer) == answer
                assert (len(answer) == 24 or answer[-1] == end) and end not in answer[:-1]
        saved = llm.stats().saved_tokens
        assert (saved > 5 * 300) == (sharing != "off")


def test_bfloat16_stays_close(smollm2_path: Path, prompts: list[str]) -> None:
    """Not exact, but the same distribution: the log-likelihood of the text changes by little."""
    with LLM(smollm2_path, dtype="float32") as llm:
        exact = sum(llm.score(prompts[-1])[0].token_logprobs[1:])  # type: ignore[index]
    with LLM(smollm2_path, dtype="bfloat16") as llm:
        rounded = sum(llm.score(prompts[-1])[0].token_logprobs[1:])  # type: ignore[index]
    assert abs(rounded - exact) < 0.02 * abs(exact)
