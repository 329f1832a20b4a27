"""The rule by which a replica is chosen for a prompt.

A few candidates are scored: those believed to hold most of the prompt, the two homes of its anchor by rendezvous
hashing, and one at random. The least score wins:

    (tokens queued there + w x tokens of the prompt it would have to compute) x (requests in flight there + 4) / v

with v the replica's measured prefill speed in tokens per second, and w = 2 + the mean number of requests in flight per
replica: what is computed keeps this request waiting, and as many others, and pushes as much of another prefix out of
memory. With 1 in place of w and 4, and without v, this is LMetric (arXiv 2603.15202), whose two factors are the wait
for a first token and the slower steps of a larger batch. LMetric weighs what this request waits for alone, so that
prefixes are computed again wherever a replica happens to be idle: on two replicas 1.2 to 1.4 times as many tokens as
needed. And a batch of two is not twice as slow as one of one, hence the 4.
``docs/explanation/thousand-replicas.md`` compares.

A candidate with more than 1.5 x the mean number of requests in flight + 8 is passed over; if all are, every replica
is scored. So a prefix that is asked for more often than one replica can serve gets more homes by itself.

A match of less than half of the prompt that two prompts or more have had is a *common head*, such as a system prompt.
It decides nothing: each replica computes it once, and whoever held it first would get everything.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gossamer.distributed.routing.chain import BLOCK_BYTES
from gossamer.distributed.routing.homes import Rendezvous
from gossamer.distributed.routing.index import PrefixIndex
from gossamer.distributed.routing.load import Load

ANCHOR_BLOCKS = 8  # an anchor covers at least the first 2 kB, or short heads that all prompts have would be anchors
HOMES = 2
BOUND_FACTOR, BOUND_EXTRA = 1.5, 8.0  # a relative bound alone reacts to noise when little is in flight
FEW = 64.0  # tokens that are computed beside everybody's next one in a step; less is not worth unequal batches
BYTES_PER_TOKEN = 4.0  # until answers have told
RATIO_WEIGHT = 1_000_000  # tokens after which what answers told counts half


@dataclass
class _Request:
    replica: str
    chain: Sequence[int]
    prompt_bytes: float
    tokens: float  # it is believed to have to compute
    stamp: int  # of its insertion into the index
    believed: int  # hashes that the replica was believed to hold before
    believed_stamp: int | None  # when the replica was given the deepest of them
    computed: bool = False


class PrefixRouter:
    """Sends prompts to where most of them is cached, unless there is too much to do.

    No method raises, whatever it is given: what is unknown is ignored, and numbers without a meaning count as 0. All
    are to be called from one thread.

    Args:
        seed: of the random candidate. Routers that are to agree need not have the same.
        max_entries: pairs of a hash and a replica that are remembered; about 0.4 kB each.

    >>> router = PrefixRouter()
    >>> router.update_replicas({"a": 1000.0, "b": 1000.0})
    >>> chain = tuple(range(16))  # hashes of 4 kB
    >>> first = router.rank(chain, 4096)[0][0]
    >>> router.routed("request-1", first, chain, 4096)
    >>> router.first_token("request-1")
    >>> router.rank(chain + (16,), 4352)[0] == [first]
    True
    >>> router.completed("request-1", prompt_tokens=1024, cached_tokens=0)
    """

    batch_offset = 4.0  # of the score; see the module's documentation

    def __init__(self, *, seed: int = 0, max_entries: int = 1_000_000) -> None:
        self._random = random.Random(seed)
        self._index = PrefixIndex(max_entries)
        self._load = Load()
        self._speeds: dict[str, float] = {}  # of the known replicas, positive and finite
        self._names: list[str] = []
        self._homes = Rendezvous([])
        self._requests: dict[str, _Request] = {}
        self._bytes_seen, self._tokens_seen = RATIO_WEIGHT * BYTES_PER_TOKEN, float(RATIO_WEIGHT)
        self._counts = dict.fromkeys(("routed", "matched_bytes", "prompt_bytes", "all_full", "corrected", "failed"), 0)

    # --- replicas ----------------------------------------------------------------------------------------------

    def update_replicas(self, speeds: Mapping[str, float]) -> None:
        """These are the replicas now, with the prompt tokens that each computes per second.

        Those that are gone are dropped everywhere. A speed that is not a positive number counts as the mean of the
        others.
        """
        for gone in [replica for replica in self._speeds if replica not in speeds]:
            self.dead(gone)
        measured = {replica: _number(speed) for replica, speed in speeds.items()}
        known = [speed for speed in measured.values() if speed > 0]
        usual = sum(known) / len(known) if known else 1.0
        changed = self._speeds.keys() != measured.keys()
        self._speeds = {replica: speed if speed > 0 else usual for replica, speed in measured.items()}
        if changed:
            for replica in self._speeds:
                self._index.add(replica)
                self._load.add(replica)
            self._set_names()

    def dead(self, replica: str) -> None:
        """The replica is gone: its entries and its load with it, until :meth:`update_replicas` names it again."""
        self._index.drop(replica)
        self._load.drop(replica)
        for request_id in [id for id, request in self._requests.items() if request.replica == replica]:
            del self._requests[request_id]
        if self._speeds.pop(replica, None) is not None:
            self._set_names()

    def _set_names(self) -> None:
        self._names = list(self._speeds)
        self._homes = Rendezvous(self._names)

    def report(self, replica: str, running: int, queued_tokens: int) -> None:
        """What a replica says about itself: requests in flight, and prompt tokens not computed yet, of all routers."""
        self._load.report(replica, _number(running), _number(queued_tokens))

    # --- choosing ----------------------------------------------------------------------------------------------

    def rank(
        self, chain: Sequence[int], prompt_bytes: int, candidates: Collection[str] | None = None
    ) -> list[list[str]]:
        """Where the prompt should go: the best replica alone, then the next ones, then all others together.

        Args:
            chain: of the prompt, from :class:`~gossamer.distributed.routing.chain.ChainHasher`.
            prompt_bytes: length of the rendered prompt.
            candidates: may be chosen; ``None`` is every replica. Those that are not known come last.

        Returns:
            Lists without common members that together hold each candidate once; [] without candidates.
        """
        eligible = self._eligible(candidates)
        ranked = self._ranked(chain, _number(prompt_bytes), eligible) if eligible else []
        chosen = set(ranked)
        others = [each for each in eligible if each not in chosen]
        unknown = [] if candidates is None else [each for each in dict.fromkeys(candidates) if each not in self._speeds]
        return [[each] for each in ranked] + [rank for rank in (others, unknown) if rank]

    def best(self, chain: Sequence[int], prompt_bytes: int) -> str | None:
        """What :meth:`rank` puts first among all replicas, without the rest; ``None`` if there are none."""
        return self._ranked(chain, _number(prompt_bytes), self._names)[0] if self._names else None

    def _eligible(self, candidates: Collection[str] | None) -> list[str]:
        """Those that are known, each once."""
        if candidates is None:
            return self._names
        return [each for each in dict.fromkeys(candidates) if each in self._speeds]

    def _ranked(self, chain: Sequence[int], prompt_bytes: float, eligible: list[str]) -> list[str]:
        """Candidates within the bound, the best first, then those beyond it."""
        among: Collection[str] = self._speeds if len(eligible) == len(self._speeds) else set(eligible)
        depth, holders = self._index.deepest(chain, among)
        anchor_depth = max(self._index.repeated(chain), min(ANCHOR_BLOCKS, len(chain)))
        if 2 * depth * BLOCK_BYTES < prompt_bytes and self._index.seen(chain, depth) >= 2:  # a common head
            anchor_depth = min(max(depth + 1, anchor_depth), len(chain))
            depth, holders = 0, []
        anchor = chain[anchor_depth - 1] if chain else 0
        matched = dict.fromkeys(holders, depth)
        for replica in (*self._homes.best_among(anchor, HOMES, among), self._random.choice(eligible)):
            if replica not in matched:
                matched[replica] = self._index.depth(chain, replica, depth)

        miss_weight = self._miss_weight()

        def key(replica: str, depth: int) -> tuple[float, float, int]:
            missing = max(prompt_bytes - depth * BLOCK_BYTES, 0.0) / self._bytes_per_token
            in_flight = self._load.in_flight(replica)
            wait = self._load.queued(replica) + miss_weight * max(missing, FEW)
            score = wait * (in_flight + self.batch_offset) / self._speeds[replica]
            return score, in_flight, -self._homes.weight(anchor, replica)

        limit = BOUND_FACTOR * self._load.mean_in_flight + BOUND_EXTRA
        full = {replica for replica in matched if self._load.in_flight(replica) > limit}
        if len(full) == len(matched):
            self._counts["all_full"] += 1
            matched |= {each: self._index.depth(chain, each, depth) for each in eligible if each not in matched}
            return [min(matched, key=lambda each: key(each, matched[each]))]
        return sorted(matched, key=lambda each: (each in full, key(each, matched[each])))

    def _miss_weight(self) -> float:
        return 2.0 + self._load.mean_in_flight

    @property
    def _bytes_per_token(self) -> float:
        return self._bytes_seen / self._tokens_seen

    # --- what became of a request ------------------------------------------------------------------------------

    def routed(self, request_id: str, replica: str, chain: Sequence[int], prompt_bytes: int) -> None:
        """The request goes to this replica, which need not be the one that ranked first."""
        self.failed(request_id, count=False)  # a second attempt takes the place of the first
        if replica not in self._speeds:
            return
        size = _number(prompt_bytes)
        believed = self._index.depth(chain, replica)
        believed_stamp = self._index.stamp(chain[believed - 1], replica) if believed else None
        missing = max(size - believed * BLOCK_BYTES, 0.0)
        tokens = max(missing / self._bytes_per_token, 1.0)
        stamp = self._index.insert(chain, replica)
        self._requests[request_id] = _Request(replica, chain, size, tokens, stamp, believed, believed_stamp)
        self._load.start(replica, tokens)
        self._counts["routed"] += 1
        self._counts["prompt_bytes"] += int(size)
        self._counts["matched_bytes"] += int(size - missing)

    def replica_of(self, request_id: str) -> str | None:
        """Where a request that has not ended was routed."""
        request = self._requests.get(request_id)
        return None if request is None else request.replica

    def first_token(self, request_id: str) -> None:
        """The prompt is computed, and its tokens are no longer queued."""
        request = self._requests.get(request_id)
        if request is not None and not request.computed:
            request.computed = True
            self._load.computed(request.replica, request.tokens)

    def completed(self, request_id: str, *, prompt_tokens: int | None = None, cached_tokens: int | None = None) -> None:
        """The request has ended well; ``usage`` of its answer says how long the prompt was and what was cached.

        If clearly less was cached than believed, the replica has evicted it, and with it all that it used less
        recently. What is believed to be held never grows here.
        """
        request = self._end(request_id)
        tokens = _number(prompt_tokens or 0)
        if request is None or not tokens:
            return
        self._bytes_seen += request.prompt_bytes
        self._tokens_seen += tokens
        if self._tokens_seen > 2 * RATIO_WEIGHT:
            self._bytes_seen, self._tokens_seen = self._bytes_seen / 2, self._tokens_seen / 2
        if cached_tokens is None or request.believed_stamp is None:
            return
        cached = _number(cached_tokens) / tokens * request.prompt_bytes
        # texts are not equally dense everywhere, so that a small difference says nothing
        if cached + BLOCK_BYTES < 0.9 * min(request.believed * BLOCK_BYTES, request.prompt_bytes):
            self._index.forget(request.replica, request.believed_stamp)
            self._counts["corrected"] += 1

    def failed(self, request_id: str, *, count: bool = True) -> None:
        """The replica did not answer: it does not hold the prompt because of this request."""
        request = self._end(request_id)
        if request is not None:
            self._index.withdraw(request.chain, request.replica, request.stamp)
            self._counts["failed"] += count

    def _end(self, request_id: str) -> _Request | None:
        self.first_token(request_id)
        request = self._requests.pop(request_id, None)
        if request is not None:
            self._load.end(request.replica)
        return request

    def stats(self) -> dict[str, Any]:
        """Counts since the start, and how things stand; bytes are of rendered prompts.

        ``all_full``: times that no candidate was within the bound. ``corrected``: answers that told of an eviction.
        """
        return {
            **self._counts,
            "replicas": len(self._speeds),
            "in_flight": len(self._requests),
            "hashes": len(self._index),
            "entries": self._index.pairs,
            "bytes_per_token": self._bytes_per_token,
        }


def _number(value: Any) -> float:
    """``value`` if it is a positive, finite number, else 0."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0.0
    return number if math.isfinite(number) and number > 0 else 0.0
