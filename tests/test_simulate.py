"""The simulator: its engine beside the real one, conservation, closed forms, and files it must refuse."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.distributed.routing.homes import Rendezvous
from gossamer.distributed.routing.policies_compared import ROUTERS
from gossamer.distributed.simulate.cluster import FleetOptions, Outcome, _Cluster, replay
from gossamer.distributed.simulate.engine_model import EngineModel
from gossamer.distributed.simulate.generate import agent_trace, key_of, zipf_trace
from gossamer.distributed.simulate.report import as_json, page, summary
from gossamer.distributed.simulate.speeds import Speeds, StepCounts, fit, read_speeds
from gossamer.distributed.simulate.texts import Text
from gossamer.distributed.simulate.trace import Trace, TraceRequest, read_trace, write_trace
from gossamer.engine.cost import CostModel
from gossamer.engine.scheduler import Work
from gossamer.errors import ConfigurationError

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
    from gossamer.distributed.simulate.measure import counts_of

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
    sequences, outputs, waiting = {}, {}, 24
    planned: list[StepCounts] = []
    plan = engine.planner.plan

    def watched(works: list[Work]) -> Any:
        planned.append(counts_of(works))
        return plan(works)

    engine.planner.plan = watched
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
        if works:
            assert ours.counts(works) == planned[-1], "what the step reads, for its time"
        ours.commit(works, 1)
        assert ours.budget.used * size == engine.budget.used
        assert ours.tree.idle * size == engine.tree.evictable_bytes
        assert len(ours.active) == len(engine.scheduler.active) and len(ours.waiting) == len(engine.scheduler.waiting)
    assert not ours.busy
    cached = {name: output.num_cached_tokens for name, output in outputs.items() if output.error is None}
    assert {name: sequences[name].cached for name in cached} == cached
    assert sum(cached.values()) > 200, "the trace is worth it"
    assert ours.tree.evicted_tokens == engine.tree.evicted_tokens
    assert ours.preemptions == engine.scheduler.num_preemptions


# --- the fleet -------------------------------------------------------------------------------------------------------

SPEEDS = Speeds(
    step=4e-3,
    prefill_token=5e-4,
    row=1e-3,
    private_pair=2e-8,
    segment_key=3e-7,
    segment_pair=4e-8,
    segments={"call": 1e-4, "per_reader": 1e-7, "per_key": 1e-8, "per_pair": 2e-8, "per_private_pair": 1e-6},
    kv_bytes_per_token=100,
    model="tiny",
    version="0",
)


def trace_of(requests: list[TraceRequest], block: int = BLOCK) -> Trace:
    longest = max(each.prompt_tokens + each.output_tokens for each in requests)
    return Trace(requests, block, longest, dependent=any(each.after is not None for each in requests))


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    rng, requests, now = random.Random(draw(st.integers(0, 10**6))), [], 0.0
    for number in range(draw(st.integers(1, 40))):
        now += rng.choice([0.0, 0.001, 0.1])
        path = [rng.randrange(2) for _ in range(rng.randrange(10))]
        chain = tuple(key_of(*path[: i + 1]) for i in range(len(path)))
        tokens = len(chain) * BLOCK + rng.choice([0, 1, 40, 80])
        after = str(rng.randrange(number)) if number and rng.random() < 0.3 else None
        output = rng.choice([1, 2, 30])
        wait = now if after is None else rng.random()
        requests.append(TraceRequest(wait, chain, max(tokens, 1), output, str(number), after))
    return trace_of(requests)


@settings(max_examples=60, deadline=None)
@given(
    traces(), st.sampled_from(sorted(ROUTERS)), st.integers(1, 4), st.integers(1, 3), st.sampled_from([300, 600, 5000])
)
def test_every_request_ends_once_and_every_token_is_computed_or_saved(
    trace: Trace, router: str, replicas: int, ingresses: int, memory: int
) -> None:
    options = FleetOptions(
        replicas=replicas, memory_tokens=memory, ingresses=ingresses, max_num_seqs=5, max_num_batched_tokens=48
    )
    cluster = _Cluster(trace, SPEEDS, options, router)
    outcome = cluster.run()
    requests = list(trace)
    assert outcome.requests + outcome.failed == len(requests)
    assert cluster.unfinished == 0 and not cluster.waiting
    assert all(not each.engine.busy for each in cluster.replicas)
    assert all(each.stats()["in_flight"] == 0 for each in cluster.routers)
    assert sum(outcome.requests_by_replica) == outcome.requests == len(outcome.ttft)
    assert outcome.peak_tokens <= memory
    for engine in (each.engine for each in cluster.replicas):
        stack, held = list(engine.tree.root.children.values()), 0
        while stack:
            node = stack.pop()
            assert node.refs == 0 and node.complete and node.stored
            held += len(node)
            stack += node.children.values()
        assert held == engine.budget.used == engine.tree.idle
    if not outcome.failed:
        assert outcome.prompt_tokens == sum(each.prompt_tokens for each in requests)
        fed = sum(each.engine.computed_tokens for each in cluster.replicas)
        expected = outcome.computed_tokens + outcome.output_tokens - outcome.requests
        if not outcome.preemptions:
            assert fed == expected and outcome.recomputed_tokens == 0
        else:
            assert fed >= expected


def test_requests_that_outgrow_the_memory_fail_and_the_others_go_on() -> None:
    """As in the engine: a prompt fits, and its answer then does not."""
    requests = [TraceRequest(0.0, (key_of(i),), 150 if i % 2 else 20, 150 if i % 2 else 20, str(i)) for i in range(8)]
    for in_flight in (None, 3):
        options = FleetOptions(replicas=1, memory_tokens=300, in_flight=in_flight)
        outcome = replay(trace_of(requests), SPEEDS, options)
        assert (outcome.failed, outcome.requests) == (4, 4)


def test_one_request_after_the_other_takes_the_time_of_the_formula() -> None:
    """No sharing: chunks of the prompt, then the last token alone, then one token per step."""
    prompt, output, chunk = 1000, 50, 256
    requests = [TraceRequest(0.0, (key_of(i, 0),), prompt, output, str(i)) for i in range(5)]
    options = FleetOptions(replicas=1, memory_tokens=4000, in_flight=1, max_num_batched_tokens=chunk)
    outcome = replay(trace_of(requests), SPEEDS, options)
    prefill = 0.0
    for start in range(0, prompt - 1, chunk):
        count = min(chunk, prompt - 1 - start)
        pairs = sum(start + i + 1 for i in range(count))
        prefill += SPEEDS.step + SPEEDS.prefill_token * count + SPEEDS.private_pair * pairs
    fixed = SPEEDS.step + SPEEDS.row + (SPEEDS.segment_key + SPEEDS.segment_pair) * (prompt - 1)
    decode = [fixed + SPEEDS.private_pair * (i + 1) for i in range(output)]
    assert outcome.cached_tokens == 0
    assert list(outcome.ttft) == pytest.approx([prefill + decode[0]] * 5, rel=1e-9)
    assert list(outcome.inter_token) == pytest.approx([mean(decode[1:])] * 5, rel=1e-9)
    assert outcome.seconds == pytest.approx(5 * (prefill + sum(decode)), rel=1e-9)


@settings(max_examples=25, deadline=None)
@given(traces(), st.integers(1, 3))
def test_steps_planned_together_take_as_long_as_one_by_one(trace: Trace, replicas: int) -> None:
    options = FleetOptions(replicas=replicas, memory_tokens=1000, max_num_seqs=5, max_num_batched_tokens=48)
    together = replay(trace, SPEEDS, options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EngineModel, "_repeats", lambda self, works: 1)
        apart = replay(trace, SPEEDS, options)
    assert (together.steps, together.cached_tokens) == (apart.steps, apart.cached_tokens)
    assert sorted(together.ttft) == pytest.approx(sorted(apart.ttft), rel=1e-9, abs=1e-9)
    assert sorted(together.inter_token) == pytest.approx(sorted(apart.inter_token), rel=1e-9, abs=1e-9)


def grouped(groups: int, each: int, prefix: int, seed: int) -> Trace:
    """Shuffled questions about prefixes, all there from the beginning."""
    order = [group for group in range(groups) for _ in range(each)]
    random.Random(seed).shuffle(order)
    chains = [tuple(key_of(group, i) for i in range(prefix // BLOCK)) for group in range(groups)]
    return trace_of([TraceRequest(0.0, chains[group], prefix + 32, 32, str(i)) for i, group in enumerate(order)])


def test_routers_come_in_the_order_that_they_should() -> None:
    """16 groups of 8 on two replicas, with memory for half of the groups in each: the fewer computed tokens the better
    a rule knows where prefixes are."""
    computed: dict[str, float] = {}
    for name in ROUTERS:
        seeds = range(3)
        options = FleetOptions(memory_tokens=8 * 1024 + 2500, in_flight=8)
        computed[name] = mean(
            replay(grouped(16, 8, 1024, s), SPEEDS, dataclasses.replace(options, seed=s), router=name).computed_tokens
            for s in seeds
        )
    ideal = 16 * 1024 + 128 * 32
    assert computed["prefix"] <= 1.3 * ideal, computed
    assert computed["prefix"] * 2.5 <= min(computed[name] for name in ("round-robin", "random", "power-of-two")), (
        computed
    )
    assert computed["prefix"] <= computed["consistent-hash"], computed


def test_hit_rates_are_those_of_ches_approximation() -> None:
    """Che, Tung, Wang, 2002: with LRU, what is asked for with probability p is there with 1 - exp(-p T), where T is
    such that these sum up to what fits. Four replicas, each with the prefixes that it is the home of."""
    prefixes, size, fits = 400, 256, 30
    options = FleetOptions(replicas=4, memory_tokens=fits * size + 128, in_flight=1, warm_up=3000)
    trace = zipf_trace(
        requests=12_000, rate=1, prefixes=prefixes, prefix_tokens=size, suffix_tokens=1, output_tokens=1, seed=5
    )
    outcome = replay(trace, SPEEDS, options)
    weights = 1 / np.arange(1, prefixes + 1)
    weights /= weights.sum()
    homes = Rendezvous([f"replica-{i}" for i in range(4)])
    chains: dict[int, tuple[int, ...]] = {}
    own = np.array([key_of(k, 1) for k in range(prefixes)], dtype=object)
    for k in range(prefixes):
        chains[k] = tuple((own[k] + i * 0x9E3779B97F4A7C15) % 2**64 for i in range(8))
    assert {each.chain for each in trace} <= set(chains.values())
    home = np.array([int(homes.best(chains[k][-1], 1)[0].removeprefix("replica-")) for k in range(prefixes)])
    expected = 0.0
    for replica in range(4):
        p = weights[home == replica]
        low, high = 0.0, 1e9
        for _ in range(200):
            middle = (low + high) / 2
            low, high = (middle, high) if (1 - np.exp(-p * middle)).sum() < fits else (low, middle)
        expected += float((p * (1 - np.exp(-p * low))).sum())
    assert outcome.cached_tokens / outcome.requests / size == pytest.approx(expected, abs=0.03)
    assert 0.5 < expected < 0.9


def test_conversations_wait_for_their_answers_and_find_them_cached() -> None:
    trace = agent_trace(conversations=30, rate=2.0, turns=5, systems=2, system_tokens=256, tool_tokens=64, seed=1)
    requests = list(trace)
    again = agent_trace(conversations=30, rate=2.0, turns=5, systems=2, system_tokens=256, tool_tokens=64, seed=1)
    assert list(again) == requests
    outcome = replay(trace, SPEEDS, FleetOptions(replicas=2, memory_tokens=100_000))
    assert outcome.requests == len(requests) > 100
    assert outcome.cached_tokens > 0.7 * outcome.prompt_tokens, "histories, with the answers in them"
    blind = replay(trace, SPEEDS, FleetOptions(replicas=2, memory_tokens=100_000), router="round-robin")
    assert outcome.computed_tokens < 0.8 * blind.computed_tokens


def test_several_ingresses_see_a_part_each_and_still_share() -> None:
    trace = grouped(16, 8, 1024, 1)
    one = replay(trace, SPEEDS, FleetOptions(replicas=4, memory_tokens=50_000, in_flight=16))
    four = replay(trace, SPEEDS, FleetOptions(replicas=4, memory_tokens=50_000, in_flight=16, ingresses=4))
    blind = replay(trace, SPEEDS, FleetOptions(replicas=4, memory_tokens=50_000, in_flight=16), router="round-robin")
    assert one.computed_tokens <= four.computed_tokens < 0.8 * blind.computed_tokens


def test_the_same_seed_gives_the_same_outcome_and_the_warm_up_does_not_count() -> None:
    trace = zipf_trace(requests=300, rate=5, prefixes=30, prefix_tokens=256, seed=2)
    options = FleetOptions(replicas=3, memory_tokens=3000, warm_up=100)
    first, second = replay(trace, SPEEDS, options), replay(trace, SPEEDS, options)
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
    assert first.requests == 200


# --- files -----------------------------------------------------------------------------------------------------------


def test_traces_are_read_as_they_were_written(tmp_path: Path) -> None:
    trace = agent_trace(conversations=5, rate=1.0, seed=3)
    assert write_trace(tmp_path / "t.jsonl", trace) == len(list(trace))
    read = read_trace(tmp_path / "t.jsonl")
    assert list(read) == list(trace)
    assert (read.block_tokens, read.longest, read.dependent) == (trace.block_tokens, trace.longest, True)


HEADER = {"format": "gossamer-trace-1", "block_tokens": 16}
LINE = {"t": 1.0, "chain": ["00ff"], "prompt_tokens": 20, "output_tokens": 4}


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "no requests"),
        ([HEADER], "no requests"),
        ([LINE], "line 1: a trace begins with"),
        ([{"format": "gossamer-trace-2"}, LINE], "gossamer-trace-2"),
        ([{**HEADER, "blocks": 3}, LINE], "unknown field 'blocks'"),
        ([HEADER, {**LINE, "prompt": "secret"}], "line 2: unknown field 'prompt'"),
        ([HEADER, LINE, {**LINE, "t": 0.5}], "line 3: t goes back from 1.0 to 0.5"),
        ([HEADER, {**LINE, "t": -1}], "t must be seconds"),
        ([HEADER, {**LINE, "t": float("nan")}], "t must be seconds"),
        ([HEADER, {**LINE, "t": 10**400}], "t must be seconds"),
        ([HEADER, {**LINE, "prompt_tokens": 0}], "prompt_tokens must be an integer"),
        ([HEADER, {**LINE, "output_tokens": 1.5}], "output_tokens must be an integer"),
        ([HEADER, {**LINE, "output_tokens": True}], "output_tokens must be an integer"),
        ([HEADER, {**LINE, "chain": "00ff"}], "chain must be a list"),
        ([HEADER, {**LINE, "chain": [3]}], "chain must be a list"),
        ([HEADER, {**LINE, "chain": ["1" * 17]}], "chain must be a list"),
        ([HEADER, {**LINE, "after": "x"}], "comes after 'x'"),
        ([HEADER, {**LINE, "id": "x"}, {**LINE, "id": "x"}], "'x' is there twice"),
        ([HEADER, {name: value for name, value in LINE.items() if name != "chain"}], "chain is missing"),
        ([{"format": "gossamer-trace-1"}, LINE], "tokens per hash are not known"),
        ([{**HEADER, "block_tokens": 0}, LINE], "block_tokens must be an integer"),
        (["not json"], "line 1: expected an object"),
    ],
)
def test_bad_traces_are_refused_with_the_line(tmp_path: Path, lines: list[Any], says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ConfigurationError, match=says):
        read_trace(path)


def test_unreadable_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="cannot read"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="UTF-8"):
        read_trace(tmp_path / "binary")
    (tmp_path / "cut").write_text(json.dumps(HEADER) + "\n" + json.dumps(LINE)[:-5])
    with pytest.raises(ConfigurationError, match="line 2: not JSON"):
        read_trace(tmp_path / "cut")


def test_a_servers_log_says_bytes_and_they_tell_the_tokens_per_hash(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    line = {**LINE, "chain": ["01", "02", "03"], "prompt_bytes": 800, "prompt_tokens": 200, "cached_tokens": 3}
    path.write_text("\n".join(map(json.dumps, [{"format": "gossamer-trace-1"}, line, {**line, "t": 2, "ttft": 0.1}])))
    assert read_trace(path).block_tokens == 64


@pytest.mark.parametrize("change", [{"replicas": 0}, {"memory_tokens": 0}, {"in_flight": 0}, {"price": -1.0}])
def test_impossible_fleets_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="at least"):
        FleetOptions(**change)


def test_what_cannot_be_replayed_is_refused() -> None:
    trace = zipf_trace(requests=10, rate=1, prefixes=2, prefix_tokens=100)
    with pytest.raises(ConfigurationError, match="longest request has 164 tokens"):
        replay(trace, SPEEDS, FleetOptions(memory_tokens=163))
    with pytest.raises(ConfigurationError, match="no router 'best'"):
        replay(trace, SPEEDS, router="best")
    with pytest.raises(ConfigurationError, match="of large, and the speeds are of tiny"):
        replay(dataclasses.replace(trace, model="large"), SPEEDS)
    with pytest.raises(ConfigurationError, match="no requests"):
        replay(Trace([], 16, 1), SPEEDS)
    with pytest.raises(ConfigurationError, match="in flight"):
        replay(agent_trace(conversations=1, rate=1.0), SPEEDS, FleetOptions(in_flight=1))
    with pytest.raises(ConfigurationError, match="rate must be positive"):
        zipf_trace(requests=10, rate=0, prefixes=2)


def test_speeds_are_read_as_written_and_not_for_another_model_or_version(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    SPEEDS.write(path)
    assert read_speeds(path, model="tiny", version="0") == SPEEDS
    with pytest.raises(ConfigurationError, match="measured with tiny, and this is of large"):
        read_speeds(path, model="large")
    with pytest.raises(ConfigurationError, match=r"by Gossamer 0, this is 1\.0"):
        read_speeds(path, version="1.0")
    values = json.loads(path.read_text())
    for change, says in [
        ({"step": -1}, "step must be"),
        ({"row": float("inf")}, "row must be"),
        ({"format": "x"}, "no file of speeds"),
        ({"more": 1}, "unknown field 'more'"),
        ({"segments": {}}, "call must be"),
        ({"kv_bytes_per_token": 0}, "kv_bytes_per_token"),
        ({"step": 0, "prefill_token": 0}, "take no time"),
    ]:
        path.write_text(json.dumps(values | change))
        with pytest.raises(ConfigurationError, match=says):
            read_speeds(path)
    path.write_text("{")
    with pytest.raises(ConfigurationError, match="no JSON"):
        read_speeds(path)


@given(st.lists(st.sampled_from([0.0, 1e-6, 3e-4, 0.02]), min_size=6, max_size=6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_fitting_finds_the_coefficients_that_made_the_times(coefficients: list[float], seed: int) -> None:
    rng = random.Random(seed)
    counts = [StepCounts(*(rng.randrange(1, 2000) for _ in range(5))) for _ in range(40)]
    seconds = [coefficients[0] + sum(c * x for c, x in zip(coefficients[1:], each, strict=True)) for each in counts]
    if min(seconds) == 0:
        with pytest.raises(ConfigurationError, match="took no time"):
            fit(counts, seconds)
        return
    found, residuals = fit(counts, seconds)
    assert list(found.values()) == pytest.approx(coefficients, rel=1e-4, abs=1e-9)
    assert residuals["p90"] < 1e-6 and abs(residuals["bias"]) < 1e-6


def test_fitted_coefficients_are_never_negative_and_noise_shows_in_the_residuals() -> None:
    rng = random.Random(1)
    counts = [StepCounts(*(rng.randrange(1, 2000) for _ in range(5))) for _ in range(200)]
    found, residuals = fit(counts, [rng.uniform(0.5, 1.5) for _ in counts])
    assert min(found.values()) >= 0 and residuals["median"] > 0.1
    with pytest.raises(ConfigurationError, match="too few"):
        fit(counts[:3], [1.0] * 3)


def test_reports_show_every_router_and_say_what_was_simulated() -> None:
    options = FleetOptions(replicas=2, memory_tokens=5000, price=0.5)
    trace = zipf_trace(requests=50, rate=5, prefixes=5, prefix_tokens=256)
    results = [summary(replay(trace, SPEEDS, options, router=name), options) for name in ("prefix", "round-robin")]
    for result in results:
        assert result["computed_tokens"] + result["saved_tokens"] == result["prompt_tokens"] == 50 * 288
        assert result["cost"] == pytest.approx(0.5 * 2 * result["seconds"] / 3600)
        assert 0 < result["utilization"] <= 1 <= result["balance_busy"] <= 2
    shown = page(results, options, SPEEDS, trace="<generated>")
    assert "&lt;generated&gt;" in shown and "round-robin" in shown and "<script" not in shown
    assert shown.count("<rect") == 8 and "http" not in shown
    empty = summary(Outcome("prefix"), options)
    json.loads(json.dumps(as_json([empty, *results], options, SPEEDS), allow_nan=False))


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def command() -> Callable[..., str]:
    """``gossamer simulate`` with these arguments; returns what it prints to stdout."""
    import typer
    from typer.testing import CliRunner

    from gossamer.cli.simulate import simulate

    app = typer.Typer()
    app.command()(simulate)

    def run(*arguments: object) -> str:
        result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


def test_the_command_makes_a_trace_and_replays_it_with_each_router(
    command: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.__version__", "0")
    trace, speeds, report = tmp_path / "t.jsonl", tmp_path / "speeds.json", tmp_path / "report.html"
    SPEEDS.write(speeds)
    made = ("--generate", "zipf", "--requests", 60, "--rate", 20, "--prefixes", 6, "--prefix-tokens", 256)
    command(*made, "--seed", 4, "-o", trace)
    fleet = ("--speeds", speeds, "--replicas", 3, "--memory", "100KB", "--seed", 4, "--json")
    told = json.loads(command(trace, *fleet, "--report", report))
    assert [each["router"] for each in told["results"]] == list(ROUTERS)
    assert all(each["requests"] == 60 and each["prompt_tokens"] == 60 * 288 for each in told["results"])
    assert told["fleet"]["memory_tokens"] == 1000 and told["speeds"]["model"] == "tiny"
    assert json.loads(command(*made, *fleet))["results"] == told["results"], "without a file in between"
    assert "round-robin" in report.read_text()
    assert "round-robin" in command(trace, *fleet[:-1], "--router", "prefix,round-robin")


def test_the_command_refuses_what_does_not_go_together(command: Callable[..., str], tmp_path: Path) -> None:
    speeds = tmp_path / "speeds.json"
    SPEEDS.write(speeds)
    (tmp_path / "t.jsonl").write_text(json.dumps(HEADER) + "\n" + json.dumps(LINE))
    trace = tmp_path / "t.jsonl"
    for arguments, says in [
        ((), "give one of these"),
        ((trace, "--generate", "zipf"), "give one of these"),
        ((trace,), "say how long steps take"),
        ((trace, "--speeds", speeds), "measured by Gossamer 0"),
        ((trace, "--speeds", tmp_path / "none"), "cannot read speeds"),
        ((trace, "-o", tmp_path / "x"), "-o is for"),
        ((trace, "--threads", 2), "for --measure"),
        (("--generate", "many"), "zipf or agents"),
        (("--measure", "tiny"), "-o FILE"),
    ]:
        with pytest.raises(ConfigurationError, match=says):
            command(*arguments)


def test_speeds_of_the_real_engine_are_measured(model: str, tmp_path: Path) -> None:
    import gossamer
    from gossamer import LLM
    from gossamer.distributed.simulate import measure

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "SHARED", (0, 512))
        llm = LLM(model, memory=10**7, speculation="off")
        speeds = measure.measure_speeds(llm, model="tiny", rounds=1)
        with pytest.raises(ConfigurationError, match="drafts"):
            measure.measure_speeds(LLM(model, memory=10**7), model="tiny")
    assert speeds.kv_bytes_per_token == llm.engine.tree.layout.bytes_per_token
    assert speeds.version == gossamer.__version__ and speeds.residuals["steps"] > 100
    assert speeds.step + speeds.row > 0 and speeds.segments["per_private_pair"] >= 0
    speeds.write(tmp_path / "speeds.json")
    assert read_speeds(tmp_path / "speeds.json", model="tiny", version=gossamer.__version__) == speeds
    outcome = replay(grouped(4, 4, 256, 0), speeds, FleetOptions(memory_tokens=5000))
    assert outcome.requests == 16 and outcome.seconds > 0
