"""Decides what each step computes: continuous batching, chunked prefill, admission and preemption under one budget.

Order within a step: sequences that run already (so that nobody's next token waits for somebody's prompt), then prompts,
oldest first, until the token budget is used. New sequences enter the prefix tree when they are admitted, before
anything of them is computed: that is how prompts that arrive together share all their common parts.
"""

from __future__ import annotations

import functools
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from gossamer.engine.cost import MAX_FOLDED, CostModel
from gossamer.engine.sequence import Sequence, Status
from gossamer.engine.slots import Slot, SlotPool, capacity_for
from gossamer.engine.speculation.survival import Source
from gossamer.engine.states import State
from gossamer.engine.tree import Node, PrefixTree, TreeSalt
from gossamer.errors import MemoryBudgetError

# A prompt's last tokens that nobody else has at admission go straight into the slot when they are this few: a node of
# their own would only be copied there. The price: a twin that arrives while they are in flight computes them again.
PRIVATE_TAIL = 64
T = TypeVar("T")
SLOT_RESERVE = 64  # room for tokens to be generated that a new slot has, so that it is not outgrown at once


@dataclass(slots=True)
class Work:
    """``count`` tokens of ``sequence`` from position ``start``; their keys go to ``target`` from ``offset`` on.

    Behind them, ``draft`` holds tokens that may come next, of a ``source``: they are computed as if they had come.
    ``state`` is what recurrent layers keep of the text behind these, once they are computed.
    """

    sequence: Sequence
    start: int
    count: int
    target: Node | Slot
    offset: int
    draft: list[int] = field(default_factory=list)
    source: Source = Source.OWN
    state: State | None = None

    @property
    def end(self) -> int:
        """Behind the last of the tokens that have come."""
        return self.start + self.count

    @property
    def rows(self) -> int:
        """Of the step."""
        return self.count + len(self.draft)


