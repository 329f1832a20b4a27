"""One replica: the engine's scheduler, step by step, with tokens that are counted instead of computed.

The rules are those of :mod:`gossamer.engine.scheduler`. A step that only decodes is followed by steps of the same
sequences until one of them ends or outgrows its slot, or a request arrives; these are planned together.
"""

from __future__ import annotations

import functools
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from gossamer.distributed.simulate.speeds import Speeds, StepCounts
from gossamer.distributed.simulate.texts import Text
from gossamer.distributed.simulate.tree_model import Budget, Node, Slot, Slots, Tree, capacity_for

PRIVATE_TAIL = 64  # as in gossamer.engine.scheduler
SLOT_RESERVE = 64
MAX_FOLDED = 128  # as in gossamer.engine.cost
T = TypeVar("T")


class Sequence:
    """A request at a replica.

    Attributes:
        number: order of arrival at the replica.
        length: tokens of the prompt and those generated so far.
        shareable: leading tokens that may stand in the tree.
        node, slot, filled, private_start: the deepest node it uses; its slot and the tokens in it, the first of which
            stands at ``private_start``.
        cached: tokens of the prompt that others had computed.
        computed: tokens fed for it, over again after a preemption.
        failed: it does not fit into the memory, even alone.
    """

    __slots__ = (
        "cached",
        "computed",
        "counted",
        "failed",
        "filled",
        "first_token",
        "length",
        "node",
        "number",
        "output_tokens",
        "private_start",
        "prompt_tokens",
        "request",
        "running",
        "shareable",
        "slot",
        "text",
    )

    def __init__(self, number: int, request: object, text: Text, prompt_tokens: int, output_tokens: int) -> None:
        self.number, self.request, self.text = number, request, text
        self.prompt_tokens, self.output_tokens = prompt_tokens, output_tokens
        self.length = prompt_tokens
        self.shareable = prompt_tokens - 1
        self.node: Node | None = None
        self.slot: Slot | None = None
        self.filled = self.private_start = self.cached = self.computed = 0
        self.running = self.counted = self.first_token = self.failed = False

    @property
    def tokens_left(self) -> int:
        return self.output_tokens - (self.length - self.prompt_tokens)


@dataclass(slots=True)
class Work:
    """``count`` tokens of a sequence, into a node of the tree or, for ``None``, its slot."""

    sequence: Sequence
    count: int
    node: Node | None


