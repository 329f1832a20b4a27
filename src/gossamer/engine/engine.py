"""The engine: requests in, tokens out, one forward pass per step.

    add_request -> Intake -> Scheduler -> build_plan -> Runner.forward -> Sampler -> RequestOutput

See docs/explanation/a-request.md, which follows one request through these files.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence as Many
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.branching import descend, hand_out
from gossamer.engine.completion_text import describe_prompt
from gossamer.engine.cost import CostModel, calibrate
from gossamer.engine.emission import NO_TOKEN, Emission
from gossamer.engine.intake import Intake, Prompt
from gossamer.engine.memory import MemoryBudget
from gossamer.engine.output_cache import keep_output
from gossamer.engine.plan import StepPlan
from gossamer.engine.planner import KeyCount, PlannedRows, Planner
from gossamer.engine.prefix_store import PrefixStore
from gossamer.engine.request_factory import RequestFactory
from gossamer.engine.results import Output, ResultBuilder
from gossamer.engine.runner import Logits, Runner, RunnerEndedError
from gossamer.engine.sampling import Sampled, Sampler, token_logprobs, top_logprobs
from gossamer.engine.scheduler import Scheduler, Work
from gossamer.engine.sequence import Request, Sequence, Status
from gossamer.engine.slots import Slot, SlotPool
from gossamer.engine.speculation.config import SpeculativeConfig
from gossamer.engine.speculation.speculator import Speculator
from gossamer.engine.speculation.stats import SpeculationStats
from gossamer.engine.speculation.step_time import measure_steps
from gossamer.engine.stats import EngineStats
from gossamer.engine.tree import PrefixTree
from gossamer.errors import ConfigurationError, EngineError, MemoryBudgetError, RequestError
from gossamer.options import EngineOptions, is_integer
from gossamer.sampling_params import BeamSearchParams, SamplingParams

NOT_FINITE = "the model's logits are not finite"
STATE_NOT_FINITE = "the state of the model's recurrent layers is not finite"
SCORED_LOGIT_BYTES = 256 << 20  # fp32 logits of the tokens that are scored in one step


class Engine:
    """Serves requests over one model.

    Args:
        runner: the model.
        tokenizer: a Hugging Face tokenizer.
        options: how requests share the model. With ``sharing="attention"`` shared prefixes are computed, stored and
            attended to once; with ``"storage"`` they are computed and stored once, but every sequence attends on its
            own; with ``"off"`` nothing is shared. Prompts longer than a step are computed in chunks.
        eos_token_ids: every token that ends a text.
        kv_digest: a hexadecimal digest that tells the runner's keys and values from those of other models and settings,
            where prefixes are kept on disk.
        sampler: chooses the tokens; one that decides by itself if it is not given.

    Attributes:
        store: prefixes on disk; ``None`` if ``options`` name no directory for them.

    Raises:
        ConfigurationError: the model cannot take so long a text, or there can be no such directory.
    """

    def __init__(
        self,
        runner: Runner,
        tokenizer: Any,
        options: EngineOptions = EngineOptions(),
        *,
        eos_token_ids: frozenset[int] = frozenset(),
        kv_digest: str = "",
        sampler: Sampler | None = None,
    ) -> None:
        max_model_len, memory = options.max_model_len, options.memory_bytes
        if max_model_len is not None and not (is_integer(max_model_len) and 1 < max_model_len <= runner.max_model_len):
            raise ConfigurationError(
                f"max_model_len must be from 2 to {runner.max_model_len}, the model's own limit, got {max_model_len}"
            )
        self.runner = runner
        self.tokenizer = tokenizer
        self.sharing = options.sharing
        self.max_model_len = max_model_len or runner.max_model_len
        self.budget = MemoryBudget(memory)
        self.tree = PrefixTree(runner.layout, self.budget)
        self.store: PrefixStore | None = None
        if options.prefix_dir is not None and runner.layout.state_bytes:
            raise ConfigurationError(
                "prefix_dir cannot be used: the model has recurrent layers, whose states are not written to disk"
            )
        if options.prefix_dir is not None:
            self.store = PrefixStore(
                Path(options.prefix_dir),
                options.prefix_dir_bytes,
                self.tree,
                model=kv_digest,
                vocab_size=runner.vocab_size,
                salts=options.prefix_dir_digests,
            )
        self.slots = SlotPool(runner.layout, self.budget)
        with_cost = options.sharing != "off" or options.speculation != "off"
        cost = calibrate(runner) if with_cost and runner.layout.layers else None
        self.scheduler = Scheduler(
            self.tree,
            self.slots,
            cost if options.sharing != "off" else None,
            max_num_seqs=options.max_num_seqs,
            max_num_batched_tokens=options.max_num_batched_tokens,
            max_scored_tokens=max(SCORED_LOGIT_BYTES // (4 * runner.vocab_size), 16),
            state_interval=options.state_interval,
        )
        self.stats = EngineStats()
        self.scheduler.on_start = self.stats.count_prompt
        if self.store is not None:
            self.scheduler.restore = self.store.restore
        self.planner = Planner(self.tree, per_row=options.sharing == "storage")
        max_cached = runner.layout.tokens_in(memory)
        self.intake = Intake(
            tokenizer,
            runner.vocab_size,
            self.max_model_len,
            max_cached,
            runner.adapters,
            grammars=runner.num_ranks == 1,
        )
        self.factory = RequestFactory(self.intake, eos_token_ids, sharing=options.sharing != "off", seed=options.seed)
        self.results = ResultBuilder(self.factory.tokens)
        self.sampler = sampler or Sampler()
        self.speculator = self._make_speculator(options, cost)
        self.emission = Emission(self.factory, self.stats, self.speculator)
        self.requests: dict[str, Request] = {}
        self._trivial: list[Request] = []  # finished without a step
        self._ended: list[Output] = []

    # --- requests ----------------------------------------------------------------------------------------------

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams, *, stream: bool = False, draw: int | None = None
    ) -> None:
        """Queue a prompt.

        Args:
            request_id: unique among the unfinished requests.
            prompt: text, or ``{"prompt_token_ids": [...]}``; a mapping may name an ``adapter``.
            params: how to sample.
            stream: :meth:`step` also returns the request's unfinished outputs.
            draw: selects the random stream if ``params`` has no seed; by default the order of arrival does.

        Raises:
            RequestError: a subclass says what is wrong with the prompt or the parameters; nothing was queued.
        """
        self._check_id(request_id)
        self._queue(self.factory.generation(request_id, prompt, params, stream=stream, draw=draw))

    def add_score(
        self, request_id: str, prompt: Prompt, continuations: Many[tuple[str | None, list[int]]] | None = None
    ) -> None:
        """Queue a prompt for its log-likelihood, or for those of continuations of it: (text, token ids) each.

        :meth:`step` returns a :class:`~gossamer.outputs.ScoreOutput` for it.

        Raises:
            RequestError: a subclass says what is wrong; nothing was queued.
        """
        self._check_id(request_id)
        self._queue(self.factory.score(request_id, prompt, continuations))

    def add_beam_search(self, request_id: str, prompt: Prompt, params: BeamSearchParams) -> None:
        """Queue a prompt for beam search. :meth:`step` returns a :class:`~gossamer.outputs.BeamSearchOutput` for it.

        Raises:
            RequestError: a subclass says what is wrong; nothing was queued.
        """
        self._check_id(request_id)
        self._queue(self.factory.beam_search(request_id, prompt, params))

    def abort(self, request_id: str) -> None:
        """Forget a request. Unknown and finished ones are ignored."""
        request = self.requests.pop(request_id, None)
        if request is not None:
            for sequence in request.sequences:
                self._end(sequence)
            request.release()

    def has_unfinished_requests(self) -> bool:
        return bool(self.requests)

    @property
    def num_unfinished_requests(self) -> int:
        return len(self.requests)

    def pin(self, prompt: Prompt) -> int:
        """Keep this prefix's keys and values, once computed, whatever else needs memory. Returns its tokens."""
        _, ids = self.intake.encode(prompt, "pin")
        salt = self.intake.tree_salt(prompt, "pin")
        self.tree.pin(ids, salt)
        if self.store is not None:
            self.store.pin(ids, salt)
        return len(ids)

    def unpin(self, prompt: Prompt) -> None:
        """Undo one :meth:`pin` of the same prefix."""
        _, ids = self.intake.encode(prompt, "unpin")
        salt = self.intake.tree_salt(prompt, "unpin")
        self.tree.unpin(ids, salt)
        if self.store is not None:
            self.store.unpin(ids, salt)

    def close(self) -> None:
        """Give what waits to be written to disk some seconds; from then on nothing more is."""
        if self.store is not None:
            self.store.close()

    def reset_stats(self) -> None:
        """Count from zero again."""
        self.stats = self.emission.stats = EngineStats()
        if self.speculator is not None:
            self.speculator.stats = SpeculationStats()
        self.scheduler.on_start = self.stats.count_prompt
        self.budget.peak = self.budget.used
        self.tree.evicted_tokens = self.scheduler.num_preemptions = 0

    def _make_speculator(self, options: EngineOptions, cost: CostModel | None) -> Speculator | None:
        if options.speculation == "off" or self.runner.num_ranks > 1:  # what pays is measured, by each rank for itself
            return None
        if self.runner.layout.state_bytes and not self.runner.in_turn:
            if options.speculative_config is not None:
                raise ConfigurationError(
                    "speculative_config cannot be used: the recurrent layers of transformers compute several tokens at "
                    "once in another way than one by one, with other rounding; the native runner does not"
                )
            return None
        if cost is None:
            return None
        if name := self.runner.shared_outliers:
            if options.speculative_config is not None:
                raise ConfigurationError(
                    f"speculative_config cannot be used: {name} takes the outlier columns of all rows of a step out of "
                    "the int8 product (int8_outliers 'batch'), so a wrong draft would change what is right; load the "
                    "model with int8_outliers 'token' or 'static'"
                )
            return None
        most = options.most_rows
        return Speculator(
            SpeculativeConfig.of(options.speculative_config),
            lambda: measure_steps(self.runner, most),
            self.tree,
            words=self.factory.tokens,
            vocab_size=self.runner.vocab_size,
            row_seconds_per_key=cost.per_pair * len(self.runner.layout.layers),
            most_rows=most,
            most_chosen=self.scheduler.max_scored_tokens,
        )

    def _check_id(self, request_id: str) -> None:
        if request_id in self.requests:
            raise RequestError("a request of this id is unfinished; ids must be unique", request_id=request_id)

    def _queue(self, request: Request) -> None:
        self.requests[request.request_id] = request
        for sequence in request.sequences:
            if sequence.num_to_compute:
                self.scheduler.add(sequence)
            else:  # the score of a single token: nothing precedes it
                sequence.status = Status.FINISHED
                self._trivial.append(request)

    # --- one step ----------------------------------------------------------------------------------------------

    def step(self) -> list[Output]:
        """Compute one forward pass. Returns the requests that ended with it, and news of those that stream.

        If the model or the sampler raises, nothing of the step counts, and the next call tries again; see
        :meth:`step_apart` for what to do if that raises too.
        """
        start = time.perf_counter()
        self._ended += self._finish_late()
        works = self.scheduler.schedule()
        self._ended += self._take_failures() + self._take_trivial()
        if not works:
            if self.scheduler.held and not self._ended:
                constraints = [sequence.constraint for sequence in self.scheduler.active]
                self.factory.grammars.wait_any([each for each in constraints if each is not None])
            elif self.requests and not self._ended and not self.scheduler.apart:
                raise RuntimeError("the scheduler found nothing to do for unfinished requests; please report this")
            return self._take_ended()
        if self.speculator is not None:
            self.speculator.propose(works)
        plan, rows, count = self.planner.plan(works)
        sampled = self.stats.sampling_seconds
        forward = time.perf_counter()
        output = self.runner.forward(plan)
        logits = output.values
        done = time.perf_counter()
        chosen = self._draw(rows, output)
        unsound = self._commit(works, plan)
        failed = [self._fail(sequence.request, error) for sequence, error in self.emission.accept(rows, chosen)]
        failed += [self._fail(request, RequestError(STATE_NOT_FINITE)) for request in unsound]
        self._ended += [output for output in failed if output is not None]
        self._ended += self._branch(rows, logits) + self._score(rows, logits)
        self._ended += self._collect(works)
        self._count(works, count)
        self.stats.forward_seconds += done - forward
        sampling = self.stats.sampling_seconds - sampled
        other = time.perf_counter() - done + forward - start - sampling
        self.stats.overhead_seconds += other
        if self.speculator is not None and self.speculator.time is not None:
            self.speculator.time.learn(
                len(plan.token_ids),
                done - forward,
                choosing=sampling,
                chosen=len(rows.drawn),
                other=other,
                drafted=any(work.draft for work in works),
            )
        return self._take_ended()

    def step_apart(self) -> list[Output]:
        """A step for each request that is being computed, alone: the ones whose step raises end with that error.

        For an error that comes again: it finds those to blame, and lets the others go on.
        """
        scheduler = self.scheduler
        active, waiting = scheduler.active, scheduler.waiting
        ended: list[Output] = []
        for request in dict.fromkeys(sequence.request for sequence in active):
            scheduler.active = [sequence for sequence in active if sequence.request is request]
            scheduler.waiting, scheduler.apart = deque(), True
            try:
                ended += self.step()
            except RunnerEndedError:
                raise
            except Exception as error:  # whatever it is, it belongs to this request alone
                failure = self._fail(request, EngineError(f"the engine failed on this request: {error!r}"))
                ended += [] if failure is None else [failure]
            active = [sequence for sequence in active if sequence.request is not request] + scheduler.active
            waiting, scheduler.apart = scheduler.waiting + waiting, False
        scheduler.active = sorted(active, key=lambda s: s.order)
        scheduler.waiting = deque(s for s in waiting if s.status is Status.WAITING)  # not those of failed requests
        return ended

    def _take_ended(self) -> list[Output]:
        """Outputs that were not returned yet: those of a step whose forward pass raised are not lost."""
        ended, self._ended = self._ended, []
        return ended

    def _commit(self, works: list[Work], plan: StepPlan) -> list[Request]:
        """What was computed counts from now on. Returns requests whose states are not finite, of which nothing does."""
        runs = {run.target: run for run in plan.state_runs}
        unsound = []
        for work in works:
            target, run = work.target, runs.get(work.target)
            state = None if run is None else run.after
            if isinstance(target, Slot):
                target.length += work.count
                work.state = state
                target.state = state if run is None else run.kept or state
            elif state is not None and not state.finite:
                unsound.append(work.sequence.request)
            else:
                place = work.offset + work.count
                target.computed = max(target.computed, place)
                if state is not None:
                    self.tree.keep_state(target, place, state, apart=self.scheduler.state_interval)
        for run in plan.state_runs:
            run.after = run.kept = None
        return list(dict.fromkeys(unsound))

    def _draw(self, rows: PlannedRows, output: Logits) -> Sampled:
        """A token for every row in which one is chosen. Changes nothing."""
        if not rows.drawn:
            return Sampled([], [])
        count, (logits, largest) = len(rows.drawn), output
        start = time.perf_counter()
        if count < len(rows.sampled):
            logits, largest = logits[rows.drawn], None
        elif count < len(logits):
            logits, largest = logits[:count], None if largest is None else largest[:count]
        sampled = self.sampler.sample(logits, rows.states, largest)
        self.stats.sampling_seconds += time.perf_counter() - start
        return sampled

    def _finish_late(self) -> list[Output]:
        """Sequences whose grammar said only after their step that they are complete."""
        ended: list[Output] = []
        for sequence in self.emission.completed_late():
            self._end(sequence)
            ended += self._news(sequence.request)
        return ended

    def _branch(self, rows: PlannedRows, logits: Tensor) -> list[Output]:
        """Beam searches: once all hypotheses of a request are up to date, the best continuations replace them."""
        ready, unsound = hand_out(rows.branching, logits)
        ended = [self._fail(request, RequestError(NO_TOKEN)) for request in unsound]
        for request in ready:
            living = descend(request, self.scheduler)
            self.stats.generated_tokens += living
            if not living:
                ended.append(self._finish(request))
        return [output for output in ended if output is not None]

    def _score(self, rows: PlannedRows, logits: Tensor) -> list[Output]:
        """Log-probabilities of given tokens; returns requests that failed over them."""
        first = len(rows.sampled)
        failed = []
        for sequence, target, count in rows.scored:
            part = logits[first : first + count]
            targets = torch.tensor(sequence.tokens[target : target + count], device=logits.device)
            sequence.scores += token_logprobs(part, targets).tolist()
            params = sequence.request.params
            if params is not None and params.prompt_logprobs is not None:
                top = top_logprobs(part, targets, params.prompt_logprobs)
                describe_prompt(sequence, target, self.factory.tokens, top)
                sequence.top_scores += top
            first += count
            if any(math.isnan(value) for value in sequence.scores[-count:]):
                failed.append(self._fail(sequence.request, RequestError(NOT_FINITE)))
        return [output for output in failed if output is not None]

    # --- endings -----------------------------------------------------------------------------------------------

    def _collect(self, works: list[Work]) -> list[Output]:
        """End what is finished; the outputs of ended requests, and of those that stream."""
        finished = [w.sequence for w in works if w.sequence.status is Status.RUNNING and self._is_done(w.sequence)]
        # From the last slot of each bucket to the first, so that none has to move into a gap.
        for sequence in sorted(finished, key=lambda s: -s.slot.index if s.slot else 0):
            self._end(sequence)
        news = dict.fromkeys(s.request for s in finished)
        news |= dict.fromkeys(w.sequence.request for w in works if w.sequence.request.stream)
        ended: list[Output] = []
        for request in news:
            ended += self._news(request)
        return ended

    def _news(self, request: Request) -> list[Output]:
        """The output of a request that has ended, or streams."""
        if request.request_id not in self.requests:
            return []
        if request.finished:
            return [self._finish(request)]
        return [self.results.build(request)] if request.stream else []

    def _finish(self, request: Request) -> Output:
        del self.requests[request.request_id]
        self.stats.finished_requests += 1
        if self.store is not None:
            self.store.keep(request.prompt_token_ids, request.tree_salt)
        output = self.results.build(request)
        request.release()
        return output

    def _is_done(self, sequence: Sequence) -> bool:
        if sequence.generate:
            return sequence.finish_reason is not None
        return sequence.num_computed >= sequence.num_to_compute

    def _end(self, sequence: Sequence) -> None:
        """Give the sequence's memory back; what it generated stays in the tree while memory allows."""
        if sequence.status is Status.RUNNING and sequence.generate and self.sharing != "off":
            keep_output(sequence, self.tree)
        if self.speculator is not None:
            self.speculator.end(sequence, keep=sequence.finish_reason is not None)
        self.scheduler.release(sequence)
        sequence.status = Status.FINISHED

    def _fail(self, request: Request, error: RequestError) -> Output | None:
        """End a whole request with an error; the others go on."""
        if self.requests.pop(request.request_id, None) is None:
            return None
        error.request_id = request.request_id
        for sequence in request.sequences:
            if self.speculator is not None:
                self.speculator.end(sequence, keep=False)
            self.scheduler.release(sequence)
            sequence.status = Status.FINISHED
            if not isinstance(error, MemoryBudgetError):  # what went wrong may stand in the keys and values
                self.tree.forget(sequence.tokens, request.tree_salt)
        self.stats.failed_requests += 1
        output = self.results.build(request, error)
        request.release()
        return output

    def _take_trivial(self) -> list[Output]:
        requests, self._trivial = self._trivial, []
        return [self._finish(request) for request in requests if request.request_id in self.requests]

    def _take_failures(self) -> list[Output]:
        failed, self.scheduler.failed = self.scheduler.failed, []
        outputs = [self._fail(sequence.request, error) for sequence, error in failed]
        return [output for output in outputs if output is not None]

    def _count(self, works: list[Work], count: KeyCount) -> None:
        self.stats.count_step(works, count, self.sharing)
        self.stats.kv_bytes, self.stats.kv_bytes_peak = self.budget.used, self.budget.peak
        self.stats.preemptions = self.scheduler.num_preemptions
        self.stats.evicted_tokens = self.tree.evicted_tokens