class Scheduler:
    """See the module's documentation.

    Args:
        max_num_seqs: sequences that hold memory at the same time.
        max_num_batched_tokens: tokens per step.
        max_scored_tokens: tokens per step whose logits are all wanted (they cost memory by the vocabulary).
        state_interval: tokens after which a state is kept on the way through a long prefix; by default as the layout
            says.
    """

    def __init__(
        self,
        tree: PrefixTree,
        slots: SlotPool,
        cost: CostModel | None,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_scored_tokens: int,
        state_interval: int | None = None,
    ) -> None:
        self.tree = tree
        self.slots = slots
        self.cost = cost
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_scored_tokens = max_scored_tokens
        self.state_interval = state_interval or tree.layout.state_interval
        self.waiting: deque[Sequence] = deque()
        self.active: list[Sequence] = []
        self.failed: list[tuple[Sequence, MemoryBudgetError]] = []
        self.num_preemptions = 0
        self.held = False  # some wait for a mask, which is nobody's fault
        self.apart = False  # others hold memory that are not among the active now
        self._refused_at = (0, 0)
        self.restore: Callable[[list[int], TreeSalt], None] = lambda tokens, salt: None  # from disk into the tree
        self.on_start: Callable[[Sequence, list[Node]], None] = lambda sequence, path: None

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def schedule(self) -> list[Work]:
        """The next step's work; sequences that can never fit are moved to ``failed``.

        Empty only if nothing is left to do, something failed, or all wait for the masks of their grammars.
        """
        # Sequences that came into each other's way give up their memory, youngest first, and leave no work behind. The
        # oldest gets it in one of the next rounds, of which there are at most as many as there are sequences.
        for _ in range(1 + len(self.waiting) + len(self.active)):
            works = self._schedule()
            if works or self.failed or self.held:
                return works
            if self.active and self.waiting:
                # Active sequences wait for waiting ones: hypotheses of a beam search, for one that has no memory.
                self.preempt(self.active[-1], behind=True)
        return []

    def _schedule(self) -> list[Work]:
        self._admit()
        self._tokens_left, self._scored_left = self.max_num_batched_tokens, self.max_scored_tokens
        works: list[Work] = []
        self.held = False
        for sequence in [s for s in self.active if s.status is Status.RUNNING]:
            # An older one may have preempted it meanwhile.
            if sequence.status is Status.RUNNING and self._may_draw(sequence):
                self._continue(sequence, works, may_preempt=True)
        prefilling = [s for s in self.active if s.status is Status.PREFILL]
        self._reserve_slots([s for s in prefilling if self._path_complete(s)])
        in_step: dict[Node, int] = {}
        for sequence in prefilling:
            if sequence.status is not Status.PREFILL or self._tokens_left == 0:
                continue
            if self._path_complete(sequence):
                if self._may_draw(sequence) and self._start(sequence, may_preempt=not works):
                    self._continue(sequence, works, may_preempt=not works)
            else:
                self._prefill(sequence, works, in_step)
        return works

    def _may_draw(self, sequence: Sequence) -> bool:
        """Whether its next token can be chosen once it is computed; otherwise it sits this step out."""
        may = sequence.has_mask()
        self.held |= not may
        return may

    # --- admission ---------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Let waiting sequences in, while there is memory for their prompts beside what the others will still need."""
        refused = bool(self.active) and self._refused_at == (len(self.active), self.tree.budget.used)
        if not self.waiting or refused:
            return  # there is nobody, or nothing has changed since the head of the queue did not fit
        promised: set[Node] = set()  # nodes that admitted sequences will allocate
        size = 0  # and the bytes of their slots
        for sequence in self.active:
            if sequence.status is Status.PREFILL:
                size += self._promise(sequence, promised)
        admitted: list[Sequence] = []
        while self.waiting and len(self.active) + len(admitted) < self.max_num_seqs:
            sequence = self.waiting[0]
            shared, salt = sequence.tokens[: sequence.shareable], sequence.request.tree_salt
            if not sequence.sought:  # once: it may have to wait, and what was read for it may have to go meanwhile
                self.restore(shared, salt)
                sequence.sought = True
            sequence.node = self.tree.insert(shared, salt)
            self.tree.lock(sequence.node)
            size += self._promise(sequence, promised)
            nodes = sum(self.tree.layout.size(len(node)) for node in promised)
            if (self.active or admitted) and not self._fits(size + nodes):
                self.tree.unlock(sequence.node)
                sequence.node = None
                self._refused_at = (len(self.active) + len(admitted), self.tree.budget.used)
                break
            self.waiting.popleft()
            sequence.status = Status.PREFILL
            sequence.request.admitted = sequence.request.admitted or time.perf_counter()
            admitted.append(sequence)
        self.active = sorted(self.active + admitted, key=lambda s: s.order)
        for sequence in admitted:
            self._cut_private_tail(sequence)

    def _promise(self, sequence: Sequence, promised: set[Node]) -> int:
        """Adds the nodes that the sequence needs and that have no memory yet; returns the bytes of its slot."""
        assert sequence.node is not None
        promised.update(node for node in sequence.node.path() if node.keys is None)
        return self.tree.layout.size(capacity_for(self._slot_length(sequence, sequence.node.end)))

    def _fits(self, size: int) -> bool:
        missing = size - self.tree.budget.free
        return missing <= 0 or missing <= self.tree.evictable_bytes

    def _cut_private_tail(self, sequence: Sequence) -> None:
        """Leave out of the tree what nobody else wants and nobody has computed, if it is short."""
        keep = sequence.node
        assert keep is not None
        while (
            keep.parent is not None and keep.refs == 1 and keep.computed == 0 and keep.pins == 0 and not keep.children
        ):
            if sequence.shareable - keep.start > PRIVATE_TAIL:
                break
            keep = keep.parent
        if sequence.node is not None and keep is not sequence.node:
            self.tree.unlock(sequence.node, until=keep)
            sequence.node = keep

    # --- prompts -----------------------------------------------------------------------------------------------

    def _path_complete(self, sequence: Sequence) -> bool:
        assert sequence.node is not None
        return not self._missing(sequence.node.path())

    def _missing(self, path: list[Node]) -> list[tuple[Node, int]]:
        """The nodes of a path that have to be computed, from the root down, and from which of their tokens on.

        With recurrent layers, computing goes on from a state. Where a node was cut there may be none: then what is
        computed already is gone through again, from the last state before.
        """
        first = next((index for index, node in enumerate(path) if not node.complete), len(path))
        missing = [(node, node.computed) for node in path[first:]]
        if not self._with_states or (missing and missing[0][1] in missing[0][0].states):
            return missing
        if missing and missing[0][1]:
            missing[0] = path[first], path[first].last_state
        if not missing or not missing[0][1]:
            for node in reversed(path[:first]):
                if len(node) in node.states:
                    break
                missing.insert(0, (node, node.last_state))
                if node.last_state:
                    break
        return missing

    def _prefill(self, sequence: Sequence, works: list[Work], in_step: dict[Node, int]) -> None:
        """Schedule the nodes of its path that nobody computes yet, from the root down."""
        assert sequence.node is not None
        for node, first in self._missing(sequence.node.path()):
            if node in in_step:
                if in_step[node] < len(node) or self._with_states:
                    return  # somebody computes it; below it nothing can start
                continue
            if self._tokens_left == 0:
                return
            allocate = functools.partial(self.tree.allocate, node)
            if not self._make_room(sequence, allocate, may_preempt=not works):
                return
            count = min(len(node) - first, self._tokens_left)
            if self._with_states:  # steps end where a state may be kept
                count = min(count, self.state_interval - (node.start + first) % self.state_interval)
            works.append(Work(sequence, node.start + first, count, node, first))
            node.owner = sequence.order if first == node.computed else node.owner
            in_step[node] = first + count
            self._tokens_left -= count
            if in_step[node] < len(node) or self._with_states:
                return

    @property
    def _with_states(self) -> bool:
        return self.tree.layout.state_bytes > 0

    def _start(self, sequence: Sequence, *, may_preempt: bool) -> bool:
        """Its path is computed: give it a slot, and copy the nodes into it that are not worth a segment."""
        assert sequence.node is not None
        path = sequence.node.path()
        keep = self._last_segment(sequence)
        slot = self.slots.take(self._slot_length(sequence, keep.end))
        if slot is None:  # copies of nodes are the first thing to do without
            keep = sequence.node
            length = self._slot_length(sequence, keep.end)
            slot = self._make_room(sequence, lambda: self.slots.take(length), may_preempt=may_preempt)
        if slot is None:
            return False
        self.on_start(sequence, path)
        for node in path:
            if node.start >= keep.end:
                _copy_node(node, slot)
        slot.state = path[-1].states[len(path[-1])] if path and self._with_states else None
        self.tree.unlock(sequence.node, until=keep)
        sequence.node, sequence.slot, sequence.private_start = keep, slot, keep.end
        sequence.status = Status.RUNNING
        return True

    def _last_segment(self, sequence: Sequence) -> Node:
        """The deepest node of the path that stays a segment; shorter ones below it are folded into the slot."""
        node = sequence.node
        assert node is not None
        end = node.end
        while node.parent is not None and self.cost is not None:
            too_long = end - node.start > MAX_FOLDED
            if too_long or self.cost.worth_segment(node.refs, len(node)):
                break
            node = node.parent
        return node

    def _slot_length(self, sequence: Sequence, private_start: int) -> int:
        """Tokens a new slot should hold: what is there to compute, and some of what will be generated."""
        remaining = len(sequence.tokens) - private_start
        if not sequence.generate:
            return remaining
        # the last token that is generated is never fed
        return remaining + min(sequence.tokens_left - 1, SLOT_RESERVE)

    def _reserve_slots(self, sequences: list[Sequence]) -> None:
        """Let buckets grow once for all sequences that start now."""
        lengths: Counter[int] = Counter()
        for sequence in sequences:
            lengths[capacity_for(self._slot_length(sequence, self._last_segment(sequence).end))] += 1
        for capacity, count in lengths.items():
            self.slots.reserve(capacity, count)

    # --- running -----------------------------------------------------------------------------------------------

    def _continue(self, sequence: Sequence, works: list[Work], *, may_preempt: bool) -> None:
        """Schedule what is left of the sequence's own tokens: one when it decodes, more in a private prompt."""
        slot = sequence.slot
        assert slot is not None
        start = sequence.private_start + slot.length
        count = sequence.num_to_compute - start
        if count > self._tokens_left:
            count = self._tokens_left
        if sequence.score_from is not None:
            count = min(count, self._scored_left)
        if count <= 0:
            return
        needed = slot.length + count
        if needed > slot.bucket.capacity:
            wanted = needed + max(min(sequence.tokens_left - 1, SLOT_RESERVE), 0)
            grow = functools.partial(self.slots.ensure, slot, wanted)
            larger = self._make_room(sequence, grow, may_preempt=may_preempt)
            if larger is None:
                return
            sequence.slot = slot = larger
        works.append(Work(sequence, start, count, slot, slot.length))
        self._tokens_left -= count
        if sequence.score_from is not None:
            self._scored_left -= count

    # --- memory ------------------------------------------------------------------------------------------------

    def _make_room(self, sequence: Sequence, attempt: Callable[[], T], *, may_preempt: bool) -> T | None:
        """``attempt`` until it succeeds, preempting younger sequences; the youngest gives way itself."""
        while not (result := attempt()):
            if self.slots.trim():
                continue
            if not may_preempt:
                return None  # others run; wait until they are done
            youngest = self.active[-1]
            if youngest is not sequence:
                self.preempt(youngest)
            elif len(self.active) > 1 or sequence.slot is not None or self.apart:
                # Alone and with a slot that does not fit beside a larger one, it fits once it starts again.
                self.preempt(sequence)
                return None
            else:
                self._fail(sequence)
                return None
        return result

    def preempt(self, sequence: Sequence, *, behind: bool = False) -> None:
        """Take a sequence's memory away; it will be computed again, before those that wait or ``behind`` them.

        What it shared stays in the tree while memory allows.
        """
        self.release(sequence)
        sequence.status = Status.WAITING
        if sequence.generate and sequence.shareable:
            sequence.shareable = len(sequence.tokens) - 1
        if behind:
            self.waiting.append(sequence)
        else:
            self.waiting.appendleft(sequence)
        self.num_preemptions += 1

    def fork(self, parent: Sequence) -> Sequence:
        """A second sequence with the same tokens: it shares the parent's nodes and copies its slot, if it can."""
        tokens = list(parent.tokens)
        child = Sequence(
            parent.request,
            parent.index,
            tokens,
            shareable=len(tokens) if parent.shareable else 0,
            generate=True,
            max_new_tokens=parent.max_new_tokens,
            private_start=parent.private_start,
            output_ids=list(parent.output_ids),
            counted=True,
        )
        slot = self.slots.fork(parent.slot) if parent.slot is not None else None
        if slot is None:  # it will be computed from its tokens
            child.private_start = 0
            self.waiting.appendleft(child)
            return child
        assert parent.node is not None
        self.tree.lock(parent.node)
        child.node, child.slot, child.status = parent.node, slot, Status.RUNNING
        self.active.append(child)
        self.active.sort(key=lambda s: s.order)
        return child

    def release(self, sequence: Sequence) -> None:
        """Give back whatever the sequence holds."""
        if sequence.slot is not None:
            self.slots.release(sequence.slot)
            sequence.slot = None
        if sequence.node is not None:
            self.tree.unlock(sequence.node)
            sequence.node = None
        sequence.private_start = 0
        if sequence in self.active:
            self.active.remove(sequence)
        elif sequence.status is Status.WAITING and sequence in self.waiting:
            self.waiting.remove(sequence)

    def _fail(self, sequence: Sequence) -> None:
        layout, total = self.tree.layout, self.tree.budget.total
        states = f", and {layout.state_bytes} bytes for each state" if self._with_states else ""
        error = MemoryBudgetError(
            f"its {len(sequence.tokens)} tokens, and room for the next, need more keys and values than the memory "
            f"budget has left: {total / 1e6:,.3g} MB are {layout.tokens_in(total)} tokens at {layout.bytes_per_token} "
            f"bytes{states}, pinned prefixes included; raise `memory` or shorten the prompt",
            request_id=sequence.request.request_id,
        )
        self.release(sequence)
        self.failed.append((sequence, error))


def _copy_node(node: Node, slot: Slot) -> None:
    """Append a node's keys and values to a slot."""
    assert node.keys is not None and node.values is not None
    end = slot.length + len(node)
    for stored, own in ((slot.bucket.keys, node.keys), (slot.bucket.values, node.values)):
        for target, source in zip(stored, own, strict=True):
            target[slot.index, :, slot.length : end].copy_(source)
    slot.length = end
