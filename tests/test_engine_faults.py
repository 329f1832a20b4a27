"""When a step raises again and again: the requests to blame end with the error, the others as if nothing had been."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest

from gossamer import LLM, BeamSearchParams, SamplingParams
from gossamer.engine.sampling import Sampler
from gossamer.errors import EngineError, MemoryBudgetError

PROMPTS = [f"The same beginning for all of them, and then number {i}" for i in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)


def run(llm: LLM) -> dict[str, Any]:
    """As the server does: step, and where that fails step each request apart."""
    outputs: dict[str, Any] = {}
    while llm.engine.has_unfinished_requests():
        try:
            ended = llm.engine.step()
        except Exception:  # what the tests raise, of any kind, as the server takes it
            ended = llm.engine.step_apart()
        outputs |= {output.request_id: output for output in ended}
    return outputs


@pytest.mark.parametrize("options", [{}, {"max_num_seqs": 2}, {"max_num_batched_tokens": 16}, {"sharing": "off"}])
@pytest.mark.parametrize("where", ["forward", "sampler", "text"])
def test_only_the_one_to_blame_ends(
    tiny: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], where: str
) -> None:
    expected = llm.generate(PROMPTS, GREEDY)
    victim = LLM(tiny, **options)
    poison = SamplingParams(temperature=0, max_tokens=12, stop=["never to be seen"])
    for i, prompt in enumerate(PROMPTS):
        victim.engine.add_request(str(i), prompt, poison if i == 3 else GREEDY)
    bad = victim.engine.requests["3"].sequences[0]
    calls = 0

    def due() -> bool:
        nonlocal calls
        calls += bad in victim.engine.scheduler.active
        return len(bad.output_ids) >= 4

    forward, sample = victim.engine.runner.forward, Sampler.sample

    def failing_forward(plan: Any) -> Any:
        if due() and bad in victim.engine.scheduler.active:
            raise ZeroDivisionError("forward")
        return forward(plan)

    def failing_sample(self: Sampler, logits: Any, states: Any, largest: Any = None) -> Any:
        if due() and bad.sampling in states:
            raise ZeroDivisionError("sampler")
        return sample(self, logits, states, largest)

    def failing_text(text: str, count: int) -> Any:
        if due():
            raise ZeroDivisionError("text")

    if where == "forward":
        monkeypatch.setattr(victim.engine.runner, "forward", failing_forward)
    elif where == "sampler":
        monkeypatch.setattr(Sampler, "sample", failing_sample)
    else:
        monkeypatch.setattr(bad.stop, "check_text", failing_text)
    outputs = run(victim)
    assert calls
    assert isinstance(outputs["3"].error, EngineError) and where in str(outputs["3"].error)
    for i in (0, 1, 2, 4, 5):
        assert outputs[str(i)].error is None
        assert outputs[str(i)].outputs[0].token_ids == expected[i].outputs[0].token_ids
    engine = victim.engine
    assert not engine.scheduler.active and not engine.scheduler.waiting and not engine.requests
    engine.tree.evict(engine.budget.total)
    engine.slots.trim()
    assert engine.budget.used == 0


def test_a_request_tried_alone_waits_for_memory_that_others_hold(tiny: Path, llm: LLM) -> None:
    expected = llm.generate(PROMPTS, GREEDY)
    engine = LLM(tiny).engine
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, GREEDY)
    engine.scheduler._admit()
    held = engine.budget.free
    assert engine.budget.reserve(held)
    assert engine.step_apart() == [] and len(engine.requests) == len(PROMPTS)
    engine.budget.release(held)
    outputs: dict[str, Any] = {}
    while engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in engine.step()}
    for i in range(6):
        assert outputs[str(i)].outputs[0].token_ids == expected[i].outputs[0].token_ids


def test_a_fault_that_passes_costs_nobody_anything(tiny: Path, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(seed=4, max_tokens=9))
    other = LLM(tiny)
    forward, calls = other.engine.runner.forward, 0

    def flaky(plan: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls in (2, 11):
            raise MemoryError
        return forward(plan)

    monkeypatch.setattr(other.engine.runner, "forward", flaky)
    for i, prompt in enumerate(PROMPTS):
        other.engine.add_request(str(i), prompt, SamplingParams(seed=4, max_tokens=9))
    outputs = run(other)
    for i in range(6):
        assert outputs[str(i)].outputs[0].token_ids == expected[i].outputs[0].token_ids


def test_nothing_of_an_ended_request_waits_for_a_garbage_collection(tiny: Path) -> None:
    llm = LLM(tiny)
    engine = llm.engine
    engine.add_request("many", PROMPTS[0], SamplingParams(n=3, max_tokens=4, stop=["never"], ignore_eos=True))
    engine.add_request("stream", PROMPTS[1], GREEDY, stream=True)
    engine.add_request("aborted", PROMPTS[2], SamplingParams(n=2, max_tokens=100, ignore_eos=True))
    engine.add_request("too large", PROMPTS[3], GREEDY)
    engine.add_score("score", PROMPTS[4])
    engine.add_beam_search("beam", PROMPTS[5], BeamSearchParams(beam_width=3, max_tokens=4))
    requests = list(engine.requests.values())
    left = [weakref.ref(each) for request in requests for each in (request, *request.sequences)]
    failing = requests[3].sequences[0]
    gc.collect()
    gc.disable()
    try:
        ended = {output.request_id for output in engine.step()}
        engine.abort("aborted")
        engine.scheduler.release(failing)
        engine.scheduler.failed.append((failing, MemoryBudgetError("no room")))
        del requests, failing
        assert ended | set(run(llm)) == {"many", "stream", "too large", "score", "beam"}
        assert llm.generate([PROMPTS[0]], GREEDY)  # the engine knows its latest step
        assert [each() for each in left] == [None] * len(left)
    finally:
        gc.enable()
