"""Grammars that take long: whoever asks for one pays for it, and nobody else."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gossamer import LLM, SamplingParams, StructuredOutputsParams
from gossamer.engine.grammar import Constraint, GrammarCompiler, compiler, program
from gossamer.errors import InvalidSamplingParamsError, RequestError, UnsupportedModelError

SLOW = Path(__file__).parent / "slow_grammars.py"
SLOW_TO_COMPILE = StructuredOutputsParams(choice=["slow to compile"])
SLOW_TO_FOLLOW = StructuredOutputsParams(regex="a~b{20}")  # behind "~" it never says what may come next
GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def with_form(form: StructuredOutputsParams) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=40, structured_outputs=form)


@pytest.fixture
def slow(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[float], LLM]:
    """A model whose grammars are followed by the stand-in, with so many seconds for each piece of work."""

    def make(seconds: float) -> LLM:
        monkeypatch.setattr(compiler, "COMPILE_SECONDS", seconds)
        monkeypatch.setattr(compiler, "MASK_SECONDS", seconds)
        llm = LLM(tiny)
        factory = llm.engine.factory
        intake = factory.intake
        factory.grammars = GrammarCompiler(intake.tokenizer, intake.vocab_size, factory.eos_token_ids, file=SLOW)
        return llm

    return make


def gone(pid: int) -> bool:
    """Whether a process has ended, reaped or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_masks_are_those_of_the_library(llm: LLM) -> None:
    grammars = llm.engine.factory.grammars
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string", "maxLength": 3}}}
    form = {"json": schema}
    here, reason = program.compile_form(form, _trie(llm))
    assert here is not None and not reason
    there = Constraint(grammars, grammars.form(StructuredOutputsParams(json=schema)))
    there.begin()
    draws, tokens, trie = random.Random(0), list[int](), _trie(llm)
    for _ in range(40):
        answer = program.next_masks(here, tokens, [], trie)
        wait_until(lambda: there.ready)
        assert there.complete == (answer.status == program.COMPLETE)
        if there.complete:
            break
        allowed = np.unpackbits(np.frombuffer(answer.masks, np.uint8, grammars.mask_bytes), bitorder="little")
        assert (there.excluded() == ~allowed.view(bool)).all()
        tokens = [draws.choice(np.flatnonzero(allowed).tolist())]
        there.accept(tokens)
    there.close()


def _trie(llm: LLM) -> Any:
    from llguidance.hf import from_tokenizer

    eos = sorted(llm.engine.factory.eos_token_ids)
    return from_tokenizer(llm.tokenizer, n_vocab=llm.engine.intake.vocab_size, eos_token=eos)


def test_a_form_that_takes_too_long_to_compile_is_refused(slow: Callable[[float], LLM], llm: LLM) -> None:
    victim = slow(0.3)
    bad, good = victim.generate(["a", "b"], [with_form(SLOW_TO_COMPILE), GREEDY], on_error="return")
    assert isinstance(bad.error, InvalidSamplingParamsError) and "0.3 seconds to compile" in str(bad.error)
    assert bad.error.param == "structured_outputs"
    assert good.outputs[0].token_ids == llm.generate("b", GREEDY)[0].outputs[0].token_ids
    # Another try costs nothing: no process is started for it.
    grammars = victim.engine.factory.grammars
    with pytest.raises(InvalidSamplingParamsError, match="to compile"):
        grammars.open(grammars.form(SLOW_TO_COMPILE))
    assert not any(grammar.computes for grammar in grammars._grammars.values())


def test_a_mask_that_takes_too_long_fails_its_request_alone(slow: Callable[[float], LLM], llm: LLM) -> None:
    victim = slow(1.0)
    expected = llm.generate("b", GREEDY)[0].outputs[0].token_ids
    victim.engine.add_request("slow", "a", with_form(SLOW_TO_FOLLOW))
    victim.engine.add_request("good", "b", GREEDY)
    outputs: dict[str, Any] = {}
    while victim.engine.has_unfinished_requests():
        outputs |= {output.request_id: output for output in victim.engine.step()}
    assert list(outputs) == ["good", "slow"]  # it went on while the other waited
    assert outputs["good"].outputs[0].token_ids == expected
    assert isinstance(outputs["slow"].error, RequestError) and "more than 1 seconds" in str(outputs["slow"].error)
    assert not victim.engine.scheduler.active and not victim.engine.scheduler.waiting