class EngineModel:
    """A replica.

    Args:
        speeds: how long steps take, and when nodes become segments.
        memory_tokens: whose keys and values it holds at most.
        max_num_seqs, max_num_batched_tokens: as the engine's options.
    """

    def __init__(self, speeds: Speeds, *, memory_tokens: int, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.speeds = speeds
        self.max_num_seqs, self.max_num_batched_tokens = max_num_seqs, max_num_batched_tokens
        self.budget = Budget(memory_tokens)
        self.tree = Tree(self.budget)
        self.slots = Slots(self.tree)
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self.failed: list[Sequence] = []
        self.preemptions = 0
        self.steps = 0
        self.computed_tokens = 0
        self._number = 0
        self._tokens_left = 0
        self._refused_at = (0, 0)

    def add(self, request: object, text: Text, prompt_tokens: int, output_tokens: int) -> Sequence:
        sequence = Sequence(self._number, request, text, prompt_tokens, output_tokens)
        self._number += 1
        self.waiting.append(sequence)
        return sequence

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.active)

    def load(self) -> tuple[int, int]:
        """What a replica reports: requests in flight, and tokens of their prompts that are not computed yet."""
        queued = sum(each.length for each in self.waiting)
        seen: set[Node] = set()
        for each in self.active:
            if not each.running and each.node is not None:
                nodes = [node for node in each.node.path() if node not in seen]
                seen.update(nodes)
                queued += each.length - each.node.end + sum(len(node) - node.computed for node in nodes)
        return len(self.waiting) + len(self.active), queued

    # --- a step ------------------------------------------------------------------------------------------------

    def plan(self) -> tuple[list[Work], int]:
        """What the next step computes, and how many steps in a row do the same, each a token further.

        Nothing to do is ``([], 0)``; sequences that can never fit are in ``failed`` then.
        """
        for _ in range(1 + len(self.waiting) + len(self.active)):
            works = self._schedule()
            if works or self.failed:
                return works, self._repeats(works) if works else 0
            if self.active and self.waiting:
                self._preempt(self.active[-1], behind=True)
        return [], 0

    def _repeats(self, works: list[Work]) -> int:
        if len(works) < len(self.active):
            return 1
        most = 1 << 30
        for work in works:
            sequence = work.sequence
            if work.node is not None or work.count > 1 or sequence.slot is None or not sequence.first_token:
                return 1
            most = min(most, sequence.tokens_left, sequence.slot.capacity - sequence.filled)
        return most

    def counts(self, works: list[Work]) -> StepCounts:
        """What the first of these steps reads; ``private_pairs`` grows by a pair per sequence from step to step."""
        rows, chunk, private_pairs = 0, 0, 0
        readers: Counter[Node] = Counter()
        for work in works:
            sequence, node = work.sequence, work.node
            if node is None:
                above, offset = sequence.node, sequence.filled
            else:
                above, offset = node.parent, node.computed
            private_pairs += work.count * offset + work.count * (work.count + 1) // 2
            if node is None and work.count == 1:
                rows += 1
            else:
                chunk += work.count
            while above is not None and above.parent is not None:
                readers[above] += work.count
                above = above.parent
        keys = sum([node.end - node.start for node in readers])
        pairs = sum([count * (node.end - node.start) for node, count in readers.items()])
        return StepCounts(chunk, rows, private_pairs, keys, pairs)

    def commit(self, works: list[Work], repeats: int) -> tuple[list[Sequence], list[Sequence]]:
        """The steps are done. Returns the sequences that had their first token, and those that ended."""
        self.steps += repeats
        first, ended = [], []
        for work in works:
            sequence, count = work.sequence, work.count * repeats
            sequence.computed += count
            self.computed_tokens += count
            if work.node is not None:
                work.node.computed = max(work.node.computed, min(work.node.computed + work.count, len(work.node)))
                continue
            sequence.filled += count
            if sequence.private_start + sequence.filled - (repeats - 1) == sequence.length:
                sequence.length += repeats
                if not sequence.first_token:
                    sequence.first_token = True
                    first.append(sequence)
                if sequence.tokens_left <= 0:
                    ended.append(sequence)
        # from the last slot to the first, as the engine does
        for sequence in sorted(ended, key=lambda each: -each.slot.index if each.slot else 0):
            self.tree.keep_output(
                sequence.text, sequence.private_start + sequence.filled, sequence.private_start, sequence.number
            )
            self._release(sequence)
        return first, ended

    # --- the scheduler -----------------------------------------------------------------------------------------

    def _schedule(self) -> list[Work]:
        self._admit()
        self._tokens_left = self.max_num_batched_tokens
        works: list[Work] = []
        for sequence in [each for each in self.active if each.running]:
            if sequence.running:
                self._continue(sequence, works, may_preempt=True)
        prefilling = [each for each in self.active if not each.running and each.node is not None]
        if prefilling:
            self._reserve_slots([each for each in prefilling if self._path_complete(each)])
        in_step: dict[Node, int] = {}
        for sequence in prefilling:
            if sequence.running or sequence.node is None or self._tokens_left == 0:
                continue
            if self._path_complete(sequence):
                if self._start(sequence, may_preempt=not works):
                    self._continue(sequence, works, may_preempt=not works)
            else:
                self._prefill(sequence, works, in_step)
        return works

    def _admit(self) -> None:
        refused = bool(self.active) and self._refused_at == (len(self.active), self.budget.used)
        if not self.waiting or refused:
            return
        promised: dict[Node, None] = {}
        size = 0
        for sequence in self.active:
            if not sequence.running:
                size += self._promise(sequence, promised)
        admitted: list[Sequence] = []
        while self.waiting and len(self.active) + len(admitted) < self.max_num_seqs:
            sequence = self.waiting[0]
            sequence.node = self.tree.insert(sequence.text, sequence.shareable)
            self.tree.lock(sequence.node)
            size += self._promise(sequence, promised)
            missing = size + sum(map(len, promised)) - self.budget.free
            if (self.active or admitted) and missing > 0 and missing > self.tree.idle:
                self.tree.unlock(sequence.node)
                sequence.node = None
                self._refused_at = (len(self.active) + len(admitted), self.budget.used)
                break
            self.waiting.popleft()
            admitted.append(sequence)
        if admitted:
            self.active = sorted(self.active + admitted, key=lambda each: each.number)
        for sequence in admitted:
            self._cut_private_tail(sequence)

    def _promise(self, sequence: Sequence, promised: dict[Node, None]) -> int:
        assert sequence.node is not None
        for node in sequence.node.path():
            if not node.stored:
                promised[node] = None
        return capacity_for(self._slot_length(sequence, sequence.node.end))

    def _cut_private_tail(self, sequence: Sequence) -> None:
        keep = sequence.node
        assert keep is not None
        while keep.parent is not None and keep.refs == 1 and keep.computed == 0 and not keep.children:
            if sequence.shareable - keep.start > PRIVATE_TAIL:
                break
            keep = keep.parent
        if sequence.node is not None and keep is not sequence.node:
            self.tree.unlock(sequence.node, until=keep)
            sequence.node = keep

    @staticmethod
    def _path_complete(sequence: Sequence) -> bool:
        node = sequence.node
        while node is not None and node.parent is not None:
            if not node.complete:
                return False
            node = node.parent
        return True

    def _prefill(self, sequence: Sequence, works: list[Work], in_step: dict[Node, int]) -> None:
        assert sequence.node is not None
        for node in sequence.node.path():
            if node.complete:
                continue
            if node in in_step:
                if in_step[node] < len(node):
                    return
                continue
            if self._tokens_left == 0:
                return
            allocate = functools.partial(self.tree.allocate, node)
            if not self._make_room(sequence, allocate, may_preempt=not works):
                return
            count = min(len(node) - node.computed, self._tokens_left)
            works.append(Work(sequence, count, node))
            node.owner = sequence.number
            in_step[node] = node.computed + count
            self._tokens_left -= count
            if in_step[node] < len(node):
                return

    def _start(self, sequence: Sequence, *, may_preempt: bool) -> bool:
        node = sequence.node
        assert node is not None
        path, keep = node.path(), self._last_segment(sequence)
        slot = self.slots.take(self._slot_length(sequence, keep.end))
        if slot is None:
            keep = node
            length = self._slot_length(sequence, keep.end)
            slot = self._make_room(sequence, lambda: self.slots.take(length), may_preempt=may_preempt)
        if slot is None:
            return False
        if not sequence.counted:
            sequence.counted = True
            sequence.cached = sum(len(each) for each in path if each.owner != sequence.number)
        sequence.filled = node.end - keep.end
        self.tree.unlock(node, until=keep)
        sequence.node, sequence.slot, sequence.private_start, sequence.running = keep, slot, keep.end, True
        return True

    def _last_segment(self, sequence: Sequence) -> Node:
        node = sequence.node
        assert node is not None
        end = node.end
        while node.parent is not None:
            if end - node.start > MAX_FOLDED or self.speeds.worth_segment(node.refs, len(node)):
                break
            node = node.parent
        return node

    @staticmethod
    def _slot_length(sequence: Sequence, private_start: int) -> int:
        return sequence.length - private_start + min(sequence.tokens_left - 1, SLOT_RESERVE)

    def _reserve_slots(self, sequences: list[Sequence]) -> None:
        lengths: Counter[int] = Counter()
        for sequence in sequences:
            lengths[capacity_for(self._slot_length(sequence, self._last_segment(sequence).end))] += 1
        for capacity, count in lengths.items():
            self.slots.reserve(capacity, count)

    def _continue(self, sequence: Sequence, works: list[Work], *, may_preempt: bool) -> None:
        assert sequence.slot is not None
        count = min(sequence.length - sequence.private_start - sequence.filled, self._tokens_left)
        if count <= 0:
            return
        needed = sequence.filled + count
        if needed > sequence.slot.capacity:
            wanted = needed + max(min(sequence.tokens_left - 1, SLOT_RESERVE), 0)
            larger = self._make_room(sequence, lambda: self.slots.take(wanted), may_preempt=may_preempt)
            if larger is None:
                return
            self.slots.release(sequence.slot)
            sequence.slot = larger
        works.append(Work(sequence, count, None))
        self._tokens_left -= count

    def _make_room(self, sequence: Sequence, attempt: Callable[[], T], *, may_preempt: bool) -> T | None:
        while not (result := attempt()):
            if self.slots.trim():
                continue
            if not may_preempt:
                return None
            youngest = self.active[-1]
            if youngest is not sequence:
                self._preempt(youngest)
            elif len(self.active) > 1 or sequence.slot is not None:
                self._preempt(sequence)
                return None
            else:
                self._release(sequence)
                sequence.failed = True
                self.failed.append(sequence)
                return None
        return result

    def _preempt(self, sequence: Sequence, *, behind: bool = False) -> None:
        self._release(sequence)
        sequence.shareable = sequence.length - 1
        if behind:
            self.waiting.append(sequence)
        else:
            self.waiting.appendleft(sequence)
        self.preemptions += 1

    def _release(self, sequence: Sequence) -> None:
        if sequence.slot is not None:
            self.slots.release(sequence.slot)
            sequence.slot = None
        if sequence.node is not None:
            self.tree.unlock(sequence.node)
            sequence.node = None
        sequence.private_start = sequence.filled = 0
        sequence.running = False
        if sequence in self.active:
            self.active.remove(sequence)
