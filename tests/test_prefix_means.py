"""Attention to long shared prefixes within a tolerance: the kernel, its parts, and the engine around it."""

from __future__ import annotations

import gc
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from architectures import make_model
from gossamer.engine.engine import Engine
from gossamer.engine.tree import Node
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import core, instruction_sets
from gossamer.llm import LLM
from gossamer.options import EngineOptions, RunnerOptions
from gossamer.report.prefix_tolerance import ToleranceQuality, evaluate_tolerance
from gossamer.runners.native import NativeRunner
from gossamer.runners.tolerance import BLOCK, LEAST_KEYS, NodeMeans, PrefixTolerance, near_together
from gossamer.runners.transformers import IMPLEMENTATION
from gossamer.sampling_params import SamplingParams
from gossamer.texts import reference_text, token_windows
from test_exactness import NumberTokenizer

needs_native = pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
ISAS = instruction_sets()
GROUP = 3
TINY_CONTEXT = 1200


def attend_within(
    isa: str, q: Tensor, means: NodeMeans, head: int, n: int, *, threshold: float, gain: float, check: int
) -> tuple[Tensor, Tensor, np.ndarray]:
    """Output (tokens, GROUP, D), log-sum-exp (tokens, GROUP) and report of one layer's head."""
    tokens, heads, dim = q.shape
    library = core()
    assert library is not None
    keys, values, mean_keys, mean_values, spread = (t[0, head] for t in means.tensors)
    order, positions = torch.arange(tokens, dtype=torch.int32), torch.full((tokens,), n + 2)
    out, state = torch.full((tokens, heads, dim), 7.0), torch.full((tokens, heads, 2), 7.0)
    report = np.zeros(7)
    library.attend_within(
        isa, str(keys.dtype).removeprefix("torch."), dim, q.data_ptr(), heads * dim, order.data_ptr(),
        positions.data_ptr(), tokens, GROUP, GROUP * head, keys.data_ptr(), values.data_ptr(), n,
        out[:, GROUP * head :].data_ptr(), state[:, GROUP * head :].data_ptr(), heads, mean_keys.data_ptr(),
        mean_values.data_ptr(), spread.data_ptr(), n // BLOCK, threshold, gain, check, report.ctypes.data,
    )  # fmt: skip
    mine, state = out[:, GROUP * head :][:, :GROUP], state[:, GROUP * head :][:, :GROUP]
    return mine / state[..., 1:], (state[..., 0] + state[..., 1].log2()) * math.log(2), report


def node_of(keys: Tensor, values: Tensor) -> Node:
    node = Node(list(range(keys.shape[1])), Node([], None))
    node.hold([keys], [values])
    return node


