"""Steps of the real engine, timed, for :mod:`gossamer.distributed.simulate.speeds`."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

import gossamer
from gossamer.distributed.simulate.speeds import SEGMENT_TERMS, Speeds, StepCounts, fit
from gossamer.engine.engine import Engine
from gossamer.engine.scheduler import Work
from gossamer.engine.slots import Slot
from gossamer.engine.tree import Node
from gossamer.errors import ConfigurationError
from gossamer.llm import LLM
from gossamer.sampling_params import SamplingParams

SHARED = (0, 1024)  # tokens that all prompts of a case begin with
OWN = (48, 200)  # tokens that each has for itself
BATCHES = (1, 4, 16)
OUTPUT = 24


def counts_of(works: Sequence[Work]) -> StepCounts:
    """What a step of the engine does, in the terms of the simulator."""
    rows, chunk, private_pairs = 0, 0, 0
    readers: Counter[Node] = Counter()
    for work in works:
        private_pairs += work.count * work.offset + work.count * (work.count + 1) // 2
        if isinstance(work.target, Slot):
            above = work.sequence.node
            rows += work.count == 1
            chunk += work.count if work.count > 1 else 0
        else:
            above = work.target.parent
            chunk += work.count
        while above is not None and above.parent is not None:
            readers[above] += work.count
            above = above.parent
    keys = sum(len(node) for node in readers)
    return StepCounts(chunk, rows, private_pairs, keys, sum(count * len(node) for node, count in readers.items()))


class StepTimes:
    """Runs an engine's steps and keeps what each did and how long it took."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.counts: list[StepCounts] = []
        self.seconds: list[float] = []
        self._works: list[Work] = []

    def run(self) -> None:
        """Until nothing is left to do."""
        planner = self.engine.planner
        plan = planner.plan

        def watched(works: list[Work]) -> Any:
            self._works = works
            self.counts.append(counts_of(works))
            return plan(works)

        planner.plan = watched  # type: ignore[method-assign]
        try:
            while self.engine.has_unfinished_requests():
                before = len(self.counts)
                start = time.perf_counter()
                self.engine.step()
                if len(self.counts) > before:
                    self.seconds.append(time.perf_counter() - start)
        finally:
            planner.plan = plan  # type: ignore[method-assign]


def measure_speeds(
    llm: LLM,
    *,
    model: str,
    machine: str = "",
    rounds: int = 2,
    seed: int = 0,
    progress: Callable[[str], None] = lambda note: None,
) -> Speeds:
    """Time steps of prompts and of decoding, with and without common prefixes, and fit the coefficients.

    Each case is a number of prompts at once; all come in random order, ``rounds`` times, so that what else the machine
    does meets all of them. ``model`` and ``machine`` are what the speeds say they are of.

    Raises:
        ConfigurationError: the model uses drafts or recurrent layers, which the simulator does not know, or its
            context is too short to measure anything.
    """
    engine = llm.engine
    if engine.speculator is not None or engine.tree.layout.state_bytes:
        raise ConfigurationError(
            "speeds are of steps without drafts and without recurrent layers; load the model with speculation 'off', "
            "or another model"
        )
    room = engine.max_model_len - OUTPUT - 1
    cases = [(batch, shared, own) for batch in BATCHES for shared in SHARED for own in OWN if shared + own <= room]
    cases = [(b, s, o) for b, s, o in cases if b <= engine.scheduler.max_num_seqs]
    if len(cases) < 4:
        raise ConfigurationError(f"a context of {engine.max_model_len} tokens is too short to measure speeds")
    rng = random.Random(seed)
    times = StepTimes(engine)
    for number in range(rounds + 1):  # the first is to warm up, with few cases
        order = rng.sample(cases, len(cases) if number else 2)
        for place, (batch, shared, own) in enumerate(order):
            progress(f"round {number} of {rounds}, case {place + 1} of {len(order)}")
            _run_case(times, rng, batch, shared, own)
        if number == 0:
            times.counts.clear()
            times.seconds.clear()
    coefficients, residuals = fit(times.counts, times.seconds)
    cost = engine.scheduler.cost
    return Speeds(
        **coefficients,
        segments={name: 0.0 if cost is None else getattr(cost, name) for name in SEGMENT_TERMS},
        kv_bytes_per_token=engine.tree.layout.bytes_per_token,
        model=model,
        version=gossamer.__version__,
        machine=machine,
        threads=torch.get_num_threads(),
        residuals=residuals,
    )


def _run_case(times: StepTimes, rng: random.Random, batch: int, shared: int, own: int) -> None:
    engine = times.engine
    engine.tree.evict(engine.budget.total)

    def draw(count: int) -> list[int]:
        return [rng.randrange(engine.runner.vocab_size) for _ in range(count)]

    common = draw(shared)
    params = SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True)
    for number in range(batch):
        engine.add_request(f"measure-{number}", {"prompt_token_ids": common + draw(own)}, params)
    times.run()
