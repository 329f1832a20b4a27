"""The scheduler, driven by hand: a model of one layer whose keys tell which tokens they were computed from."""

from __future__ import annotations

import zlib
from collections import Counter
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.engine.cost import CostModel
from gossamer.engine.memory import KVLayout, LayerShape, MemoryBudget
from gossamer.engine.scheduler import Scheduler, Work
from gossamer.engine.sequence import Request, Sequence, Status
from gossamer.engine.slots import Slot, SlotPool, capacity_for
from gossamer.engine.tree import Node, PrefixTree
from gossamer.errors import MemoryBudgetError

LAYOUT = KVLayout((LayerShape(1, 1, 1),), torch.float32, torch.device("cpu"))
COSTS = {
    "segments": CostModel(call=0.0, per_reader=0.0, per_key=0.0, per_pair=0.0, per_private_pair=1.0),
    "folds": CostModel(call=1.0, per_reader=1.0, per_key=1.0, per_pair=1.0, per_private_pair=0.0),
    "measured": CostModel(call=1e-4, per_reader=1e-7, per_key=1e-8, per_pair=2e-8, per_private_pair=1e-6),
    "none": None,
}


@dataclass
class Machine:
    """Scheduler, tree and slots, with the engine's part of a step done in the simplest way."""

    budget_tokens: int = 100_000
    max_num_seqs: int = 64
    max_tokens: int = 256
    max_scored: int = 32
    cost: CostModel | None = field(default_factory=lambda: COSTS["segments"])

    def __post_init__(self) -> None:
        self.budget = MemoryBudget(self.budget_tokens * LAYOUT.bytes_per_token)
        self.tree = PrefixTree(LAYOUT, self.budget)
        self.slots = SlotPool(LAYOUT, self.budget)
        self.scheduler = Scheduler(
            self.tree,
            self.slots,
            self.cost,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_tokens,
            max_scored_tokens=self.max_scored,
        )
        self.unfinished: list[Sequence] = []
        self.finished: list[Sequence] = []
        self.failed: list[tuple[Sequence, MemoryBudgetError]] = []
        self.shared_tokens = 0  # computed into the tree
        self.private_tokens = 0  # computed into slots
        self.number = 0

    def add(self, prompt: list[int], new: int = 4, *, share: bool = True, score_from: int | None = None) -> Sequence:
        request = Request(f"request-{self.number}", self.number, None, prompt)
        shareable = len(prompt) if score_from is None else score_from
        sequence = Sequence(
            request,
            0,
            list(prompt),
            shareable=shareable - 1 if share else 0,
            generate=score_from is None,
            score_from=score_from,
            score_until=len(prompt) if score_from else 0,
            max_new_tokens=new if score_from is None else 0,
        )
        request.sequences.append(sequence)
        self.number += 1
        self.unfinished.append(sequence)
        self.scheduler.add(sequence)
        return sequence

    def step(self) -> list[Work]:
        running = {s for s in self.scheduler.active if s.status is Status.RUNNING}
        works = self.scheduler.schedule()
        self._check(works, running)
        for sequence, error in self.scheduler.failed:
            sequence.status = Status.FINISHED
            self.unfinished.remove(sequence)
            self.failed.append((sequence, error))
        progress = bool(works or self.scheduler.failed)
        self.scheduler.failed.clear()
        assert progress or not self.unfinished
        for work in works:
            self._write(work)
        self._check_contexts(works)
        for work in works:
            self._commit(work)
        for work in works:  # only now: a slot that is released moves another one with all it holds
            self._finish(work.sequence)
        return works

    def run(self, steps: int = 20_000) -> None:
        """Until all is done."""
        for _ in range(steps):
            if not self.unfinished:
                break
            self.step()
        assert not self.unfinished and not self.scheduler.active and not self.scheduler.waiting
        assert self.slots.num_bytes == 0
        assert all(node.refs == 0 and node.complete for node in self.tree)

    def _check(self, works: list[Work], running: set[Sequence]) -> None:
        scheduler = self.scheduler
        assert sum(work.count for work in works) <= self.max_tokens
        scored = [w.count for w in works if w.sequence.score_from is not None and isinstance(w.target, Slot)]
        assert sum(scored) <= self.max_scored
        assert all(work.count >= 1 for work in works)
        assert max(Counter(id(work.target) for work in works).values(), default=0) <= 1
        assert len(scheduler.active) <= self.max_num_seqs
        assert self.budget.used == self.tree.num_bytes + self.slots.num_bytes <= self.budget.total
        ran_already = [work.sequence in running for work in works]
        assert ran_already == sorted(ran_already, reverse=True)
        still = [s for s in scheduler.active if s in running]
        if len(works) < len(still) and all(s.score_from is None for s in still):
            assert sum(work.count for work in works) == self.max_tokens  # nothing else keeps one from its token
        if scheduler.active and scheduler.waiting:  # who waits is younger than all who do not
            assert scheduler.active[-1].order < min(s.order for s in scheduler.waiting)

    def _write(self, work: Work) -> None:
        target, end = work.target, work.offset + work.count
        if isinstance(target, Node):
            assert target.keys is not None and target.computed == work.offset
            assert [*target.path()[-1].tokens] == work.sequence.tokens[target.start : target.end]
            where = target.keys[0][:, work.offset : end]
            self.shared_tokens += work.count
        else:
            assert end <= target.bucket.capacity and target.length == work.offset
            assert target is work.sequence.slot and work.start == work.sequence.num_computed
            where = target.bucket.keys[0][target.index, :, work.offset : end]
            self.private_tokens += work.count
        where.copy_(codes(work.sequence.tokens, work.start, work.start + work.count)[None, :, None])

    def _check_contexts(self, works: list[Work]) -> None:
        """Nodes above and slot together hold exactly the tokens before and in the work."""
        for work in works:
            if isinstance(work.target, Node):
                nodes, private = work.target.path()[:-1], work.target.keys
                own = private[0][0, : work.offset + work.count, 0] if private else torch.empty(0)
            else:
                assert work.sequence.node is not None
                nodes = work.sequence.node.path()
                own = work.target.bucket.keys[0][work.target.index, 0, : work.offset + work.count, 0]
            context = torch.cat([*(node.keys[0][0, :, 0] for node in nodes if node.keys is not None), own])
            assert torch.equal(context, codes(work.sequence.tokens, 0, work.start + work.count))

    def _commit(self, work: Work) -> None:
        sequence = work.sequence
        if isinstance(work.target, Node):
            work.target.computed += work.count
            return
        work.target.length += work.count
        if sequence.generate and sequence.num_computed == len(sequence.tokens):
            token = zlib.crc32(bytes(sequence.tokens[-3:])) % 3
            sequence.tokens.append(token)
            sequence.output_ids.append(token)

    def _finish(self, sequence: Sequence) -> None:
        if sequence.status is not Status.RUNNING:
            return
        if not sequence.tokens_left if sequence.generate else sequence.num_computed >= sequence.num_to_compute:
            self.scheduler.release(sequence)
            sequence.status = Status.FINISHED
            self.unfinished.remove(sequence)
            self.finished.append(sequence)


