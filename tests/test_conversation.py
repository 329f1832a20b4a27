"""Turn after turn: what was said before is found again, and stays few nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from architectures import VOCAB, make_model, reference
from gossamer.engine.attention import IMPLEMENTATION
from gossamer.engine.engine import Engine
from gossamer.engine.runner import TransformersRunner
from gossamer.errors import RequestError
from gossamer.sampling_params import SamplingParams
from test_exactness import NumberTokenizer, answers


@pytest.fixture(scope="module")
def model() -> Any:
    model = make_model("llama")
    model.set_attn_implementation(IMPLEMENTATION)
    return model


def test_every_turn_computes_only_what_is_new(model: Any) -> None:
    generate = reference(make_model("llama"))
    engine = Engine(TransformersRunner(model), NumberTokenizer())
    history = [7, 3, 5]
    for turn in range(12):
        history = history + [(turn * 31 + i) % VOCAB for i in range(9)]
        before = engine.stats.computed_tokens
        (answer,) = answers(engine, [history], 6)
        assert answer == generate(history, 6)
        if turn:  # the last turn's last token, the new ones, and all of the answer but its last token
            assert engine.stats.computed_tokens - before == 1 + 9 + 5
        history = history + answer
    # Chains of nodes that nobody uses are joined when the next turn passes along them.
    (leaf,) = [node for node in engine.tree if not node.children]
    assert len(leaf.path()) <= 2 + math.log2(len(history))


def test_what_a_failed_request_computed_is_not_used_again(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(TransformersRunner(model), NumberTokenizer())
    prompt = list(range(100))
    expected = answers(Engine(engine.runner, NumberTokenizer()), [[*prompt, 7]], 4)
    forward = engine.runner.forward

    def poison(plan: Any) -> torch.Tensor:
        logits = forward(plan)
        for chunk in plan.chunks:
            for keys in getattr(chunk.target, "keys", None) or []:
                keys.fill_(math.nan)
        return logits * math.nan

    monkeypatch.setattr(engine.runner, "forward", poison)
    engine.add_request("poisoned", {"prompt_token_ids": prompt}, SamplingParams(temperature=0))
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    (output,) = outputs
    assert isinstance(output.error, RequestError) and "poisoned" in str(output.error)
    monkeypatch.setattr(engine.runner, "forward", forward)
    assert answers(engine, [[*prompt, 7]], 4) == expected