def points(heads: int, n: int, dim: int) -> Tensor:
    """Around some centres, as keys are."""
    centres = 2 * torch.randn(heads, 12, dim)
    return centres[:, torch.randint(12, (n,))] + 0.3 * torch.randn(heads, n, dim)


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("type_", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    dim=st.sampled_from([6, 32, 64, 80, 256]),
    tokens=st.integers(1, 20),
    n=st.sampled_from([32, 33, 64, 95, 600, 1100, 2080]),
    threshold=st.sampled_from([1e-6, 0.01, 0.05, 0.3, 2.0]),
    gain=st.sampled_from([0.0, 1.5]),
    seed=st.integers(0, 2**32),
)
def test_kernel(
    isa: str, type_: torch.dtype, dim: int, tokens: int, n: int, threshold: float, gain: float, seed: int
) -> None:
    """The same as choosing and adding up in fp64; blocks whose share is at the threshold may go either way."""
    torch.manual_seed(seed)
    heads, head = 2, 1
    keys, values = points(heads, n, dim).to(type_), torch.randn(heads, n, dim).to(type_)
    means = NodeMeans(node_of(keys, values), 0.1)
    q = (torch.randn(tokens, heads * GROUP, dim) / math.log(2) / math.sqrt(dim)).to(type_)
    check = seed % 5
    out, lse, report = attend_within(isa, q, means, head, n, threshold=threshold, gain=gain, check=check)

    k, v, mean_k, mean_v, spread = (t[0, head].double() for t in means.tensors)
    rows = q[:, GROUP * head :][:, :GROUP].reshape(-1, dim).double()
    scores, blocks = rows @ k.T * math.log(2), n // BLOCK
    mean_scores = rows @ mean_k.T * math.log(2)
    natural = rows * math.log(2)
    shares = (mean_scores + natural.square().sum(1, keepdim=True) * spread[:blocks] / 2).softmax(1)
    taken = report[0] / (len(rows) * n)
    assert report[1] == len(rows) * n
    assert 0 < taken <= 1
    # rows are multiplied together in tiles, each of which chooses for itself
    tile = 8 if isa.startswith("avx512") else 4
    tiles = -(-len(rows) // tile)
    edges = [len(rows) * t // tiles for t in range(tiles + 1)]
    mean_square = torch.cat([shares[a:b].square().mean(0).sqrt().expand(b - a, -1) for a, b in pairwise(edges)])
    if ((mean_square / threshold - 1).abs() > 2e-2).all():
        chosen = mean_square > threshold
        chosen[:, 0] = True
        weight = mean_scores + math.log(BLOCK) + gain * math.log(2)
        weight = weight.masked_fill(chosen, -torch.inf)
        rest = torch.ones(len(rows), n - blocks * BLOCK, dtype=torch.bool)
        per_key = torch.cat([chosen.repeat_interleave(BLOCK, 1), rest], 1)
        together = torch.cat([scores.masked_fill(~per_key, -torch.inf), weight], 1)
        expected = together.softmax(1) @ torch.cat([v, mean_v])
        assert (out.reshape(-1, dim) - expected).abs().max() < (1e-4 if type_ == torch.float32 else 3e-2)
        assert (lse.flatten() - together.logsumexp(1)).abs().max() < (1e-4 if type_ == torch.float32 else 4e-3)
        assert report[0] == per_key.sum()
    # what is reported of the token that was checked
    exact, exact_lse = scores.softmax(1) @ v, scores.logsumexp(1)
    some = slice(check % tokens * GROUP, (check % tokens + 1) * GROUP)
    off = (out.reshape(-1, dim)[some] - exact[some]).square().sum()
    off_lse = (lse.flatten()[some] - exact_lse[some]).square().sum()
    tolerance = 1e-4 if type_ == torch.float32 else 3e-2
    assert report[2] == pytest.approx(float(off), rel=0.1, abs=tolerance)
    assert report[3] == pytest.approx(float(off_lse), rel=0.1, abs=tolerance)
    assert report[4] == GROUP
    if threshold <= 1e-6 and type_ == torch.float32:  # means stand for next to nothing
        assert (out.reshape(-1, dim) - exact).abs().max() < 1e-3


@settings(max_examples=30, deadline=None)
@given(n=st.sampled_from([32, 40, 64, 96, 1000]), heads=st.integers(1, 3), seed=st.integers(0, 2**32))
def test_order_keeps_every_key_and_the_ends(n: int, heads: int, seed: int) -> None:
    torch.manual_seed(seed)
    order = near_together(torch.randn(heads, n, 8), BLOCK)
    assert (order.sort(1).values == torch.arange(n)).all()
    ends = [*range(BLOCK), *range(n // BLOCK * BLOCK, n)]
    assert (order[:, ends] == torch.tensor(ends)).all()


def test_near_keys_stand_together() -> None:
    torch.manual_seed(0)
    keys = points(2, 1024, 16)
    found = keys.gather(1, near_together(keys, BLOCK)[..., None].expand(-1, -1, 16))

    def spread(k: Tensor) -> float:
        parts = k[:, BLOCK:].unflatten(1, (-1, BLOCK))
        return float((parts - parts.mean(2, keepdim=True)).square().mean())

    assert spread(found) < spread(keys) / 4


def test_threshold_follows_the_error() -> None:
    """Errors above the tolerance lower it, errors below raise it, and a head that needs its keys becomes exact."""
    torch.manual_seed(0)
    means = NodeMeans(node_of(points(3, 1024, 8), torch.randn(3, 1024, 8)), eps=0.1)
    before = means.control[..., 0].copy()
    for _ in range(40):
        threshold = means.control[0, :, 0]
        report = np.zeros((1, 3, 7))
        report[..., 1] = 1000
        # the first head's error is its threshold, the second's ten times that, and the third needs most keys
        report[0, :, 0] = [100, 100, 900]
        report[0, :, 2] = means.variance[0] * np.array([1, 100, 1]) * threshold**2 * 6
        report[..., 4], report[..., 5], report[..., 6] = 6, 0.5, 0.25
        report[0, threshold == 0, 2:] = 0
        means.learn(report)
    first, second, third = means.control[0, :, 0]
    assert third == 0 and (before > 0).all()
    assert first == pytest.approx(0.07, rel=0.3) and second == pytest.approx(0.007, rel=0.3)
    assert means.control[0, 0, 1] != 0  # the means' weight follows what they stand for


def test_the_gain_doubles_what_means_weigh() -> None:
    means = NodeMeans(node_of(torch.randn(1, 1024, 8), torch.randn(1, 1024, 8)), eps=0.1)
    report = np.zeros((1, 1, 7))
    report[..., 0], report[..., 1], report[..., 4] = 100, 1000, 4
    report[..., 5], report[..., 6] = 2.0, 1.0  # twice the weight that they were given
    means.learn(report)
    assert means.control[0, 0, 1] == pytest.approx(1.0)


def engine(eps: float, **changes: Any) -> Engine:
    torch.manual_seed(0)
    model = make_model("llama", max_position_embeddings=4096)
    model.set_attn_implementation(IMPLEMENTATION)
    runner = NativeRunner(model, RunnerOptions(prefix_eps=eps), max_rows=2048, threads=2)
    return Engine(runner, NumberTokenizer(), EngineOptions(max_num_batched_tokens=2048, **changes))


def tolerance_of(engine: Engine) -> PrefixTolerance:
    assert isinstance(engine.runner, NativeRunner) and engine.runner.tolerance is not None
    return engine.runner.tolerance


def decode(engine: Engine, prompts: list[list[int]], new: int = 12) -> dict[str, list[int]]:
    params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, params)
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            assert output.error is None
            found[output.request_id] = output.outputs[0].token_ids
    return found


@needs_native
class TestEngine:
    """A small model of random weights, whose keys are nowhere near each other: errors come seldom, and large."""

    def prompts(self, length: int, count: int = 6) -> list[list[int]]:
        torch.manual_seed(1)
        prefix = torch.randint(1, 90, (length,)).tolist()
        return [[*prefix, 1 + i, 2 + i] for i in range(count)]

    def test_long_prefixes_are_attended_to_within_it(self) -> None:
        within = engine(0.1)
        decode(within, self.prompts(LEAST_KEYS + 100), new=60)
        summary = tolerance_of(within).summary()
        assert summary["prefixes"] == 1 and summary["steps"] > 5
        assert 0 < summary["computed"] <= 1 and summary["error"] < 2 * summary["eps"]
        assert summary["bytes"] > 0

    def test_short_prefixes_single_sequences_and_zero_are_exact(self) -> None:
        exact = engine(0.0)
        assert isinstance(exact.runner, NativeRunner) and exact.runner.tolerance is None
        for length, count in ((LEAST_KEYS - 100, 6), (LEAST_KEYS + 100, 1)):
            within = engine(0.05)
            prompts = self.prompts(length, count)
            assert decode(within, prompts) == decode(engine(0.0), prompts)
            assert tolerance_of(within).summary()["steps"] == 0

    def test_the_same_twice(self) -> None:
        """Without drafts, of which measured time decides how many are verified."""
        prompts = self.prompts(LEAST_KEYS + 300)
        assert decode(engine(0.2, speculation="off"), prompts) == decode(engine(0.2, speculation="off"), prompts)

    def test_a_split_prefix_gets_new_means(self) -> None:
        within = engine(0.05)
        prompts = self.prompts(2 * LEAST_KEYS + 200)
        decode(within, prompts)
        shorter = [[*prompt[: LEAST_KEYS + 50], 95, i] for i, prompt in enumerate(prompts, start=3)]
        decode(within, [*shorter, *prompts])
        tolerance = tolerance_of(within)
        assert tolerance.summary()["prefixes"] >= 2

    def test_evicted_prefixes_leave_their_figures_only(self) -> None:
        within = engine(0.05)
        decode(within, self.prompts(LEAST_KEYS + 100))
        tolerance = tolerance_of(within)
        before = tolerance.summary()
        within.tree.evict(within.budget.total)
        gc.collect()
        after = tolerance.summary()
        assert before["bytes"] > 0 and after == before | {"bytes": 0}


@pytest.mark.parametrize(
    ("eps", "runner", "kv_dtype", "part"),
    [
        (-0.1, "auto", "auto", "less than 1"),
        (1.0, "auto", "auto", "less than 1"),
        (math.nan, "auto", "auto", "less than 1"),
        (0.1, "transformers", "auto", "native"),
        (0.1, "auto", "int8", "bfloat16"),
    ],
)
def test_bad_tolerances(eps: float, runner: str, kv_dtype: str, part: str) -> None:
    with pytest.raises(ConfigurationError, match=part):
        RunnerOptions(runner, kv_dtype, prefix_eps=eps)  # type: ignore[arg-type]  # wrong on purpose


@needs_native
class TestEvaluation:
    """``gossamer eval --prefix-eps``."""

    def evaluate(self, model: Path, count: int) -> tuple[ToleranceQuality, LLM, LLM, list[Tensor]]:
        within, exact = (LLM(model, prefix_eps=eps, max_num_batched_tokens=256, max_num_seqs=2) for eps in (0.05, 0))
        windows = token_windows(within.tokenizer, reference_text(), LEAST_KEYS + 96, count)
        quality = evaluate_tolerance(within, exact, windows, continuation=64)
        assert quality.tokens == 64 * count and quality.tolerance["prefixes"] == count
        assert quality.perplexity_ratio == pytest.approx(quality.perplexity / quality.exact_perplexity)
        return quality, within, exact, windows

    def test_windows_are_scored_with_and_without(self, tiny: Path) -> None:
        quality, within, exact, windows = self.evaluate(tiny, 2)
        assert quality.perplexity_ratio != 1.0
        with pytest.raises(ConfigurationError, match="leaves 6 for the prefix"):
            evaluate_tolerance(within, exact, [windows[0][:70]], continuation=64)
        with pytest.raises(ConfigurationError, match="without a tolerance"):
            evaluate_tolerance(exact, exact, windows)

    def test_a_real_model_loses_little(self, smollm2_path: Path) -> None:
        quality, *_ = self.evaluate(smollm2_path, 1)
        assert 0.9 < quality.perplexity_ratio < 1.1 and quality.perplexity_ratio != 1.0