def codes(tokens: list[int], start: int, end: int) -> torch.Tensor:
    """What stands for the key of each token: a number made of it and of all before it."""
    code = zlib.crc32(bytes(tokens[:start]))
    numbers = []
    for token in tokens[start:end]:
        code = zlib.crc32(bytes([token]), code)
        numbers.append(float(code % (1 << 20)))
    return torch.tensor(numbers)


@pytest.fixture(params=list(COSTS))
def cost(request: pytest.FixtureRequest) -> CostModel | None:
    return COSTS[request.param]


# --- sharing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 64, 65, 300])
@pytest.mark.parametrize("chunk", [1, 7, 4096])
def test_identical_prompts_that_arrive_together_are_computed_once(
    cost: CostModel | None, length: int, chunk: int
) -> None:
    machine = Machine(max_tokens=chunk, cost=cost)
    for _ in range(5):
        machine.add([i % 3 for i in range(length)], new=2)
    machine.run()
    assert machine.shared_tokens == length - 1
    assert machine.private_tokens == 5 * 2  # each prompt's last token, for its logits, and one generated token


def test_every_common_part_of_a_tree_of_prompts_is_computed_once(cost: CostModel | None) -> None:
    system, documents, questions = [0] * 100, [[1] * 90, [2] * 90], [[0] * 80, [1] * 80, [2] * 80]
    prompts = [system + d + q for d in documents for q in questions]
    machine = Machine(cost=cost)
    for prompt in prompts:
        machine.add(prompt, new=1)
    machine.run()
    assert machine.shared_tokens == len({tuple(p[: i + 1]) for p in prompts for i in range(len(p) - 1)})


