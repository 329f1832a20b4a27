"""What generated tokens and log-probabilities are compared with: transformers' own; and what an idle engine holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gossamer.engine.engine import Engine
from gossamer.models.quiet import quiet_transformers


def load_reference(directory: Path) -> Any:
    """The model with transformers' own attention, in float32."""
    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@torch.no_grad()
def generate(model: Any, prompt: list[int], **options: Any) -> Any:
    """transformers' ``generate`` without sampling; token 0 counts as text, wherever it stands in the prompt."""
    tokens = torch.tensor([prompt])
    return model.generate(tokens, attention_mask=torch.ones_like(tokens), do_sample=False, pad_token_id=0, **options)


def greedy(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """The tokens that follow a prompt."""
    tokens: list[int] = generate(model, prompt, max_new_tokens=count, **options)[0].tolist()
    return tokens[len(prompt) :]


@torch.no_grad()
def logprobs(model: Any, tokens: list[int]) -> Tensor:
    """Log-probabilities (T, V) of what follows each of ``tokens``."""
    result: Tensor = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return result


def assert_idle(engine: Engine) -> None:
    """No request, and no memory but what the tree keeps for later."""
    assert not engine.requests
    assert not engine.scheduler.active
    assert not engine.scheduler.waiting
    assert engine.slots.num_bytes == 0
    assert all(node.refs == 0 for node in engine.tree)
    assert engine.budget.used == engine.tree.num_bytes
