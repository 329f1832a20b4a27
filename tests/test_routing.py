"""Choosing replicas: chains, beliefs, loads, and the rule itself, on a small model of replicas with caches."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, OrderedDict
from statistics import mean
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.distributed.routing.chain import BLOCK_BYTES, ChainHasher
from gossamer.distributed.routing.homes import Rendezvous
from gossamer.distributed.routing.index import PrefixIndex
from gossamer.distributed.routing.load import Load
from gossamer.distributed.routing.policies_compared import (
    ROUTERS,
    LMetric,
    PowerOfTwo,
    RayPrefixAffinity,
    RoundRobin,
    Router,
    character_chain,
)
from gossamer.distributed.routing.policy import PrefixRouter
from gossamer.errors import ConfigurationError

HASHER = ChainHasher(b"a key of at least sixteen bytes")

# --- chains ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.binary(max_size=1500), st.binary(max_size=700), st.binary(max_size=700))
def test_chains_agree_exactly_as_far_as_texts_do(common: bytes, one: bytes, other: bytes) -> None:
    first, second = HASHER.chain(common + one), HASHER.chain(common + other)
    same = next((i for i, (a, b) in enumerate(zip(common + one, common + other, strict=False)) if a != b), None)
    agreed = sum(a == b for a, b in zip(first, second, strict=False))
    shorter = min(len(common + one), len(common + other))
    blocks = (shorter if same is None else same) // BLOCK_BYTES
    whole = len(common + one) >= BLOCK_BYTES and len(common + other) >= BLOCK_BYTES
    assert agreed == (blocks if whole else int(common + one == common + other))
    assert len(first) == max(len(common + one) // BLOCK_BYTES, 1)
    assert all(0 <= key < 1 << 64 for key in first)


def test_scope_and_key_keep_equal_texts_apart() -> None:
    data = b"system prompt " * 100
    scopes = [(), ("",), ("ab", "c"), ("a", "bc"), ("abc",), ("abc", "")]
    chains = {HASHER.chain(data, scope=scope) for scope in scopes} | {ChainHasher(b"another key 0123").chain(data)}
    assert len(chains) == len(scopes) + 1
    assert len(set(itertools.chain(*chains))) == sum(map(len, chains)), "no hash of any depth agrees"


@pytest.mark.parametrize("length", [0, 15, 65])
def test_keys_that_are_guessed_or_do_not_fit_are_refused(length: int) -> None:
    with pytest.raises(ConfigurationError, match=f"{length} bytes"):
        ChainHasher(bytes(length))


# --- beliefs ---------------------------------------------------------------------------------------------------------

CHAINS = st.lists(st.integers(0, 3), max_size=5).map(
    lambda path: tuple(sum((part + 1) * 10**i for i, part in enumerate(path[: n + 1])) for n in range(len(path)))
)
REPLICAS = ["a", "b", "c"]


@settings(deadline=None)
@given(st.lists(st.tuples(CHAINS, st.sampled_from(REPLICAS), st.sampled_from(["insert", "drop", "forget"]))), CHAINS)
def test_index_agrees_with_a_list_of_all_that_happened(actions: list[tuple[Any, ...]], chain: tuple[int, ...]) -> None:
    index, beliefs = PrefixIndex(max_entries=10_000), dict[tuple[int, str], int]()
    for replica in REPLICAS:
        index.add(replica)
    for number, (path, replica, action) in enumerate(actions):
        if action == "insert":
            stamp = index.insert(path, replica)
            beliefs |= {(key, replica): stamp for key in path}
        else:
            limit = index.clock if action == "drop" else index.clock - number % 3
            beliefs = {pair: stamp for pair, stamp in beliefs.items() if pair[1] != replica or stamp > limit}
            if action == "drop":
                index.drop(replica)
                index.add(replica)
            else:
                index.forget(replica, limit)
    depths = {
        each: max((d for d, key in enumerate(chain, 1) if (key, each) in beliefs), default=0) for each in REPLICAS
    }
    best = max(depths.values())
    assert {each: index.depth(chain, each) for each in REPLICAS} == depths
    found, holders = index.deepest(chain, REPLICAS)
    assert (found, sorted(holders)) == (best, [each for each in REPLICAS if depths[each] == best] if best else [])


@settings(deadline=None)
@given(st.lists(st.tuples(CHAINS, st.sampled_from([*REPLICAS, "unknown"])), max_size=60), st.integers(1, 8))
def test_index_is_bounded_and_keeps_what_was_used_last(inserts: list[tuple[Any, ...]], limit: int) -> None:
    index = PrefixIndex(limit)
    for replica in REPLICAS:
        index.add(replica)
    for path, replica in inserts:
        index.insert(path, replica)
        assert index.pairs <= limit
        assert index.pairs == sum(max(len(entry.stamps), 1) for entry in index._entries.values())
        if path and len(path) < limit / len(REPLICAS) and replica != "unknown":
            assert index.depth(path, replica) == len(path)


def test_what_did_not_come_about_is_withdrawn_and_nothing_else() -> None:
    index = PrefixIndex(100)
    index.add("a")
    index.insert([1, 2], "a")
    stamp = index.insert([1, 2, 3], "a")
    later = index.insert([1, 2], "a")
    index.withdraw([1, 2, 3], "a", stamp)
    assert index.depth([1, 2, 3], "a") == 2
    index.withdraw([1, 2], "a", later)
    assert index.depth([1, 2, 3], "a") == 0


# --- homes -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.sets(st.text(max_size=5), min_size=2, max_size=12), st.integers(), st.data())
def test_a_replica_that_leaves_moves_only_what_it_was_home_of(names: set[str], key: int, data: st.DataObject) -> None:
    homes, gone = Rendezvous(names), data.draw(st.sampled_from(sorted(names)))
    order = homes.best(key, len(names))
    assert sorted(order) == sorted(names)
    assert order == sorted(names, key=lambda name: -homes.weight(key, name))
    assert homes.best_among(key, 2, names - {gone}) == [name for name in order if name != gone][:2]
    assert Rendezvous(names - {gone}).best(key, len(names)) == [name for name in order if name != gone]
    assert all(homes.best(key, count) == order[:count] for count in range(1, len(names) + 2))


def test_homes_are_even() -> None:
    homes = Rendezvous([f"replica-{i}" for i in range(10)])
    count = Counter(homes.best(key, 1)[0] for key in range(10_000))
    assert all(900 < each < 1100 for each in count.values()), count


# --- loads -----------------------------------------------------------------------------------------------------------


def test_reports_add_what_other_routers_have_sent() -> None:
    load = Load()
    for replica in "ab":
        load.add(replica)
    load.start("a", 100.0)
    load.report("a", running=5, queued=1100)
    assert (load.in_flight("a"), load.queued("a"), load.mean_in_flight) == (5, 1100, 2.5)
    load.start("a", 50.0)  # current, on top of what was reported
    assert (load.in_flight("a"), load.queued("a")) == (6, 1150)
    load.report("a", running=0, queued=0)  # older than what we have just sent
    assert (load.in_flight("a"), load.queued("a")) == (2, 150)
    load.drop("a")
    assert (load.in_flight("a"), load.mean_in_flight) == (0, 0)


# --- the rule --------------------------------------------------------------------------------------------------------

ANY_NUMBER = st.one_of(st.integers(), st.floats(), st.just(10**400), st.none())
NAMES = st.sampled_from(["a", "b", "c", "unknown", ""])
IDS = st.sampled_from(["1", "2", "3", ""])
ANY_CHAIN = st.lists(st.integers(), max_size=12).map(tuple)
CALLS = st.one_of(
    st.tuples(st.just("update_replicas"), st.tuples(st.dictionaries(NAMES, ANY_NUMBER, max_size=4))),
    st.tuples(st.just("report"), st.tuples(NAMES, ANY_NUMBER, ANY_NUMBER)),
    st.tuples(st.just("rank"), st.tuples(ANY_CHAIN, ANY_NUMBER, st.none() | st.lists(NAMES))),
    st.tuples(st.just("best"), st.tuples(ANY_CHAIN, ANY_NUMBER)),
    st.tuples(st.just("routed"), st.tuples(IDS, NAMES, ANY_CHAIN, ANY_NUMBER)),
    st.tuples(st.sampled_from(["first_token", "failed"]), st.tuples(IDS)),
    st.tuples(st.just("completed"), st.tuples(IDS, ANY_NUMBER, ANY_NUMBER)),
    st.tuples(st.just("dead"), st.tuples(NAMES)),
    st.tuples(st.just("stats"), st.tuples()),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(CALLS, max_size=40), st.integers(-1, 20))
def test_no_call_raises_and_ranks_hold_each_candidate_once(calls: list[Any], max_entries: int) -> None:
    router, known = PrefixRouter(max_entries=max_entries), set[str]()
    for name, arguments in calls:
        if name == "completed":
            router.completed(arguments[0], prompt_tokens=arguments[1], cached_tokens=arguments[2])
            continue
        result = getattr(router, name)(*arguments)
        if name == "update_replicas":
            known = set(arguments[0])
        elif name == "dead":
            known.discard(arguments[0])
        elif name == "rank":
            expected = known if arguments[2] is None else set(arguments[2])
            assert sorted(itertools.chain(*result)) == sorted(expected)
            assert all(result), "no rank is empty"
        elif name == "best":
            assert result in known or (result is None and not known)
    for request in ["1", "2", "3", ""]:
        router.failed(request)
    assert router.stats()["in_flight"] == 0
    for replica in known:
        router.report(replica, 0, 0)
        assert router._load.in_flight(replica) == router._load.queued(replica) == 0, "all load has gone again"


def fill(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def router_of(count: int, speed: float = 1000.0, seed: int = 0) -> PrefixRouter:
    router = PrefixRouter(seed=seed)
    router.update_replicas({f"replica-{i}": speed for i in range(count)})
    return router


@given(st.binary(min_size=3000, max_size=3000), st.integers(1, 30))
@settings(max_examples=20, deadline=None)
def test_restarted_routers_agree_on_an_idle_fleet(data: bytes, count: int) -> None:
    chosen = {router_of(count, seed=seed).rank(HASHER.chain(data), len(data))[0][0] for seed in range(5)}
    assert len(chosen) == 1


def test_the_faster_replica_gets_more() -> None:
    router = PrefixRouter()
    router.update_replicas({"slow": 100.0, "fast": 1000.0, "unknown": 0.0})
    count = Counter[str]()
    for i in range(100):
        chain = HASHER.chain(fill(3000, i))
        best = router.rank(chain, 3000)[0][0]
        router.routed(str(i), best, chain, 3000)
        count[best] += 1
    assert count["fast"] > 2 * count["slow"], count


def test_evictions_are_learned_from_answers_and_take_older_prefixes_along() -> None:
    router = router_of(1)
    chains = [HASHER.chain(fill(4096, i)) for i in range(3)]
    for i, chain in enumerate(chains):
        router.routed(str(i), "replica-0", chain, 4096)
        router.completed(str(i), prompt_tokens=1024, cached_tokens=0)
    assert [router._index.depth(chain, "replica-0") for chain in chains] == [16, 16, 16]
    router.routed("again", "replica-0", chains[1], 4096)
    router.completed("again", prompt_tokens=1024, cached_tokens=0)
    # the second had been evicted, so the first has been as well; the third may be there, the second is again
    assert [router._index.depth(chain, "replica-0") for chain in chains] == [0, 16, 16]
    router.routed("cached", "replica-0", chains[2], 4096)
    router.completed("cached", prompt_tokens=1024, cached_tokens=1000)
    assert [router._index.depth(chain, "replica-0") for chain in chains] == [0, 16, 16]
    assert router.stats()["corrected"] == 1


@settings(deadline=None)
@given(st.integers(0, 2000), st.integers(1, 2000))
def test_an_answer_never_raises_what_is_believed(cached: int, tokens: int) -> None:
    router = router_of(2)
    chains = [HASHER.chain(fill(1024, i)) for i in range(3)]
    for i, chain in enumerate(chains[:2]):
        router.routed(str(i), "replica-0", chain, 1024)
    before = {(i, name): router._index.depth(c, name) for i, c in enumerate(chains) for name in router._names}
    router.completed("1", prompt_tokens=tokens, cached_tokens=cached)
    assert all(router._index.depth(chains[i], name) <= depth for (i, name), depth in before.items())


def test_bytes_per_token_are_learned() -> None:
    router = router_of(1)
    for i in range(3000):
        router.routed(str(i), "replica-0", (i,), 3000)
        router.completed(str(i), prompt_tokens=1000)
    assert router.stats()["bytes_per_token"] == pytest.approx(3.0, abs=0.3)


def test_dead_replicas_and_failed_requests_leave_nothing_behind() -> None:
    router, chain = router_of(2), HASHER.chain(fill(4096))
    router.routed("1", "replica-0", chain, 4096)
    router.failed("1")
    assert router._index.depth(chain, "replica-0") == 0 and router._load.in_flight("replica-0") == 0
    router.routed("2", "replica-0", chain, 4096)
    router.dead("replica-0")
    assert router.rank(chain, 4096) == [["replica-1"]]
    assert router.rank(chain, 4096, ["replica-0", "replica-1"]) == [["replica-1"], ["replica-0"]]
    router.update_replicas({"replica-0": 1.0, "replica-1": 1.0})
    assert router._index.depth(chain, "replica-0") == 0 and router._load.in_flight("replica-0") == 0
    router.completed("2", prompt_tokens=1024, cached_tokens=0)  # too late, and without effect
    assert router._load.in_flight("replica-0") == 0


# --- the rule on a model of replicas ---------------------------------------------------------------------------------


class Fleet:
    """Replicas that compute one prompt after the other, decode in parallel, and keep the last ``capacity`` groups."""

    SPEED, OUTPUT_SECONDS = 1000.0, 0.004

    def __init__(self, router: Router, count: int = 2, capacity: int = 10**9) -> None:
        self.router, self.capacity = router, capacity
        self.names = [f"replica-{i}" for i in range(count)]
        router.update_replicas(dict.fromkeys(self.names, self.SPEED))
        self.free_at = dict.fromkeys(self.names, 0.0)
        self.running = dict.fromkeys(self.names, 0)
        self.held: dict[str, OrderedDict[int, None]] = {name: OrderedDict() for name in self.names}
        self.routed: Counter[str] = Counter()
        self.computed = 0
        self.ttft: list[float] = []
        self.makespan = 0.0

    def run(self, groups: list[int], in_flight: int, *, head: int, prefix: int, suffix: int, chains: Any) -> Fleet:
        """``in_flight`` requests at a time; lengths in tokens of 4 bytes."""
        tokens, waiting, events, serial = head + prefix + suffix, iter(enumerate(groups)), [], itertools.count()

        def start(now: float) -> None:
            for number, group in itertools.islice(waiting, 1):
                chain = chains(group, number)
                name = self.router.rank(chain, 4 * tokens)[0][0]
                self.router.routed(str(number), name, chain, 4 * tokens)
                held = self.held[name]
                cached = head + prefix if group in held else head if held else 0
                held[group] = None
                held.move_to_end(group)
                while len(held) > self.capacity:
                    held.popitem(last=False)
                self.routed[name] += 1
                self.running[name] += 1
                self.computed += tokens - cached
                done = self.free_at[name] = max(self.free_at[name], now) + (tokens - cached) / self.SPEED
                heapq.heappush(events, (done, next(serial), "first", number, name, cached))
                self.ttft.append(done - now)

        for _ in range(in_flight):
            start(0.0)
        while events:
            now, _, what, number, name, cached = heapq.heappop(events)
            if what == "first":
                self.router.first_token(str(number))
                end = now + 32 * self.OUTPUT_SECONDS * (1 + self.running[name] / 2)
                heapq.heappush(events, (end, next(serial), "end", number, name, cached))
            else:
                self.running[name] -= 1
                self.router.completed(str(number), prompt_tokens=tokens, cached_tokens=cached)
                self.makespan = now
                start(now)
        return self


def group_chains(head: int, prefix: int, suffix: int, seed: int) -> Any:
    """Chains of random bytes: a common head, a prefix per group, a suffix per request."""
    rng = random.Random(seed)
    common = rng.randbytes(4 * head)
    return lambda group, number: HASHER.chain(
        common + random.Random(seed * 10**6 + group).randbytes(4 * prefix) + rng.randbytes(4 * suffix)
    )


def shuffled(groups: int, each: int, seed: int) -> list[int]:
    order = [group for group in range(groups) for _ in range(each)]
    random.Random(seed).shuffle(order)
    return order


def run(router: Router, order: list[int], in_flight: int, seed: int, count: int = 2, capacity: int = 10**9) -> Fleet:
    lengths = {"head": 100, "prefix": 640, "suffix": 32}
    chains = group_chains(**lengths, seed=seed)
    return Fleet(router, count, capacity).run(order, in_flight, **lengths, chains=chains)


def ideal(groups: int, requests: int) -> int:
    return 100 + groups * 640 + requests * 32


def test_a_common_head_of_400_characters_does_not_collect_everything_on_one_replica() -> None:
    """And it does by the rule of Ray's router, whose match rate is never below 10 % then."""
    for seed in range(8):
        fleet = run(PrefixRouter(seed=seed), shuffled(16, 8, seed), 16, seed)
        assert abs(fleet.routed["replica-0"] - 64) <= 8, (seed, fleet.routed)

    letters = "abcdefghijklmnopqrstuvwxyz"

    def characters(group: int, number: int) -> tuple[int, ...]:
        own = random.Random(group).choices(letters, k=2600)
        return character_chain("h" * 400 + "".join(own) + "".join(random.Random(-number).choices(letters, k=100)))

    def rays() -> Fleet:
        return Fleet(RayPrefixAffinity(block_bytes=1))

    order, lengths = shuffled(16, 8, 0), {"prefix": 650, "suffix": 25}
    assert max(rays().run(order, 16, head=100, **lengths, chains=characters).routed.values()) == 128
    headless = rays().run(order, 16, head=0, **lengths, chains=lambda group, number: characters(group, number)[400:])
    assert max(headless.routed.values()) == 64