def test_a_prompt_finds_what_an_earlier_one_left(cost: CostModel | None) -> None:
    machine = Machine(cost=cost)
    machine.add([0] * 200)
    machine.run()
    computed = machine.shared_tokens
    machine.add([0] * 200)
    machine.run()
    assert machine.shared_tokens == computed == 199


def test_without_sharing_everything_is_private() -> None:
    machine = Machine(cost=None)
    for _ in range(3):
        machine.add([1] * 50, new=3, share=False)
    machine.run()
    assert machine.shared_tokens == 0 and machine.private_tokens == 3 * 52
    assert not list(machine.tree)


# --- order and limits ------------------------------------------------------------------------------------------


def test_running_sequences_get_their_token_before_a_long_prompt() -> None:
    machine = Machine(max_tokens=8)
    early = [machine.add([i, 0], new=30) for i in range(3)]
    while not all(s.output_ids for s in early):
        machine.step()
    machine.add([2] * 500)
    for _ in range(10):
        before = [len(s.tokens) for s in early]
        works = machine.step()
        assert [len(s.tokens) for s in early] == [n + 1 for n in before]
        assert sum(work.count for work in works) == 8  # the prompt gets the rest
    machine.run()


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_no_more_sequences_than_allowed_hold_memory(limit: int) -> None:
    machine = Machine(max_num_seqs=limit)
    sequences = [machine.add([i % 3] * (i + 1), new=3) for i in range(12)]
    while machine.unfinished:
        machine.step()
        assert sum(s.slot is not None for s in sequences) <= limit
    assert len(machine.finished) == 12


def test_equal_prompts_finish_in_order_of_arrival_though_memory_is_short() -> None:
    machine = Machine(budget_tokens=600, cost=COSTS["folds"])
    sequences = [machine.add([i, *([0] * 31)], new=150) for i in range(5)]
    machine.run()
    assert machine.finished == sequences
    assert machine.scheduler.num_preemptions > 0
    assert all(len(s.output_ids) == 150 for s in sequences)


def test_preemption_changes_no_token() -> None:
    def outputs(budget_tokens: int) -> tuple[list[list[int]], int]:
        machine = Machine(budget_tokens=budget_tokens)
        sequences = [machine.add([i % 3] * 20, new=300) for i in range(4)]
        machine.run()
        return [s.output_ids for s in sequences], machine.scheduler.num_preemptions

    (plenty, none), (tight, some) = outputs(10_000), outputs(1000)
    assert plenty == tight and none == 0 and some > 0


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_prompt_that_never_fits_fails_alone(share: bool, place: int) -> None:
    machine = Machine(budget_tokens=400)
    hopeless = None
    for i in range(4):
        if i == place:
            hopeless = machine.add([1] * 500, share=share)
        else:
            machine.add([0, i] * 10, new=8, share=share)
    machine.run()
    assert [sequence for sequence, _ in machine.failed] == [hopeless]
    assert len(machine.finished) == 3
    error = machine.failed[0][1]
    assert error.request_id == f"request-{place}" and "500 tokens" in str(error) and "memory" in str(error)


