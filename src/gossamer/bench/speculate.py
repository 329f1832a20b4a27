"""Several tokens per step: the same requests with drafts and without, on one loaded model.

**Rounds.** In each round the same requests are answered without drafts and with them, in turn, and by the peers; every
other round begins with the drafts. Ratios are taken within a round, and medians of them shown. Every turn has a
``cache_salt`` of its own: what stands in earlier answers is drafted only within a salt, so a turn finds nothing of the
turns before it, where it would otherwise find its own answers.

**What is timed.** The prompts of a group are computed first, untimed; then all requests of the group are added, and the
clock runs from the end of the step in which the last of them got its first token to the end of its last step. Tokens
of that first step are not counted. Requests come one at a time at batch 1, and all at once otherwise, each group after
the one before it.

**Modes.** ``free`` is what the model says. ``forced`` takes every token from the reference answer: the model and the
sampler compute as always, and the sampler's choice is then replaced. Small models answer badly, and so tell little
about how often a draft would be right.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from gossamer.bench.machine import describe
from gossamer.bench.peers.contest import SETTLE_SECONDS
from gossamer.bench.peers.speculation import Ask, PeerOptions, SpeculatingPeer, Turn, open_peers
from gossamer.bench.speculate_tasks import ITEMS, TASKS, Item, Sizes, build_task
from gossamer.engine.sampling import Sampled
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.llm import LLM
from gossamer.outputs import RequestOutput
from gossamer.sampling_params import SamplingParams, StructuredOutputsParams

MODES = ("forced", "free")
OURS = "gossamer"
_SPARE = 192  # tokens of a prompt besides its document: the question, the template
_WARM_UP = 16  # tokens


@dataclass(frozen=True)
class SpeculateOptions:
    """What is measured.

    Attributes:
        tasks: names of :data:`gossamer.bench.speculate_tasks.TASKS`.
        batches: requests at once.
        modes: ``forced``, ``free`` or both.
        rounds: that count.
        requests: of a task, where they come one at a time.
        context: tokens of a prompt with its answer at most.
        new: tokens of an answer at most.
        harbour: the directory of the harbour example.
        peers: which other projects.

    Raises:
        ConfigurationError: a value has no meaning.
    """

    tasks: tuple[str, ...] = tuple(TASKS)
    batches: tuple[int, ...] = (1, 8)
    modes: tuple[str, ...] = MODES
    rounds: int = 3
    requests: int = 4
    context: int = 2048
    new: int = 384
    harbour: Path | None = None
    peers: PeerOptions = field(default_factory=PeerOptions)

    def __post_init__(self) -> None:
        for name, known in (("tasks", tuple(TASKS)), ("modes", MODES)):
            unknown = [each for each in getattr(self, name) if each not in known]
            if unknown or not getattr(self, name):
                raise ConfigurationError(
                    f"{name} are among {', '.join(known)}; got {unknown[0] if unknown else 'none'}"
                )
        if min([*self.batches, self.rounds, self.requests]) < 1:
            raise ConfigurationError("batches, rounds and requests must be at least 1")
        if self.new < 16 or self.context < self.new + _SPARE + 64:
            raise ConfigurationError(
                f"new must be at least 16, and context {_SPARE + 64} more than new; got {self.new} and {self.context}"
            )


@dataclass
class SpeculateResult:
    """One contestant in one task, at one batch size and in one mode.

    Attributes:
        contestant: ``gossamer``, or a peer with what it drafts with.
        requests, prompt_tokens: how many, and tokens of all their prompts.
        tokens: that were timed in a turn with drafts; median over the rounds.
        tokens_per_step: that a sequence got in a step, on average.
        drafted, accepted: tokens of one turn; medians.
        by_source: source -> ``{"draft_tokens": ..., "accepted_tokens": ...}``, over all rounds.
        tokens_per_s: with drafts; median over the rounds.
        tokens_per_s_off: without.
        ratio: median, over the rounds, of ``tokens_per_s`` over that without drafts in the same round.
        ratios: of the rounds.
        over_peer: of a peer: median, over the rounds, of our ``tokens_per_s`` with drafts over its own.
        same: share of requests that were answered with the same tokens with drafts and without.
        error: why there is no result.
    """

    task: str
    batch: int
    mode: str
    contestant: str
    requests: int = 0
    prompt_tokens: int = 0
    tokens: float | None = None
    tokens_per_step: float | None = None
    drafted: float | None = None
    accepted: float | None = None
    by_source: dict[str, dict[str, int]] = field(default_factory=dict)
    tokens_per_s: float | None = None
    tokens_per_s_off: float | None = None
    ratio: float | None = None
    ratios: list[float] = field(default_factory=list)
    over_peer: float | None = None
    same: float | None = None
    error: str | None = None


@dataclass(frozen=True)
class _Request:
    """An item as tokens; ``reference`` ends with the end of a text where the model has one."""

    ask: Ask
    item: Item
    reference: list[int]

    def params(self, mode: str, new: int) -> SamplingParams:
        schema, most = self.item.schema, len(self.reference) if mode == "forced" else new
        return SamplingParams(
            temperature=0,
            max_tokens=most,
            prediction=self.item.prediction,
            structured_outputs=None if schema is None else StructuredOutputsParams(json=schema),
        )


class ForcedSampler:
    """Samples as always, and then takes the token that a reference answer has there.

    Where a row takes drafted tokens for granted, the reference's next token is the one behind them; if they differ from
    the reference, the row's token will not be looked at, and stays as it was sampled.

    Args:
        sampler: computes what would have been chosen.
        references: by prompt, the tokens of the answer.

    >>> import random
    >>> import torch
    >>> from gossamer.engine.sampling import Sampler, SamplingState
    >>> row = SamplingState(SamplingParams(temperature=0), [1], [7], frozenset(), random.Random(0))
    >>> ForcedSampler(Sampler(), {(1,): [7, 8, 9]}).sample(torch.zeros(1, 16), [row]).token_ids
    [8]
    """

    def __init__(self, sampler: Any, references: Mapping[tuple[int, ...], list[int]]) -> None:
        self._sampler = sampler
        self._references = references
        self._found: dict[int, tuple[list[int], list[int]]] = {}  # by identity: a prompt is long, and asked every step

    def sample(self, logits: Tensor, states: list[Any], largest: np.ndarray | None = None) -> Sampled:
        """As :meth:`gossamer.engine.sampling.Sampler.sample`."""
        sampled: Sampled = self._sampler.sample(logits, states, largest)
        rows = zip(states, sampled.token_ids, strict=True)
        return replace(sampled, token_ids=[self._next(state, token) for state, token in rows])

    def _next(self, state: Any, sampled: int) -> int:
        prompt = state.prompt_token_ids
        if id(prompt) not in self._found:
            self._found[id(prompt)] = (
                prompt,
                self._references[tuple(prompt)],
            )  # kept, so that the identity stays its own
        reference = self._found[id(prompt)][1]
        done, ahead = len(state.output_token_ids), list(state.ahead)
        end = done + len(ahead)
        return reference[end] if end < len(reference) and reference[done:end] == ahead else sampled


def bench_speculate(
    llm: LLM,
    options: SpeculateOptions,
    *,
    progress: Callable[[str], None] = lambda note: None,
    told: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Measure every task, batch size and mode.

    Args:
        progress: is told what is under way.
        told: is told each result in a line, as soon as it is there.

    Returns ``{"machine": {...}, "model": ..., "weights": ..., "peers": {...}, "results": [...]}``; see
    :class:`SpeculateResult`. What goes wrong with one task or one peer stands in the place of its figures.

    Raises:
        ConfigurationError: the model has no chat template.
    """
    tasks: dict[str, list[_Request]] = {}
    errors: dict[str, str] = {}
    for name in options.tasks:
        try:
            tasks[name] = _requests(llm, name, options)
        except ConfigurationError as error:
            errors[name] = str(error)
    if not tasks:
        raise ConfigurationError("; ".join(errors.values()))
    results = []
    with open_peers(
        options.peers, llm.model_name, llm.engine, max(options.batches), options.context, progress
    ) as peers:
        warm = next(iter(tasks.values()))[:1]
        for speculates in (False, True):
            progress("warming up")
            _turn(llm, warm, [SamplingParams(temperature=0, max_tokens=_WARM_UP)], 1, "warm-up", speculates)
        if llm.engine.speculator is not None:
            llm.engine.speculator.prepare(max(options.batches))
        for name, batch in itertools.product(options.tasks, options.batches):
            for mode in options.modes:
                try:
                    if name in errors:
                        raise ConfigurationError(errors[name])
                    chosen = _chosen(name, tasks[name], batch, options)
                except ConfigurationError as error:
                    results.append(SpeculateResult(name, batch, mode, OURS, error=str(error)))
                    continue
                rivals = peers if mode == "free" else []
                found = _Race(llm, name, batch, mode, chosen, options, rivals, progress).results()
                for each in found:
                    told(_line(each))
                results += found
    about = {peer.name: peer.report() for peer in peers}
    return {
        "machine": describe(),
        "model": llm.model_name,
        "weights": llm.weights,
        "context": options.context,
        "new": options.new,
        "rounds": options.rounds,
        "peers": about,
        "results": [asdict(each) for each in results],
    }