def test_rays_rule_without_a_common_head_spreads_evenly() -> None:
    chains = group_chains(0, 640, 32, seed=1)
    fleet = Fleet(RayPrefixAffinity()).run(shuffled(16, 8, 1), 16, head=0, prefix=640, suffix=32, chains=chains)
    assert fleet.routed == {"replica-0": 64, "replica-1": 64}


@pytest.mark.parametrize("in_flight", [1, 4, 16, 64])
def test_shuffled_groups_are_computed_once(in_flight: int) -> None:
    """Each group at one replica: hardly more than the ideal, where round robin computes each twice."""
    fleets = [run(PrefixRouter(seed=seed), shuffled(16, 8, seed), in_flight, seed) for seed in range(8)]
    blind = run(RoundRobin(), shuffled(16, 8, 0), in_flight, 0)
    assert mean(fleet.computed for fleet in fleets) <= 1.05 * ideal(16, 128)
    assert blind.computed >= 1.6 * ideal(16, 128)
    assert mean(mean(fleet.ttft) for fleet in fleets) < 0.8 * mean(blind.ttft)


@pytest.mark.parametrize("in_flight", [8, 32])
def test_counting_what_is_computed_twice_for_more_is_better_for_first_tokens_too(in_flight: int) -> None:
    """Why the score is not LMetric's."""
    theirs = [run(LMetric(seed=seed), shuffled(16, 8, seed), in_flight, seed) for seed in range(8)]
    ours = [run(PrefixRouter(seed=seed), shuffled(16, 8, seed), in_flight, seed) for seed in range(8)]
    assert mean(fleet.computed for fleet in theirs) >= 1.15 * ideal(16, 128)
    assert mean(mean(fleet.ttft) for fleet in ours) <= 0.9 * mean(mean(fleet.ttft) for fleet in theirs)
    assert mean(fleet.makespan for fleet in ours) <= mean(fleet.makespan for fleet in theirs)