def test_a_sequence_that_outgrows_memory_fails_and_the_others_finish() -> None:
    machine = Machine(budget_tokens=300)
    machine.add([0] * 10, new=1000)
    others = [machine.add([1, i], new=5) for i in range(3)]
    machine.run()
    assert len(machine.failed) == 1 and sorted(s.order for s in machine.finished) == [s.order for s in others]


def test_rows_left_behind_by_others_do_not_keep_the_last_one_from_growing() -> None:
    machine = Machine(budget_tokens=450)
    for i in range(5):
        machine.add([i % 3, i // 3, *([0] * 30)], new=150)  # any of them alone would need 351 to move
    machine.run()
    assert not machine.failed


def test_pinned_prefixes_are_kept_and_counted() -> None:
    machine = Machine(budget_tokens=400)
    machine.tree.pin([2] * 99)
    machine.add([2] * 100, new=2)
    while machine.unfinished:
        machine.step()
    for i in range(6):
        machine.add([i % 2, *([i % 3] * 120)], new=5)
    while machine.unfinished:
        machine.step()
    assert not machine.failed and machine.tree.match([2] * 99) == 99


def test_releasing_everything_at_any_moment_leaves_nothing_behind() -> None:
    for moment in range(12):
        machine = Machine(max_tokens=16, budget_tokens=600)
        sequences = [machine.add([0] * 40 + [i % 3] * 40, new=5, share=i != 2) for i in range(5)]
        for _ in range(moment):
            if machine.unfinished:
                machine.step()
        for sequence in sequences:
            if sequence.status is not Status.FINISHED:
                machine.scheduler.release(sequence)
        assert not machine.scheduler.active and not machine.scheduler.waiting
        machine.slots.trim()
        assert machine.slots.num_bytes == 0 and all(n.refs == 0 and n.complete for n in machine.tree)


# --- anything --------------------------------------------------------------------------------------------------


@st.composite
def prompts(draw: st.DrawFn) -> list[int]:
    """Prompts of runs, so that many begin alike at several depths."""
    runs = draw(
        st.lists(st.tuples(st.integers(0, 2), st.sampled_from([1, 2, 20, 63, 64, 65, 90])), min_size=1, max_size=3)
    )
    return [token for token, length in runs for _ in range(length)]


@settings(max_examples=120, deadline=None)
@given(
    st.lists(st.tuples(prompts(), st.integers(1, 80), st.booleans(), st.booleans(), st.integers(0, 3)), max_size=10),
    st.integers(150, 1500),
    st.integers(1, 64),
    st.integers(1, 8),
    st.sampled_from(list(COSTS)),
)
def test_any_workload_ends(
    workload: list[tuple[list[int], int, bool, bool, int]],
    budget_tokens: int,
    max_tokens: int,
    max_num_seqs: int,
    cost: str,
) -> None:
    """Every step within its limits, every context exact (see :class:`Machine`); who would fit alone does not fail."""
    machine = Machine(budget_tokens, max_num_seqs, max_tokens, max_scored=7, cost=COSTS[cost])
    for prompt, new, share, score, pause in workload:
        machine.add(
            prompt, new, share=share, score_from=max(len(prompt) // 2, 1) if score and len(prompt) > 1 else None
        )
        for _ in range(pause):
            if machine.unfinished:
                machine.step()
    machine.run()
    assert len(machine.finished) + len(machine.failed) == len(workload)
    for sequence in machine.finished:
        assert len(sequence.output_ids) == sequence.max_new_tokens
    for sequence, _ in machine.failed:
        total = len(sequence.request.prompt_token_ids) + sequence.max_new_tokens
        assert total + 2 * capacity_for(total + 64) > budget_tokens  # its nodes, its slot, and one to move into
