"""The simulator: its engine beside the real one, conservation, closed forms, and files it must refuse."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gossamer.distributed.simulate.engine_model import EngineModel
from gossamer.distributed.simulate.generate import key_of
from gossamer.distributed.simulate.speeds import Speeds
from gossamer.distributed.simulate.texts import Text
from gossamer.engine.cost import CostModel

BLOCK = 16
COSTS = {
    "segments": CostModel(call=0.0, per_reader=0.0, per_key=0.0, per_pair=0.0, per_private_pair=1.0),
    "folds": CostModel(call=1.0, per_reader=1.0, per_key=1.0, per_pair=1.0, per_private_pair=0.0),
    "measured": CostModel(call=1e-4, per_reader=1e-7, per_key=1e-8, per_pair=2e-8, per_private_pair=1e-6),
}


def speeds_with(cost: CostModel) -> Speeds:
    segments = {name: getattr(cost, name) for name in CostModel.__dataclass_fields__}
    return Speeds(step=0.01, prefill_token=0.001, row=0.001, segments=segments)


class Prompts:
    """Prompts of blocks that are equal exactly if their hashes are; behind them a tail that nobody else has."""

    def __init__(self, rng: random.Random, *, depth: int, branches: int) -> None:
        self.rng, self.depth, self.branches, self.number = rng, depth, branches, 0

    def draw(self, tail: int, output: int) -> tuple[list[int], Text]:
        tokens, chain, path = list[int](), list[int](), list[int]()
        for _ in range(self.rng.randrange(self.depth + 1)):
            path.append(self.rng.randrange(self.branches))
            chain.append(key_of(*path))
            filling = random.Random(chain[-1])
            tokens += [1 + path[-1], *(filling.randrange(1, 257) for _ in range(BLOCK - 1))]
        self.number += 1
        assert self.branches + self.number < 257, "tails begin with tokens of their own"
        tokens += [self.branches + self.number, *(self.rng.randrange(1, 257) for _ in range(tail - 1))]
        return tokens, Text(tuple(chain), BLOCK, len(tokens) + output)


@pytest.fixture(scope="module")
def model(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024))


@pytest.mark.parametrize(
    ("memory", "cost", "together"),
    [(700, "measured", 1), (4000, "folds", 3), (700, "segments", 3), (1000, "segments", 8), (700, "measured", 8)],
)
def test_steps_memory_and_cache_hits_are_those_of_the_real_engine(
    model: str, memory: int, cost: str, together: int
) -> None:
    """In lockstep: what each step computes, the memory behind it, and in the end what of each prompt was cached."""
    from gossamer import LLM, SamplingParams

    llm = LLM(
        model, memory=4 * 10**6, max_num_seqs=6, max_num_batched_tokens=64, runner="transformers", speculation="off"
    )
    engine = llm.engine
    size = engine.tree.layout.bytes_per_token
    engine.budget.total = memory * size
    engine.scheduler.cost = COSTS[cost]
    ours = EngineModel(speeds_with(COSTS[cost]), memory_tokens=memory, max_num_seqs=6, max_num_batched_tokens=64)
    rng = random.Random(f"{memory} {cost} {together}")
    prompts = Prompts(rng, depth=12, branches=3)
    sequences, outputs, waiting = {}, {}, 40
    while waiting or engine.has_unfinished_requests():
        while waiting and engine.num_unfinished_requests < together:
            output = rng.randrange(1, 90)
            tokens, text = prompts.draw(rng.choice([1, 3, 64, 65, 100]), output)
            name = f"{waiting}"
            params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
            engine.add_request(name, {"prompt_token_ids": tokens}, params)
            sequences[name] = ours.add(name, text, len(tokens), output)
            waiting -= 1
        before = engine.stats.computed_tokens
        outputs |= {output.request_id: output for output in engine.step()}
        works, repeats = ours.plan()
        assert sum(work.count for work in works) == engine.stats.computed_tokens - before
        assert (repeats >= 1) == bool(works)
        ours.commit(works, 1)
        assert ours.budget.used * size == engine.budget.used
        assert ours.tree.idle * size == engine.tree.evictable_bytes
        assert len(ours.active) == len(engine.scheduler.active) and len(ours.waiting) == len(engine.scheduler.waiting)
    assert not ours.busy
    cached = {name: output.num_cached_tokens for name, output in outputs.items() if output.error is None}
    assert {name: sequences[name].cached for name in cached} == cached
    assert sum(cached.values()) > 500, "the trace is worth it"
    assert ours.tree.evicted_tokens == engine.tree.evicted_tokens
    assert ours.preemptions == engine.scheduler.num_preemptions