@pytest.mark.parametrize("in_flight", [4, 16])
def test_memory_for_half_of_the_groups_each_is_enough(in_flight: int) -> None:
    """Two replicas of 8 prefixes each together hold 16; round robin needs all 16 in both."""
    seeds = range(8)
    ours = mean(run(PrefixRouter(seed=s), shuffled(16, 8, s), in_flight, s, capacity=8).computed for s in seeds)
    blind = mean(run(RoundRobin(), shuffled(16, 8, s), in_flight, s, capacity=8).computed for s in seeds)
    assert blind >= 2.5 * ours
    assert ours <= 1.25 * ideal(16, 128)


@pytest.mark.parametrize("in_flight", [16, 48])
def test_a_prefix_of_most_requests_gets_more_homes(in_flight: int) -> None:
    for seed in range(5):
        rng = random.Random(seed)
        order = [0 if rng.random() < 0.8 else rng.randrange(1, 16) for _ in range(256)]
        fleet = run(PrefixRouter(seed=seed), order, in_flight, seed, count=4)
        blind = run(RoundRobin(), order, in_flight, seed, count=4)
        homes = sum(0 in held for held in fleet.held.values())
        assert homes >= 2, (seed, fleet.routed)
        assert fleet.makespan < blind.makespan and mean(fleet.ttft) < mean(blind.ttft)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_every_rule_serves_everything_and_forgets_it(name: str) -> None:
    router = ROUTERS[name](seed=3)
    assert router.rank((1, 2), 512) == []
    fleet = run(router, shuffled(16, 8, 3), 12, 3, count=5)
    assert fleet.routed.total() == 128 and router.stats()["in_flight"] == 0
    assert fleet.router.best((1, 2), 512) in fleet.names
    ranks = router.rank((1, 2), 512)
    assert sorted(itertools.chain(*ranks)) == sorted(fleet.names)
    router.dead("replica-0")
    router.failed("unknown")
    assert "replica-0" not in itertools.chain(*router.rank((1, 2), 512))
    assert list(itertools.chain(*router.rank((1, 2), 512, ["replica-3"]))) == ["replica-3"]


def test_the_less_busy_of_two_is_chosen() -> None:
    router = PowerOfTwo()
    router.update_replicas({"a": 1.0, "b": 1.0})
    router.routed("1", "a", (), 0)
    assert [router.rank((), 0)[0] for _ in range(10)] == [["b"]] * 10
