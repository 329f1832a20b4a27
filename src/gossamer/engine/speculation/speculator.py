"""Drafts: tokens that are likely to come next, since what came last stood before them already, somewhere.

    propose: before a step, which tokens to verify behind the next one of each sequence
    advance: after it, what came; learns from it, and looks up what may come next

A step computes a sequence's next token and those of its draft as consecutive rows; the sampler chooses a token in each,
and as long as it chooses the drafted one, the row behind it is right too. So what comes is what would have come, only
sooner: a wrong draft costs the time of its rows and nothing else.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Many
from typing import Any

from gossamer.engine.grammar.program import MOST_DRAFTED
from gossamer.engine.scheduler import Work
from gossamer.engine.sequence import Sequence
from gossamer.engine.slots import Slot
from gossamer.engine.speculation.choice import Candidate, choose, least_chance
from gossamer.engine.speculation.config import SpeculativeConfig
from gossamer.engine.speculation.matches import LEAST, LONGEST, Chains
from gossamer.engine.speculation.rewrites import Rewrites, Words
from gossamer.engine.speculation.stats import SpeculationStats
from gossamer.engine.speculation.step_time import StepTime
from gossamer.engine.speculation.survival import Source
from gossamer.engine.speculation.texts import Continuation, Position, Tenants, Text
from gossamer.engine.tree import Node, PrefixTree, TreeSalt

_NODES = 8  # of a path that are looked up in, from the deepest up
_SIBLINGS = 4  # that are looked up in
_LOOKED_AT = 16  # sequences that may be siblings
_SURE = 32  # tokens of a match that ends the search for others
_COUNTED = 256  # steps after which the bytes of the indices are counted again
_SHARE = 0.005  # of the time, that is spent on looking up
_SHARE_MEMORY = 0.05
_TILE = 16  # rows, after which a step may take longer at once
_WORTH = 0.12  # the chance of a guess from a single token, below which none is made
_TRIED = 16  # steps after which one is made nevertheless
_RECENT = 256  # tokens of an answer that are searched for a single one
_SUBSTITUTED = 8  # tokens of a match behind which one token may have been replaced


class Speculator:
    """Finds drafts for the sequences of an engine.

    Args:
        config: what may be drafted.
        measure: what rows cost; called by :meth:`prepare`, or when there is a draft for the first time.
        vocab_size: of the model; a tokenizer may have more tokens.
        row_seconds_per_key: what attention to one key costs a row, over all layers.
        tree: whose nodes are indexed, once for all their readers.
        words: what tokens are, for :mod:`~gossamer.engine.speculation.rewrites`.
        most_rows: of a step.
        most_chosen: rows of a step whose logits are wanted.

    Attributes:
        enabled: whether there are drafts; changed while no request runs, to compare.
        time: what rows cost, once it is measured.
    """

    def __init__(
        self,
        config: SpeculativeConfig,
        measure: Callable[[], StepTime],
        tree: PrefixTree,
        *,
        words: Words,
        vocab_size: int,
        row_seconds_per_key: float,
        most_rows: int,
        most_chosen: int,
    ) -> None:
        self.config = config
        self.time: StepTime | None = None
        self._measure, self._words, self._vocab_size = measure, words, vocab_size
        self.stats = SpeculationStats()
        self.enabled = True
        self._tree = tree
        self._per_key = row_seconds_per_key
        self._most_rows, self._most_chosen = most_rows, most_chosen
        self._tenants = Tenants()
        self._live: dict[TreeSalt, list[Sequence]] = {}
        self._steps = self._begun = 0
        self._period = 1  # every so many steps, a sequence without a draft is looked up for
        self._look_up_seconds = 0.0  # that it takes
        self._least = 0.0  # chance of a token that was considered in the last step

    def prepare(self, rows: int) -> None:
        """Time steps now, of up to ``rows`` without drafts, so that no request waits for it."""
        if self.time is None:
            self.time = self._measure()
        self.time.reach(rows + _TILE)

    # --- before a step -----------------------------------------------------------------------------------------

    def propose(self, works: Many[Work]) -> None:
        """Give works drafts, of as many tokens as pay."""
        if not self.enabled:
            return
        start = time.perf_counter()
        if self._steps % _COUNTED == 0:
            self.stats.index_bytes = self.count_bytes()
        self._steps += 1
        if self.time is not None and self.time.whole:
            seconds = self._look_up_seconds * sum(work.sequence.generate for work in works)
            self._period = max(math.ceil(seconds / (_SHARE * self.time.whole)), 1)
        drafts: list[tuple[Work, Source, list[int]]] = []
        candidates: list[Candidate] = []
        rows = sum(work.count for work in works)
        ready = [work for work in works if work.sequence.generate and work.end == len(work.sequence.tokens)]
        sampled = len(ready)
        if self.time is None and not any(room(work) > 0 and self._may_draft(work.sequence) for work in ready):
            return
        before = time.perf_counter()
        self.prepare(rows)
        start += time.perf_counter() - before  # which is no looking up
        assert self.time is not None
        self._least = max(self.config.suffix_decoding_min_token_prob, least_chance(self.time, rows, sampled))
        for work in ready:
            if (left := room(work)) > 0 and (found := self._draft(work.sequence, left, self._least)) is not None:
                source, tokens, chances = found
                drafts.append((work, source, tokens))
                candidates.append(Candidate(chances, self._per_key * len(work.sequence.tokens)))
        if candidates:
            most = max(min(self._most_rows - rows, self._most_chosen - sampled), 0)
            counts = choose(candidates, self.time, rows=rows, sampled=sampled, most=most)
            for (work, source, tokens), count in zip(drafts, counts, strict=True):
                work.draft, work.source = tokens[:count], source
        self.stats.lookup_seconds += time.perf_counter() - start

    def _may_draft(self, sequence: Sequence) -> bool:
        position, constraint = sequence.position or self._begin(sequence), sequence.constraint
        return position.next is not None or (constraint is not None and bool(constraint.drafted))

    def _draft(self, sequence: Sequence, most: int, least: float) -> tuple[Source, list[int], list[float]] | None:
        """Tokens that may come next, and the chances that all up to each of them do: at ``least`` so large."""
        state = sequence.sampling
        assert state is not None
        position = sequence.position or self._begin(sequence)
        found, constraint = position.next, state.constraint
        if found is None and constraint is None:
            return None
        forced = constraint is not None and constraint.forced
        if forced or found is None:
            source, length = Source.GRAMMAR, 0
        else:
            source, length = found.source, found.length
        most = min(most, self.config.num_speculative_tokens if forced else self.config.most(length))
        if constraint is not None:
            tokens = constraint.drafted[: max(most, 0)]
        elif found is not None:
            tokens = found.take(most)
        else:
            tokens = []
        survival, deviation = position.tenant.survival, position.deviation
        chances: list[float] = []
        chance = 1.0
        for ahead, token in enumerate(tokens):
            share = survival.chance(source, length + ahead)
            chance *= share if forced else deviation.apply(share)
            if (
                chance < least or token >= self._vocab_size or token in state.stop_token_ids
            ):  # nothing comes behind these
                break
            chances.append(chance)
        return (source, tokens, chances) if chances else None

    def _begin(self, sequence: Sequence) -> Position:
        """A sequence is about to get its first token, or its first since it may be drafted for."""
        request = sequence.request
        tenant = self._tenants.of(request.tree_salt)
        answer = len(sequence.tokens) - len(sequence.output_ids)
        rewrites = Rewrites(self._words, tenant.rewrites)
        position = sequence.position = Position(Chains(sequence.private_start), tenant, self._begun, answer, rewrites)
        self._begun += 1
        if request.prediction:
            position.prediction = Text(request.prediction)
            position.next = position.continuation(Source.PREDICTION, position.prediction.tokens, 0, 0)
        self._live.setdefault(request.tree_salt, []).append(sequence)
        if position.next is None:
            position.next = self._look_up(sequence, position, sequence.tokens[-LONGEST:])
        return position

    # --- after a step ------------------------------------------------------------------------------------------

    def advance(self, sequence: Sequence, emitted: Many[int]) -> list[int]:
        """The sequence goes on with ``emitted``, which are not among its tokens yet.

        Returns:
            What may come behind them, for the grammar that it follows.
        """
        position = sequence.position
        if position is None or not self.enabled:
            return []
        start = time.perf_counter()
        missed = self._follow(sequence, position, emitted)
        if position.next is not None and position.next.source is Source.PREDICTION:
            position.expected = position.next.place
        else:
            position.expected += len(emitted)
        if position.next is None:
            if (self._steps + position.number) % self._period == 0:
                tail = [*sequence.tokens[-LONGEST:], *emitted]
                before = time.perf_counter()
                position.next = self._look_up(sequence, position, tail)
                self._look_up_seconds += _SHARE_MEMORY * (time.perf_counter() - before - self._look_up_seconds)
            position.next = position.next or _substitution(position, missed)
        drafted = [] if sequence.constraint is None else self._worth_a_mask(position)
        self.stats.lookup_seconds += time.perf_counter() - start
        return drafted

    def _worth_a_mask(self, position: Position) -> list[int]:
        """What may come next, as far as it is likely enough to be verified: each token costs a mask of the grammar."""
        found, chance = position.next, 1.0
        if found is None:
            return []
        drafted: list[int] = []
        for ahead, token in enumerate(found.take(MOST_DRAFTED)):
            share = position.tenant.survival.chance(found.source, found.length + ahead)
            chance *= position.deviation.apply(share)
            if chance < self._least:
                break
            drafted.append(token)
        return drafted

    @staticmethod
    def _follow(sequence: Sequence, position: Position, emitted: Many[int]) -> Continuation | None:
        """Compare what came with what was expected, as far as it was; returns what it left, if it did."""
        constraint, survival = sequence.constraint, position.tenant.survival
        if constraint is not None and constraint.forced:
            for ahead, (drafted, token) in enumerate(zip(constraint.drafted, emitted, strict=False)):
                survival.learn(Source.GRAMMAR, ahead, drafted == token)
        missed = None
        for token in emitted:
            if position.next is not None:
                missed = _compare(position, position.next, sequence, emitted, token)
            position.come_back(token)
        return missed

    def verified(self, sequence: Sequence, source: Source, drafted: int, accepted: int) -> None:
        """So many tokens of a draft were right."""
        self.stats.count(source, drafted, accepted)
        if source is Source.PREDICTION and sequence.position is not None:
            sequence.position.accepted += accepted
            sequence.position.rejected += drafted - accepted

    def end(self, sequence: Sequence, *, keep: bool) -> None:
        """A sequence has ended; others may draft from what it said if it is to be kept."""
        if sequence.position is None:
            return
        salt = sequence.request.tree_salt
        live = self._live.get(salt, [])
        if sequence in live:
            live.remove(sequence)
            if not live:
                del self._live[salt]
        if keep and Source.FINISHED in self.config.sources:
            self._tenants.keep(salt, sequence.output_ids)

    # --- where ---------------------------------------------------------------------------------------------------

    def _look_up(self, sequence: Sequence, position: Position, tail: Many[int]) -> Continuation | None:
        """The likeliest continuation of ``tail``."""
        if position.prediction is not None:
            tokens = position.prediction.tokens
            match = position.prediction.chains.find(tokens, tail, near=position.expected)
            if match is not None and match.place < len(tokens):
                return position.continuation(Source.PREDICTION, tokens, *match)
        least = max(self.config.prompt_lookup_min, LEAST)
        survival, best, worth = position.tenant.survival, None, 0.0
        for source, text, chains in self._texts(sequence, position):
            match = chains.find(text, tail)
            if match is None or match.length < least:
                continue
            chance = survival.chance(source, match.length)
            if chance > worth:
                best, worth = position.continuation(source, text, *match), chance
            if match.length >= _SURE:
                break
        if best is not None or least > LEAST:
            return best
        tries = (self._steps + position.number) % _TRIED == 0  # or else nothing would tell if it is worth it again
        return _again(sequence, position, tail[-1]) if tries or survival.chance(Source.OWN, 1) > _WORTH else None

    def _texts(self, sequence: Sequence, position: Position) -> Iterator[tuple[Source, Many[int], Chains]]:
        tokens, sources = sequence.tokens, self.config.sources
        position.own.note(tokens, len(tokens))
        yield Source.OWN, tokens, position.own
        node = sequence.node
        for _ in range(_NODES):
            if node is None or node.parent is None:
                break
            yield Source.PREFIX, tokens, _chains_of(node, tokens)
            node = node.parent
        if Source.SIBLING in sources:
            for other in self._siblings(sequence):
                if other.position is not None:
                    other.position.own.note(other.tokens, len(other.tokens))
                    yield Source.SIBLING, other.tokens, other.position.own
        if Source.FINISHED in sources:
            for text in position.tenant.finished():
                yield Source.FINISHED, text.tokens, text.chains

    def _siblings(self, sequence: Sequence) -> Iterator[Sequence]:
        """Other completions of the request, and sequences below the same node."""
        count = 0
        for other in reversed(self._live.get(sequence.request.tree_salt, [])[-_LOOKED_AT:]):
            below = other.node is sequence.node and other.node is not None and other.node.parent is not None
            if other is not sequence and (below or other.request is sequence.request):
                yield other
                count += 1
                if count == _SIBLINGS:
                    return

    def report(self) -> dict[str, Any]:
        """The counters, and what the indices take now."""
        self.stats.index_bytes = self.count_bytes()
        return self.stats.to_dict()

    def count_bytes(self) -> int:
        """Bytes of everything that drafts are looked up in."""
        nodes = sum(node.chains.nbytes for node in self._tree if node.chains is not None)
        live = [each.position for sequences in self._live.values() for each in sequences if each.position is not None]
        own = sum(
            each.own.nbytes + each.rewrites.nbytes + (each.prediction.nbytes if each.prediction else 0) for each in live
        )
        return nodes + own + self._tenants.nbytes


def room(work: Work) -> int:
    """How many tokens a draft of this work may have: nothing grows, or gives way, for one."""
    sequence, slot = work.sequence, work.target
    state = sequence.sampling
    if state is None or not state.params.speculation or not isinstance(slot, Slot):
        return 0
    left = min(slot.bucket.capacity - slot.length - work.count, sequence.tokens_left - 1)
    return left if state.reasoning is None else min(left, state.reasoning.free)


def _chains_of(node: Node, tokens: Many[int]) -> Chains:
    """The places in a node, by the text of one of its readers; anew if it was cut or joined since."""
    chains: Chains | None = node.chains
    if chains is None or chains.start != node.start or chains.end != max(node.end, node.start, LEAST):
        chains = node.chains = Chains(node.start)
        chains.note(tokens, node.end)
    return chains


def _compare(
    position: Position, found: Continuation, sequence: Sequence, emitted: Many[int], token: int
) -> Continuation | None:
    """Compare the next token with ``found``, and learn from it; returns what was left if it is another."""
    known, survival = len(found.text), position.tenant.survival
    expected = found.pop()
    if expected is None and found.text is sequence.tokens:  # it repeats what has just come
        expected = emitted[found.place - known]
        found.place += 1
    if expected is None:
        position.next = None
        return None
    chance = survival.chance(found.source, found.length)
    survival.learn(found.source, found.length, expected == token)
    position.deviation.learn(chance, expected == token)
    if expected == token:
        found.right()
        return None
    position.next = position.leave(found, token)
    return found if position.next is None else None


def _again(sequence: Sequence, position: Position, token: int) -> Continuation | None:
    """What came behind ``token`` when the answer had it last."""
    tokens = sequence.tokens
    for place in range(len(tokens) - 1, max(position.answer, len(tokens) - _RECENT), -1):
        if tokens[place - 1] == token:
            return position.continuation(Source.OWN, tokens, place, 1)
    return None


def _substitution(position: Position, missed: Continuation | None) -> Continuation | None:
    """Behind a long match that one token left, that token may have taken the place of another."""
    if missed is None or missed.place + 1 >= len(missed.text):
        return None
    if missed.length < _SUBSTITUTED and missed.source is not Source.PREDICTION:
        return None
    return position.continuation(missed.source, missed.text, missed.place + 1, 0)