def _line(result: SpeculateResult) -> str:
    """What is known of one contestant, before everything is."""
    who = f"{result.task}, {result.mode}, batch {result.batch}: {result.contestant}"
    if result.tokens_per_s is None:
        return f"{who}: {result.error}"
    ratio = "" if result.ratio is None else f", {result.ratio:.2f} times that without drafts"
    over = "" if result.over_peer is None else f"; gossamer is {result.over_peer:.2f} times as fast"
    return f"{who}: {result.tokens_per_s:.1f} tok/s{ratio}{over}"


def _requests(llm: LLM, name: str, options: SpeculateOptions) -> list[_Request]:
    """A task's items as tokens, those that fit.

    Raises:
        ConfigurationError: none fits, the task cannot be built, or the model has no chat template.
    """

    def encode(text: str) -> list[int]:
        return list(llm.tokenizer.encode(text, add_special_tokens=False))

    document = options.context - options.new - _SPARE
    sizes = Sizes(lambda text: len(encode(text)), document, options.new, options.harbour)
    ends = llm.engine.factory.eos_token_ids
    end = [llm.tokenizer.eos_token_id] if llm.tokenizer.eos_token_id in ends else sorted(ends)[:1]
    found = []
    for item in build_task(name, sizes, max(ITEMS, options.requests, *options.batches)):
        prompt = llm.apply_chat_template(item.messages)
        reference = (encode(item.answer) + end)[: options.new]
        if len(prompt) + options.new <= min(options.context, llm.max_model_len):
            found.append(_Request(Ask(prompt, options.new, item.schema), item, reference))
    if not found:
        raise ConfigurationError(
            f"{name}: no prompt fits into {options.context} tokens with an answer of {options.new}"
        )
    return found


