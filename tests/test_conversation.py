"""Turn after turn: what was said before is found again, and stays few nodes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from architectures import VOCAB, make_model, reference
from gossamer.engine.engine import Engine
from gossamer.engine.runner import Logits
from gossamer.errors import RequestError
from gossamer.runners.transformers import IMPLEMENTATION, TransformersRunner
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

    def poison(plan: Any) -> Logits:
        logits = forward(plan).values
        for chunk in plan.chunks:
            for keys in getattr(chunk.target, "keys", None) or []:
                keys.fill_(math.nan)
        return Logits(logits * math.nan)

    monkeypatch.setattr(engine.runner, "forward", poison)
    engine.add_request("poisoned", {"prompt_token_ids": prompt}, SamplingParams(temperature=0))
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    (output,) = outputs
    assert isinstance(output.error, RequestError) and "poisoned" in str(output.error)
    monkeypatch.setattr(engine.runner, "forward", forward)
    assert answers(engine, [[*prompt, 7]], 4) == expected


def test_a_slot_that_moves_between_two_steps_is_followed(model: Any) -> None:
    """An idle sequence is aborted, and the slot of the one that runs moves into its place."""
    engine = Engine(TransformersRunner(model), NumberTokenizer())
    prompts = [[10, 11, 12], [20, 21, 22, 23], [30, 31]]
    (expected,) = answers(Engine(engine.runner, NumberTokenizer()), [prompts[1]], 12)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, SamplingParams(temperature=0, max_tokens=12))
    for _ in range(3):
        engine.step()
    engine.abort("0")  # the last slot, that of request 2, takes its place
    engine.scheduler.max_num_batched_tokens = 1  # from now on only request 1 runs
    for _ in range(3):
        engine.step()
    engine.abort("2")  # and now the slot of request 1 moves
    outputs: list[Any] = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    assert outputs[0].outputs[0].token_ids == expected
