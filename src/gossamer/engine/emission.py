"""What becomes of the tokens that were chosen in a step: they join their sequences, and may end them."""

from __future__ import annotations

import time
from collections.abc import Callable
from collections.abc import Sequence as Many

from gossamer.engine.completion_text import extend_text, settle_text
from gossamer.engine.planner import Burst, PlannedRows
from gossamer.engine.request_factory import RequestFactory
from gossamer.engine.sampling import Sampled
from gossamer.engine.sequence import Sequence, Status
from gossamer.engine.speculation.speculator import Speculator
from gossamer.engine.stats import EngineStats
from gossamer.engine.stopping import Stop
from gossamer.errors import EngineError, RequestError
from gossamer.outputs import Logprob

NO_TOKEN = "no token can be sampled: the model's logits are not finite, or all tokens are excluded"


class Emission:
    """Appends tokens to sequences, as far as nothing ends them, and tells everyone who has to know of them.

    Args:
        factory: has the grammars, and the texts of tokens.
        stats: counts them.
        speculator: learns from them; ``None`` without drafts.

    Attributes:
        on_token: called with the seconds since a sequence's tokens before.
    """

    def __init__(self, factory: RequestFactory, stats: EngineStats, speculator: Speculator | None) -> None:
        self.stats = stats
        self.speculator = speculator
        self.on_token: Callable[[float], None] = lambda seconds: None
        self._factory = factory
        self._late: list[Sequence] = []  # whose grammars have not said yet whether they are complete

    def accept(self, rows: PlannedRows, sampled: Sampled) -> list[tuple[Sequence, RequestError]]:
        """Give every sequence the tokens that were chosen for it; returns those that fail over them, and why."""
        failed: list[tuple[Sequence, RequestError]] = []
        emitted = [burst.emitted(sampled.token_ids) for burst in rows.bursts]
        self._advance(rows.bursts, emitted)
        now = time.perf_counter()
        for burst, tokens in zip(rows.bursts, emitted, strict=True):
            sequence, request = burst.sequence, burst.sequence.request
            if tokens[-1] < 0:
                failed.append((sequence, _no_token(sequence)))
                continue
            if sequence.last_token is not None:
                self.on_token(now - sequence.last_token)
            sequence.last_token = request.last_token = now
            request.first_token = request.first_token or now
            try:
                self._accept_burst(burst, tokens, sampled.logprobs[burst.first :])
            except Exception as error:  # whatever is wrong with one text must not stop the others
                failed.append((sequence, EngineError(f"its text cannot be continued: {error}")))
        return failed

    def _accept_burst(self, burst: Burst, tokens: list[int], logprobs: Many[dict[int, Logprob] | None]) -> None:
        """Append tokens up to the first that ends the sequence. Those that were drafted are computed already."""
        sequence, state, drafted = burst.sequence, burst.sequence.sampling, len(burst.work.draft)
        assert sequence.slot is not None and state is not None
        count = 0
        while count < len(tokens) and sequence.finish_reason is None:
            count += 1
            self._accept(sequence, tokens[count - 1], logprobs[count - 1], last=count == len(tokens))
        if not state.params.greedy:
            state.uniforms.take(count)
        if drafted and (sequence.slot.state is None or count > drafted):
            sequence.slot.length += count - 1
            sequence.slot.state = burst.work.state
            self.stats.computed_tokens += count - 1
        # otherwise wrong drafts went into the state: it stays the one before, and what was right is computed again
        if drafted and self.speculator is not None:
            self.speculator.verified(sequence, burst.work.source, drafted, count - 1)

    def _accept(self, sequence: Sequence, token: int, logprobs: dict[int, Logprob] | None, *, last: bool) -> None:
        """Append a sampled token, the ``last`` of its step or not, and mark the sequence as finished if it ends it."""
        sequence.tokens.append(token)
        sequence.output_ids.append(token)
        self.stats.generated_tokens += 1
        checker, state = sequence.stop, sequence.sampling
        assert checker is not None and state is not None
        stop = checker.check_token(token, len(sequence.output_ids))
        if last and state.constraint is not None and (stop is None or not stop.hides_token):
            if state.constraint.complete:
                stop = Stop("stop")
            elif not state.constraint.ready and stop is None:
                self._late.append(sequence)
        _settle(sequence, extend_text(sequence, self._factory.tokens, logprobs, stop))
        if state.reasoning is not None and sequence.detokenizer is not None:
            state.reasoning.push(token, sequence.detokenizer.text, whole=sequence.detokenizer.whole)

    def _advance(self, bursts: list[Burst], emitted: list[list[int]]) -> None:
        """Look for what may come next; tell grammars their tokens, and give their masks the time a step can bear."""
        asked = []
        for burst, tokens in zip(bursts, emitted, strict=True):
            if tokens[-1] < 0:
                continue
            drafted = self.speculator.advance(burst.sequence, tokens) if self.speculator is not None else []
            if (constraint := burst.sequence.constraint) is not None:
                constraint.accept(tokens, drafted)
                asked.append(constraint)
        self._factory.grammars.wait(asked)

    def completed_late(self) -> list[Sequence]:
        """Sequences whose grammar said only after their step that they are complete: they have ended."""
        ready = [sequence for sequence in self._late if sequence.constraint is None or sequence.constraint.ready]
        self._late = [sequence for sequence in self._late if sequence not in ready]
        completed = []
        for sequence in ready:
            constraint = sequence.constraint
            if constraint is not None and constraint.complete and sequence.status is not Status.FINISHED:
                _settle(sequence, settle_text(sequence, self._factory.tokens, Stop("stop")))
                completed.append(sequence)
        return completed


def _settle(sequence: Sequence, stop: Stop | None) -> None:
    if stop is not None:
        sequence.finish_reason, sequence.stop_reason = stop.finish_reason, stop.stop_reason


def _no_token(sequence: Sequence) -> RequestError:
    state = sequence.sampling
    if state is not None and state.constraint is not None and state.constraint.error:
        return RequestError(f"the grammar cannot be followed any further: {state.constraint.error}")
    return RequestError(NO_TOKEN)