def test_work_stops_when_its_request_is_forgotten(slow: Callable[[float], LLM]) -> None:
    victim = slow(600.0)
    grammars = victim.engine.factory.grammars
    victim.engine.add_request("slow", "a", with_form(SLOW_TO_FOLLOW))
    (grammar,) = grammars._grammars.values()
    sequence = victim.engine.requests["slow"].sequences[0]
    while len(sequence.output_ids) < 2:
        victim.engine.step()
    assert grammar.computes and not gone(grammar.pid)
    victim.engine.abort("slow")
    wait_until(lambda: gone(grammar.pid))
    assert not grammars._grammars

    opened = grammars.open(grammars.form(SLOW_TO_COMPILE))
    wait_until(lambda: opened.pid > 0)
    grammars.close(opened)
    wait_until(lambda: gone(opened.pid))
    assert not grammars._grammars and not grammars._compiling
    # That nobody waited for it says nothing about the form: it is compiled again.
    grammars.close(grammars.open(grammars.form(SLOW_TO_COMPILE)))


def test_nothing_is_left_of_a_model_that_is_gone(slow: Callable[[float], LLM]) -> None:
    def begin(llm: LLM) -> int:
        grammars = llm.engine.factory.grammars
        opened = grammars.open(grammars.form(SLOW_TO_COMPILE))
        wait_until(lambda: opened.pid > 0)
        return opened.pid

    pid = begin(slow(600.0))
    gc.collect()
    wait_until(lambda: gone(pid))


def test_more_forms_than_processes(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "MAX_GRAMMARS", 3)
    llm = LLM(tiny)
    forms = [StructuredOutputsParams(choice=[f"answer {number}"]) for number in range(8)]
    outputs = llm.generate(["x"] * 8, [with_form(form) for form in forms])
    assert [output.outputs[0].text for output in outputs] == [f"answer {number}" for number in range(8)]
    grammars = llm.engine.factory.grammars
    grammars.open(grammars.form(StructuredOutputsParams(regex="[ab]"))).settled.result(60)
    assert sum(each.users for each in grammars._grammars.values()) == 1
    # Clients wait until one of them ends, and the one that was waited for longest is the next.
    opened = [grammars.open(grammars.form(StructuredOutputsParams(regex=f"c{{{n}}}"))) for n in range(1, 5)]
    wait_until(lambda: opened[0].settled.done() and opened[1].settled.done())
    assert [each.settled.done() for each in opened] == [True, True, False, False]
    grammars.close(opened[0])
    opened[2].settled.result(60)
    assert not opened[3].settled.done()


def test_a_host_that_was_killed_is_started_again(tiny: Path) -> None:
    llm = LLM(tiny)
    yes = with_form(StructuredOutputsParams(choice=["yes"]))
    assert llm.generate("x", yes)[0].outputs[0].text == "yes"
    control = llm.engine.factory.grammars._host._control
    assert control is not None
    control.shutdown(2)
    other = with_form(StructuredOutputsParams(choice=["no"]))
    assert [each.outputs[0].text for each in llm.generate(["x", "x"], [other, yes])] == ["no", "yes"]


def test_a_tokenizer_that_cannot_be_walked_through(tiny: Path, tmp_path: Path) -> None:
    llm = LLM(tiny)
    ends = tmp_path / "program.py"
    ends.write_text("raise SystemExit(1)")  # as it does over a tokenizer that the library does not know
    for tokenizer in (object(), llm.tokenizer):
        grammars = GrammarCompiler(tokenizer, 257, frozenset({0}), file=ends)
        with pytest.raises(UnsupportedModelError, match="tokenizer cannot follow a grammar"):
            grammars.check(grammars.form(StructuredOutputsParams(json_object=True)))
        assert not grammars._grammars and not grammars._compiling


def test_a_form_that_is_too_long() -> None:
    with pytest.raises(InvalidSamplingParamsError, match="at most"):
        GrammarCompiler.form(StructuredOutputsParams(choice=["x" * compiler.MAX_FORM]))