def _chosen(name: str, requests: list[_Request], batch: int, options: SpeculateOptions) -> list[_Request]:
    """Those of whole groups: the same request twice in a group would find its answer beside it.

    Raises:
        ConfigurationError: there are too few for a group.
    """
    if batch == 1:
        return requests[: options.requests]
    if len(requests) < batch:
        raise ConfigurationError(f"{name}: {len(requests)} requests fit, which make no batch of {batch}")
    return requests[: len(requests) // batch * batch]


@dataclass
class _Race:
    """One task at one batch size in one mode: all rounds of everybody."""

    llm: LLM
    task: str
    batch: int
    mode: str
    requests: list[_Request]
    options: SpeculateOptions
    peers: Sequence[SpeculatingPeer]
    progress: Callable[[str], None]

    def results(self) -> list[SpeculateResult]:
        off: list[Turn] = []
        on: list[Turn] = []
        theirs: dict[str, list[Turn]] = {peer.name: [] for peer in self.peers}
        failed: dict[str, str] = {}
        params = [each.params(self.mode, self.options.new) for each in self.requests]
        for number in range(self.options.rounds):
            order = ((False, off), (True, on))
            for speculates, turns in order if number % 2 == 0 else reversed(order):
                if OURS in failed:
                    break
                self._note(number, f"{OURS} with drafts" if speculates else OURS)
                salt = f"{self.task} {self.batch} {self.mode} {number} {speculates}"
                try:
                    with _forcing(self.llm, self.requests, self.mode):
                        turn = _turn(self.llm, self.requests, params, self.batch, salt, speculates)
                    if self.mode == "forced":
                        _check(self.requests, turn)
                    turns.append(turn)
                except GossamerError as error:
                    failed[OURS] = str(error)
            for peer in self.peers:
                if peer.name in failed:
                    continue
                self._note(number, peer.name)
                time.sleep(SETTLE_SECONDS)
                try:
                    theirs[peer.name].append(peer.answer([each.ask for each in self.requests], self.batch))
                except GossamerError as error:
                    failed[peer.name] = str(error)
            time.sleep(SETTLE_SECONDS if self.peers else 0)
        found = [self._ours(off, on, failed.get(OURS))]
        for peer in self.peers:
            base = theirs.get(peer.base, [])
            found.append(self._peer(peer.name, theirs[peer.name], base, on, failed.get(peer.name)))
        return found

    def _note(self, number: int, who: str) -> None:
        place = f"{self.task}, {self.mode}, batch {self.batch}"
        self.progress(f"{place}: round {number + 1} of {self.options.rounds}, {who}")

    def _empty(self, contestant: str, error: str | None) -> SpeculateResult:
        tokens = sum(len(each.ask.prompt) for each in self.requests)
        return SpeculateResult(self.task, self.batch, self.mode, contestant, len(self.requests), tokens, error=error)

    def _ours(self, off: list[Turn], on: list[Turn], error: str | None) -> SpeculateResult:
        result = self._empty(OURS, error)
        if error is None:
            _fill(result, on, off)
            without = itertools.chain.from_iterable(turn.answers for turn in off)
            with_drafts = itertools.chain.from_iterable(turn.answers for turn in on)
            result.same = statistics.fmean(a == b for a, b in zip(without, with_drafts, strict=True))
        return result

    def _peer(
        self, name: str, turns: list[Turn], base: list[Turn], ours: list[Turn], error: str | None
    ) -> SpeculateResult:
        result = self._empty(name, error)
        if error is None:
            _fill(result, turns, base)
            over = [own.speed / each.speed for own, each in zip(ours, turns, strict=False)]
            result.over_peer = statistics.median(over) if over else None
        return result


def _fill(result: SpeculateResult, on: list[Turn], off: list[Turn]) -> None:
    """The figures of turns with drafts, beside those without in the same rounds."""
    result.tokens = statistics.median(turn.tokens for turn in on)
    steps = sum(turn.sequence_steps for turn in on)
    result.tokens_per_step = sum(turn.tokens for turn in on) / steps if steps else None
    result.drafted = statistics.median(turn.drafted for turn in on)
    result.accepted = statistics.median(turn.accepted for turn in on)
    for turn in on:
        _add(result.by_source, turn.by_source)
    result.tokens_per_s = statistics.median(turn.speed for turn in on)
    if off:
        result.tokens_per_s_off = statistics.median(turn.speed for turn in off)
        result.ratios = [fast.speed / slow.speed for fast, slow in zip(on, off, strict=False)]
        result.ratio = statistics.median(result.ratios)


def _add(total: dict[str, dict[str, int]], by_source: Mapping[str, Mapping[str, int]]) -> None:
    for source, counts in by_source.items():
        known = total.setdefault(source, {})
        for name, count in counts.items():
            known[name] = known.get(name, 0) + count


@contextmanager
def _forcing(llm: LLM, requests: Sequence[_Request], mode: str) -> Iterator[None]:
    """Outputs are the references meanwhile, if the mode says so."""
    engine: Any = llm.engine
    sampler = engine.sampler
    if mode == "forced":
        engine.sampler = ForcedSampler(sampler, {tuple(each.ask.prompt): each.reference for each in requests})
    try:
        yield
    finally:
        engine.sampler = sampler


def _check(requests: Sequence[_Request], turn: Turn) -> None:
    """That the references came; an answer may end before its reference where its grammar allows nothing more."""
    for number, (request, answer) in enumerate(zip(requests, turn.answers, strict=True)):
        least = len(request.reference) - (request.item.schema is not None)
        if answer != request.reference[: len(answer)] or len(answer) < least:
            raise GossamerError(f"answer {number} is not the reference that it was forced to; please report this")


def _turn(
    llm: LLM, requests: Sequence[_Request], params: Sequence[SamplingParams], batch: int, salt: str, speculates: bool
) -> Turn:
    """Answer the requests in groups of ``batch``."""
    engine: Any = llm.engine
    if engine.speculator is not None:
        engine.speculator.enabled = speculates
    turn = Turn()
    for first in range(0, len(requests), batch):
        group = range(first, min(first + batch, len(requests)))
        prompts = [{"prompt_token_ids": requests[n].ask.prompt, "cache_salt": salt} for n in group]
        try:
            _compute(engine, prompts)
            _decode(engine, prompts, [params[n] for n in group], turn)
        except BaseException:
            for request_id in list(engine.requests):
                engine.abort(request_id)
            raise
    return turn


def _compute(engine: Any, prompts: Sequence[dict[str, Any]]) -> None:
    """Keep the prompts' keys and values."""
    for number, prompt in enumerate(prompts):
        engine.add_request(f"prompt {number}", prompt, SamplingParams(temperature=0, max_tokens=0))
    while engine.has_unfinished_requests():
        _raise_errors(engine.step())


def _decode(engine: Any, prompts: Sequence[dict[str, Any]], params: Sequence[SamplingParams], turn: Turn) -> None:
    """Answer one group, and add what was measured to the turn."""
    answers: list[list[int]] = []
    for number, (prompt, each) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(f"answer {number}", prompt, each)
        (sequence,) = engine.requests[f"answer {number}"].sequences
        answers.append(sequence.output_ids)
    while not all(answers):
        _raise_errors(engine.step())
    engine.reset_stats()
    lengths = [len(answer) for answer in answers]
    begun = sum(lengths)
    start = time.perf_counter()
    while engine.has_unfinished_requests():
        _raise_errors(engine.step())
        now = [len(answer) for answer in answers]
        turn.sequence_steps += sum(length > before for length, before in zip(now, lengths, strict=True))
        lengths = now
    turn.seconds += time.perf_counter() - start
    turn.tokens += sum(lengths) - begun
    turn.answers += [list(answer) for answer in answers]
    if engine.speculator is not None:
        told = engine.speculator.stats.to_dict()
        turn.drafted += told["draft_tokens"]
        turn.accepted += told["accepted_tokens"]
        _add(turn.by_source, told["by_source"])


def _raise_errors(outputs: Sequence[Any]) -> None:
    for output in outputs:
        if isinstance(output, RequestOutput) and output.error is not None:
            raise output.error
