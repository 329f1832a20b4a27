"""Decoding many sequences over one prefix, with each way of sharing it.

All engines use the same weights in the same process, and take their steps in turn, so that whatever else the machine
does meets all of them. With sharing off the prefix is computed once, and its keys and values are copied into every
sequence's own memory: only decoding is measured there, and computing the prefix ``batch`` times would take minutes.

**The floor** of a step follows from the machine's ceilings (:class:`~gossamer.bench.machine.Ceilings`). They are
measured in turn with the steps of every combination: before the first, in the middle, and after the last. The best of
them counts, because whatever else the machine does can only make a ceiling look lower, and so a floor higher. A floor
above the median step then means that every measurement of a ceiling was disturbed, while half of the steps were not.
(The ceilings of products are PyTorch's; a kernel that multiplies faster than it could come below the floor as well.)
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import nn

from gossamer.bench.busy import busy
from gossamer.bench.machine import Ceilings, best_of, describe
from gossamer.bench.no_attention import RunnerWithoutAttention
from gossamer.bench.peers.contest import Contest, PeerOptions, Sizes, numbers_per_token
from gossamer.engine.engine import Engine
from gossamer.engine.sequence import Sequence, Status
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import compared, using
from gossamer.nn import Int8Linear, Int8TiedHead, SparseInt8Linear, StoredLinear
from gossamer.options import SHARING_MODES, EngineOptions, ModelOptions, RunnerOptions, SharingMode
from gossamer.runners.loading import load_for_runner
from gossamer.runners.native import NativeRunner
from gossamer.runners.transformers import TransformersRunner
from gossamer.sampling_params import SamplingParams
from gossamer.texts import prompts_of_one_prefix

BOUND = "no-attention"  # attention left out: what no way of sharing can exceed (arXiv 2402.05099, section 4.1)
WARM_UP_STEPS = 2
PEER = "peer"  # in the place of a way of sharing: another project
TURNS, TURN_STEPS = 3, 8  # at least so many turns for peers, of at most so many steps


@dataclass
class DecodeResult:
    """One way of sharing at one batch size and prefix length, or another project that decoded the same prompts.

    Another project has ``sharing="peer"`` and its name as ``runner``, and no engine to look into: it has only the
    figures of prefix, decoding and step, the latter as means of its turns.

    Attributes:
        prefill_tokens_per_s: tokens computed before decoding, over the time that took.
        prompt_tokens, computed_tokens: of all prompts, and how many of them were computed; not with sharing off, where
            one prompt is computed and then copied.
        states: kept of recurrent layers behind shared prefixes, once all prompts are there; ``None`` without such ones.
        prefix_tokens_per_s: tokens of the shared prefix, computed alone, over the time that took; only beside peers.
        decode_tokens_per_s: ``batch`` over the median step.
        step_ms: median of the decode steps; ``step_ms_range`` the fastest and the slowest.
        speedup: median, over the steps, of the time with sharing off over the time of the step beside it.
        engine_ms: median time of a decode step outside of the model's forward pass and of the sampler: scheduling,
            planning, bookkeeping.
        sampling_ms: median time of choosing the tokens, which reads batch x vocabulary logits once.
        profile_ms: median time of a decode step by kind of op; of the native runner.
        kv_bytes: keys and values held while decoding; ``kv_bytes_peak`` the most that was held at any time.
        floor_ms: time that the measured ceilings of this machine need for the same arithmetic and memory traffic.
        floor_share: ``floor_ms`` over ``step_ms``.
        experts_read: whose weights a step has read, in all layers; median. ``None`` without experts.
        ceilings: what ``floor_ms`` was computed with: the best that was measured in turn with the steps of this
            combination. ``gemm_gflops``, ``read_gb_per_s``, and ``int8_gops`` for a model with int8 layers.
        error: why there is no result.
        sparse_weights: how int8 layers that are stored without their zeros are packed; of the native runner.
        weight_bytes: of the packed weights; of the native runner.
        over_dense: median, over the steps, of the time with ``sparse_weights="off"`` over the time of the step beside
            it.
        prefix_eps: tolerance of attention to the prefix; ``over_exact`` is the median, over the steps, of the time with
            exact attention over the time of the step beside it, and ``prefix_tolerance`` tells what was computed and
            the error measured, see :meth:`gossamer.runners.tolerance.PrefixTolerance.summary`.
        batch_invariant: whether answers depend on nothing else in the batch; ``over_variant`` is then the median of the
            time without this over the time of the step beside it.
        isa: the instruction set that computes; of the native runner.
    """

    sharing: str
    runner: str
    batch: int
    prefix: int
    suffix: int
    new: int
    prefill_tokens_per_s: float | None = None
    prompt_tokens: int | None = None
    computed_tokens: int | None = None
    states: int | None = None
    decode_tokens_per_s: float | None = None
    step_ms: float | None = None
    step_ms_range: tuple[float, float] | None = None
    speedup: float | None = None
    engine_ms: float | None = None
    sampling_ms: float | None = None
    profile_ms: dict[str, float] | None = None
    kv_bytes: int | None = None
    kv_bytes_peak: int | None = None
    floor_ms: float | None = None
    error: str | None = None
    prefix_tokens_per_s: float | None = None
    floor_share: float | None = None
    experts_read: float | None = None
    ceilings: dict[str, float] | None = None
    sparse_weights: str | None = None
    weight_bytes: int | None = None
    over_dense: float | None = None
    prefix_eps: float = 0.0
    over_exact: float | None = None
    prefix_tolerance: dict[str, Any] | None = None
    batch_invariant: bool = False
    over_variant: float | None = None
    isa: str | None = None


@dataclass
class _Contestant:
    """One engine and what was measured of it."""

    result: DecodeResult
    engine: Engine
    steps: list[float] = field(default_factory=list)
    overheads: list[float] = field(default_factory=list)
    samplings: list[float] = field(default_factory=list)
    profiles: list[dict[str, float]] = field(default_factory=list)
    experts_read: list[int] = field(default_factory=list)


def bench_decode(
    model: str,
    *,
    batches: list[int],
    prefixes: list[int],
    suffix: int = 32,
    new: int = 32,
    sharing: tuple[str, ...] = (*SHARING_MODES, BOUND),
    options: ModelOptions = ModelOptions(),
    runners: Iterable[RunnerOptions] = (RunnerOptions(),),
    isas: tuple[str, ...] = (),
    memory: int = 16 * 10**9,
    peers: PeerOptions | None = None,
    busy_processes: int = 0,
    progress: Callable[[str], None] = lambda note: None,
) -> dict[str, Any]:
    """Measure every combination. Returns ``{"machine": {...}, "results": [...]}``, see :class:`DecodeResult`.

    With ``peers`` there is also ``"peers"``: what they are, see :meth:`gossamer.bench.peers.contest.Contest.report`.

    With several ``runners`` the model is packed in each of these ways, and each decodes in turn; those with a tolerance
    only where all attend to the prefix together. So it does with each of several ``isas``, instruction sets of this
    processor, or ``("all",)``.

    With ``busy_processes``, so many other processes use a core each while the contestants decode.

    Raises:
        ConfigurationError: an unknown way of sharing or instruction set, or sizes below 1.
    """
    unknown = [mode for mode in sharing if mode not in (*SHARING_MODES, BOUND)]
    if unknown:
        raise ConfigurationError(f"sharing must be among {', '.join((*SHARING_MODES, BOUND))}, got {unknown[0]!r}")
    if min([*batches, *prefixes, suffix]) < 1 or new <= WARM_UP_STEPS + 2:
        raise ConfigurationError(f"batch, prefix and suffix must be at least 1, and new more than {WARM_UP_STEPS + 2}")
    progress(f"loading {model}")
    machine = describe() | {"busy_processes": busy_processes}
    results = []
    max_rows = max(2048, *batches)
    natives: list[NativeRunner | None] = []
    sets: list[str | None] = [*compared(isas)] or [None]
    # each takes the weights over, and so has a model of its own
    for isa, runner in itertools.product(sets, dict.fromkeys(runners)):
        with using(isa):
            loaded = load_for_runner(model, options, runner, max_rows=max_rows, max_seqs=max(batches))
        network, tokenizer, made = loaded.network, loaded.tokenizer, loaded.runner
        if loaded.runner_note:
            progress(f"not native: {loaded.runner_note}")
        if loaded.weights_note:
            progress(f"not as stored: {loaded.weights_note}")
        if not isinstance(made, NativeRunner):
            natives = [None]
            break
        natives.append(made)
    if None not in natives:
        sharing = tuple(mode for mode in sharing if mode != BOUND)  # it cannot leave attention out
    multiplied = torch.bfloat16 if made.layout.dtype == torch.int8 else made.layout.dtype
    int8 = any(isinstance(module, (Int8Linear, Int8TiedHead, StoredLinear)) for module in network.modules())
    ceilings = Ceilings(multiplied, int8=int8)
    sizes = Sizes([(b, p) for b in batches for p in prefixes], suffix, new, numbers_per_token(network))
    settings: dict[str, Any] = {"threads": machine["threads"], "dtype": network.dtype, "memory": memory}
    with Contest(peers or PeerOptions(()), model, sizes, **settings, progress=progress) as contest:
        for batch in batches:
            for prefix in prefixes:
                prompts = prompts_of_one_prefix(tokenizer, prefix, suffix, batch)
                contestants = []
                for mode, native in itertools.product(sharing, natives):
                    if native is not None and native.tolerance is not None and mode != "attention":
                        continue  # exact all the same
                    progress(f"{batch} x {prefix} tokens, {mode}: prefill")
                    contestants.append(_prepare(mode, native, network, tokenizer, prompts, prefix, new, memory))
                if peers:
                    for contestant in contestants:
                        _measure_prefix(contestant, tokenizer, prompts[0][:prefix], memory)
                contest.prepare(prompts, prefix)
                progress(f"{batch} x {prefix} tokens: decoding in turn")
                with busy(busy_processes):
                    limits = _race(contestants, contest, ceilings)
                for contestant in contestants:
                    _evaluate(contestant, network, limits, contestants)
                    results.append(asdict(contestant.result))
                for name, figures in contest.results(prefix).items():
                    results.append(asdict(DecodeResult(PEER, name, batch, prefix, suffix, new, **figures)))
                contest.release()
                del contestants, contestant
                gc.collect()  # engines refer to themselves; the next ones need their memory
    report = {"machine": machine | ceilings.best, "results": results}
    return report | {"peers": contest.report()} if peers else report


def _prepare(
    mode: str,
    native: NativeRunner | None,
    network: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    prefix: int,
    new: int,
    memory: int,
) -> _Contestant:
    """An engine whose sequences are all about to decode."""
    runner = native or (RunnerWithoutAttention if mode == BOUND else TransformersRunner)(network)
    sharing = cast(SharingMode, "attention" if mode == BOUND else mode)  # bench_decode has checked it
    settings = EngineOptions(sharing=sharing, memory=memory, max_num_seqs=len(prompts), speculation="off")
    engine = Engine(runner, tokenizer, settings)
    result = DecodeResult(mode, runner.name, len(prompts), prefix, len(prompts[0]) - prefix, new)
    if native is not None:
        said = native.report()
        if said.sparse_weights is not None:
            result.sparse_weights = said.sparse_weights["choice"]
        result.weight_bytes, result.isa = native.weight_bytes, native.isa
        result.batch_invariant = native.batch_invariant
        result.prefix_eps = said.prefix_tolerance["eps"] if said.prefix_tolerance else 0.0
    contestant = _Contestant(result, engine)
    if mode == "off":
        needed = len(prompts) * (len(prompts[0]) + new) * runner.layout.bytes_per_token * 9 // 8
        if needed > memory:
            result.error = f"needs {needed / 1e9:.1f} GB of keys and values; --memory is {memory / 1e9:.1f} GB"
            return contestant
    start = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    queue = [(str(number), {"prompt_token_ids": prompt}) for number, prompt in enumerate(prompts)]
    first = queue[:1] if mode == "off" else queue
    for request_id, prompt in first:
        engine.add_request(request_id, prompt, params)
    while not all(_decodes(s) for request in engine.requests.values() for s in request.sequences):
        engine.step()
    if engine.stats.failed_requests:
        result.error = f"does not fit into --memory of {memory / 1e9:.1f} GB"
        return contestant
    result.prefill_tokens_per_s = engine.stats.computed_tokens / (time.perf_counter() - start)
    if mode == "off":
        _copy_prefix(engine, queue[1:], params, prefix)
    else:
        result.prompt_tokens, result.computed_tokens = sum(map(len, prompts)), engine.stats.computed_tokens
        if runner.layout.state_bytes:
            result.states = sum(len(node.states) for node in engine.tree)
    return contestant


def _measure_prefix(contestant: _Contestant, tokenizer: Any, prefix: list[int], memory: int) -> None:
    """Compute the shared prefix alone, as peers do; in an engine of its own, since this one has it already."""
    if contestant.result.sharing == BOUND or contestant.result.error is not None:
        return
    engine = Engine(contestant.engine.runner, tokenizer, EngineOptions(memory=memory, speculation="off"))
    # another text first: what is set up on first use is not timed
    for tokens in (prefix[-512:][::-1], prefix):
        start = time.perf_counter()
        engine.add_request("prefix", {"prompt_token_ids": tokens}, SamplingParams(temperature=0, max_tokens=1))
        while engine.has_unfinished_requests():
            engine.step()
        contestant.result.prefix_tokens_per_s = len(tokens) / (time.perf_counter() - start)


def _decodes(sequence: Sequence) -> bool:
    return bool(sequence.output_ids)


def _copy_prefix(engine: Engine, queue: list[tuple[str, Any]], params: SamplingParams, prefix: int) -> None:
    """Let further requests begin with copies of the first one's prefix, as if each had computed it."""
    (source,) = next(iter(engine.requests.values())).sequences
    assert source.slot is not None
    engine.slots.reserve(source.slot.bucket.capacity, len(queue))
    for request_id, prompt in queue:
        engine.add_request(request_id, prompt, params)
        (sequence,) = engine.requests[request_id].sequences
        engine.scheduler.waiting.remove(sequence)
        slot = engine.slots.fork(source.slot)
        assert slot is not None
        slot.length = prefix
        sequence.slot, sequence.node, sequence.status = slot, engine.tree.root, Status.RUNNING
        engine.scheduler.active.append(sequence)
    while not all(_decodes(s) for request in engine.requests.values() for s in request.sequences):
        engine.step()


def _race(contestants: list[_Contestant], contest: Contest, ceilings: Ceilings) -> dict[str, float]:
    """Decode in turn, a step each; between them, the peers decode as many steps as were taken since their last turn.

    Returns the machine's ceilings: the best of what was measured before, in the middle and after.
    """
    running = [c for c in contestants if c.result.error is None]
    steps = min((_steps_left(c) for c in running), default=contestants[0].result.new - 1)
    turn = max(1, min(TURN_STEPS, steps // TURNS))
    reached = [ceilings.measure()]
    for number in range(1, steps + 1):
        for contestant in running:
            stats = contestant.engine.stats
            overhead, sampling = stats.overhead_seconds, stats.sampling_seconds
            start = time.perf_counter()
            contestant.engine.step()
            contestant.steps.append(time.perf_counter() - start)
            contestant.overheads.append(stats.overhead_seconds - overhead)
            contestant.samplings.append(stats.sampling_seconds - sampling)
            if isinstance(contestant.engine.runner, NativeRunner):
                contestant.profiles.append(contestant.engine.runner.profile())
                contestant.experts_read.append(contestant.engine.runner.experts_read)
        if number in (steps // 2, steps):
            reached.append(ceilings.measure())
        if number % turn == 0:
            contest.take_turns(turn)
    return best_of(reached)


def _steps_left(contestant: _Contestant) -> int:
    """Steps until the first sequence ends; those whose own tokens were computed first are ahead of the others."""
    sequences = [s for request in contestant.engine.requests.values() for s in request.sequences]
    steps = min(s.tokens_left for s in sequences) - 1
    if len(sequences) < contestant.result.batch or steps <= WARM_UP_STEPS:
        raise ConfigurationError(
            f"new={contestant.result.new} is too few: sequences end before all of them decode; give more"
        )
    return steps


def _evaluate(contestant: _Contestant, network: Any, limits: dict[str, float], others: list[_Contestant]) -> None:
    result, engine = contestant.result, contestant.engine
    if result.error is not None:
        return
    steps = contestant.steps[WARM_UP_STEPS:]
    result.step_ms = statistics.median(steps) * 1e3
    result.step_ms_range = (min(steps) * 1e3, max(steps) * 1e3)
    for other in (each for each in others if each.steps and each.result.isa == result.isa):
        same_sharing = other.result.sharing == result.sharing
        same_weights = other.result.sparse_weights == result.sparse_weights
        same_eps = other.result.prefix_eps == result.prefix_eps
        ratio = statistics.median(theirs / own for theirs, own in zip(other.steps, contestant.steps, strict=True))
        same_bits = other.result.batch_invariant == result.batch_invariant
        if result.batch_invariant and not same_bits and same_sharing and same_weights:
            result.over_variant = ratio
        if not same_bits:
            continue
        if other.result.sharing == "off" and same_weights:
            result.speedup = ratio
        if other.result.sparse_weights == "off" and same_sharing and same_eps and not same_weights:
            result.over_dense = ratio
        if result.prefix_eps and not other.result.prefix_eps and same_sharing and same_weights:
            result.over_exact = ratio
    result.decode_tokens_per_s = result.batch / statistics.median(steps)
    result.engine_ms = statistics.median(contestant.overheads[WARM_UP_STEPS:]) * 1e3
    result.sampling_ms = statistics.median(contestant.samplings[WARM_UP_STEPS:]) * 1e3
    if profiles := contestant.profiles[WARM_UP_STEPS:]:
        result.profile_ms = {kind: statistics.median(each[kind] for each in profiles) * 1e3 for kind in profiles[0]}
    result.prefix_tolerance = engine.runner.report().prefix_tolerance
    if result.sharing == BOUND:
        result.prefill_tokens_per_s = None
        return
    result.kv_bytes, result.kv_bytes_peak = engine.stats.kv_bytes, engine.stats.kv_bytes_peak
    result.ceilings = limits
    read = contestant.experts_read[WARM_UP_STEPS:]
    result.experts_read = statistics.median(read) if any(read) else None
    result.floor_ms = _floor_ms(result, engine, network, limits)
    result.floor_share = result.floor_ms / result.step_ms


def _floor_ms(result: DecodeResult, engine: Engine, network: Any, limits: dict[str, float]) -> float:
    """Weights and keys must be read, products computed; each at the measured ceiling, whichever takes longer.

    The linear layers multiply every weight but those of embeddings with every row; attention multiplies every key
    and value that a row sees. Keys are read once per sequence that attends on its own, shared ones once. Of experts,
    those are read that rows have chosen, or as many as one row chooses where that is not known. States are read and
    written.
    """
    shares = _shares_of_experts(network, result.experts_read)
    flops, read = limits["gemm_gflops"] * 1e9, limits["read_gb_per_s"] * 1e9
    head = network.get_output_embeddings()
    # a tied embedding is the head's weight; others are looked up, not multiplied
    looked_up = {id(each.weight) for each in network.modules() if isinstance(each, nn.Embedding)} - {id(head.weight)}
    floating = [p for p in network.parameters() if id(p) not in looked_up]
    int8 = [m for m in network.modules() if isinstance(m, (Int8Linear, Int8TiedHead, StoredLinear))]
    runner = engine.runner
    packed = runner.report().sparse_weights
    sparse = packed is not None and packed["sparse"] > 0
    width = getattr(torch, runner.float_type).itemsize if isinstance(runner, NativeRunner) else None
    linear = _seconds(floating, result.batch, flops, read, width, shares)
    if int8:
        weights = sum(shares.get(id(m), 1.0) * m.in_features * m.out_features for m in int8)
        operations = 2 * result.batch * weights
        size = sum(shares.get(id(m), 1.0) * _code_bytes(m, sparse) for m in int8)
        linear += max(operations / (limits["int8_gops"] * 1e9), size / read)
    layout = engine.runner.layout
    # the middle of the measured steps
    own = result.suffix + result.new // 2
    seen = result.batch * (result.prefix + own)
    products = seen * sum(2 * engine.runner.num_heads * (x.key_dim + x.value_dim) for x in layout.layers)
    keys = seen if result.sharing == "off" else result.prefix + result.batch * own
    states = 2 * result.batch * layout.state_bytes / read
    return (linear + max(products / flops, keys * layout.bytes_per_token / read) + states) * 1e3


def _shares_of_experts(network: Any, read: float | None) -> dict[int, float]:
    """By id of an expert's layer, or of the tensor of all: the share of them that is read.

    Args:
        network: the model.
        read: experts of all layers that were; otherwise what a row chooses is taken.
    """
    found: list[tuple[nn.Module, int, float]] = []  # the experts of a layer, how many, and how many a row chooses
    for mixture in network.modules():
        experts = getattr(mixture, "experts", None)
        router = next((each for each in mixture.children() if isinstance(getattr(each, "top_k", None), int)), None)
        if isinstance(experts, nn.Module) and router is not None:
            found.append((experts, router.weight.shape[0], router.top_k))
    of_all = None if read is None or not found else read / sum(count for _, count, _ in found)
    shares: dict[int, float] = {}
    for experts, count, chosen in found:
        share = chosen / count if of_all is None else of_all
        shares |= dict.fromkeys(map(id, (*experts.modules(), *experts.parameters())), share)
    return shares


def _seconds(
    weights: list[Any],
    batch: int,
    flops: float,
    read: float,
    width: int | None,
    shares: Mapping[int, float],
) -> float:
    """To multiply these weights with ``batch`` rows, or to read them (``width`` bytes each), whichever takes longer.

    Of some of them only a share.
    """
    numbers = [(shares.get(id(w), 1.0) * w.numel(), width or w.itemsize) for w in weights]
    size = sum(count * each for count, each in numbers)
    return max(2 * batch * sum(count for count, _ in numbers) / flops, size / read)


def _code_bytes(layer: Any, sparse: bool) -> int:
    """Bytes of a layer's codes, as they are read at least; of blocks with their scales."""
    if isinstance(layer, StoredLinear):
        return layer.stored.nbytes
    if sparse and isinstance(layer, SparseInt8Linear):
        return int(layer.weight_codes.nbytes + layer.weight_mask.nbytes)
    return int(layer.in_features * layer.out_features)
