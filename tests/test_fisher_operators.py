"""Gradient stores, inverse Fisher matrices and sliding windows against dense matrices in fp64."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fisher_matrices import dense, error, gradients
from gossamer.errors import ConfigurationError
from gossamer.operators import fisher_plan
from gossamer.operators.fisher_plan import plan_fisher
from gossamer.operators.fisher_solvers import FisherBlocks
from gossamer.operators.gradient_store import GradientStore
from gossamer.operators.inverse_fisher import InverseFisher
from gossamer.operators.sliding_fisher import SlidingFisher

DAMPINGS = [1e-8, 1e-4, 1.0, 1e2]


@settings(max_examples=80, deadline=None)
@given(
    m=st.sampled_from([1, 2, 5, 16, 40]),
    d=st.sampled_from([1, 2, 7, 16, 33, 100]),
    kind=st.sampled_from(["plain", "low rank", "duplicates", "zeros"]),
    damping=st.sampled_from(DAMPINGS),
    block=st.sampled_from([None, 1, 3, 16, 50]),
    solver=st.sampled_from(["auto", "dual", "primal"]),
    seed=st.integers(0, 1000),
)
def test_inverse_is_the_dense_one(
    m: int, d: int, kind: str, damping: float, block: int | None, solver: Any, seed: int
) -> None:
    rows = gradients(m, d, kind, seed)
    structure: dict[str, Any] = {} if block is None else {"structure": "block", "block_size": block}
    inverse = InverseFisher(rows, damping, solver=solver, **structure)
    matrix = dense(rows, damping, block)
    exact = torch.linalg.inv(matrix)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(d, 3, generator=generator, dtype=torch.float64)
    assert inverse.jitter == 0 and inverse.shape == (d, d)
    assert error(inverse @ x, exact @ x) < 1e-6
    inside = rows[0].double()  # a gradient itself: where most of 1 / damping cancels
    if inside.any():  # neither is the dense solution more exact than fp64 times the condition of F
        bound = 1e-6 + 1e-15 * float(torch.linalg.cond(matrix))
        assert error(inverse @ inside, torch.linalg.solve(matrix, inside)) < bound
    assert (inverse.mv(x[:, 0].float()) - (exact @ x[:, 0]).float()).norm() < 1e-6 * (exact @ x[:, 0]).norm()
    assert error(inverse.diag(), exact.diagonal()) < 1e-6
    index = torch.randperm(d, generator=generator)[:5]
    assert error(inverse.block(index), exact[index[:, None], index]) < 1e-6
    i, j = int(index[0]), int(index[-1])
    assert abs(inverse.elem(i, j) - float(exact[i, j])) < 1e-6 * float(exact[i, i].clamp(min=exact[j, j]))
    inverse.precompute()
    assert error(inverse.block(index), exact[index[:, None], index]) < 1e-6
    assert math.isclose(inverse.quad(x[:, 0]), float(x[:, 0] @ exact @ x[:, 0]), rel_tol=1e-6)
    assert math.isclose(inverse.logdet(), float(torch.logdet(matrix)), rel_tol=1e-6, abs_tol=1e-6)
    inverse.update_damping(3.0)
    assert error(inverse @ x, torch.linalg.solve(dense(rows, 3.0, block), x)) < 1e-6


def test_blocks_summed_up_without_storing_gradients_give_the_same() -> None:
    rows = gradients(30, 50, "plain", 0)
    sums = FisherBlocks(50, 8)
    sums.add(rows[:10])
    for row in rows[10:]:
        sums.add(row)
    streamed = InverseFisher(sums, relative_damping=0.1)
    stored = InverseFisher(rows, relative_damping=0.1, structure="block", block_size=8)
    x = torch.randn(50, dtype=torch.float64)
    assert math.isclose(streamed.damping, stored.damping) and streamed.plan.store_bytes == 0
    assert torch.allclose(streamed @ x, stored @ x) and torch.allclose(streamed.diag(), stored.diag())
    halves = FisherBlocks(50, 8, torch.float32)
    halves.add(rows)
    assert error(InverseFisher(halves, relative_damping=0.1) @ x, stored @ x) < 1e-5
    with pytest.raises(ConfigurationError, match="has NaN or infinite entries"):
        sums.add(torch.full((50,), torch.nan))
    assert sums.count == 30
    with pytest.raises(ConfigurationError, match="expected, got 51"):
        sums.add(torch.zeros(51))


def test_relative_damping_is_a_multiple_of_the_mean_square() -> None:
    rows = gradients(7, 30, "plain", 1)
    inverse = InverseFisher(rows, relative_damping=0.5)
    assert math.isclose(inverse.damping, 0.5 * float(rows.double().square().mean(0).mean()), rel_tol=1e-12)


def test_without_damping_a_singular_matrix_gets_some_and_says_so() -> None:
    rows = gradients(5, 20, "plain", 2)
    with pytest.warns(UserWarning, match="has no inverse"):
        inverse = InverseFisher(rows, 0.0)
    assert 0 < inverse.jitter == inverse.damping < 1e-6
    assert error(inverse @ rows[0].double(), torch.linalg.solve(dense(rows, inverse.damping), rows[0].double())) < 1e-3
    full = gradients(40, 6, "plain", 2)
    assert InverseFisher(full, 0.0).jitter == 0  # of full rank: nothing is needed
    with pytest.raises(ConfigurationError, match="all gradients are zero"):
        InverseFisher(torch.zeros(3, 9), 0.0)
    assert torch.allclose(InverseFisher(torch.zeros(3, 9), 2.0) @ torch.ones(9), torch.full((9,), 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"damping": -1.0}, "damping must be"),
        ({"damping": math.nan}, "damping must be"),
        ({}, "either damping or relative_damping"),
        ({"damping": 1.0, "relative_damping": 1.0}, "either damping or relative_damping"),
        ({"damping": 1.0, "structure": "block"}, "needs a block_size"),
        ({"damping": 1.0, "block_size": 4}, "needs a block_size"),
        ({"damping": 1.0, "structure": "block", "block_size": 0}, "at least 1"),
        ({"damping": 1.0, "structure": "diagonal"}, "structure is"),
        ({"damping": 1.0, "solver": "cg"}, "solver"),
    ],
)
def test_wrong_settings_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        InverseFisher(torch.ones(2, 5), **arguments)


def test_wrong_vectors_and_indices_are_named() -> None:
    inverse = InverseFisher(torch.ones(2, 5), 1.0)
    for x in (torch.ones(4), torch.ones(5, dtype=torch.int64), torch.ones(1, 5, 1)):
        with pytest.raises(ConfigurationError, match="F has 5 columns"):
            inverse @ x
    with pytest.raises(ConfigurationError, match="from 0 to 4"):
        inverse.elem(0, 5)
    with pytest.raises(ConfigurationError, match="at least one each"):
        InverseFisher(torch.ones(5), 1.0)
    with pytest.raises(ConfigurationError, match="NaN or infinite"):
        InverseFisher(torch.tensor([[1.0, math.inf]]), 1.0)
    with pytest.raises(ConfigurationError, match="no gradients yet"):
        InverseFisher(GradientStore(2, 3), 1.0)


# --- the store -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 90), d=st.sampled_from([1, 3, 100, 70_000]), dtype=st.sampled_from([torch.float32, torch.bfloat16])
)
def test_products_of_a_store(m: int, d: int, dtype: torch.dtype) -> None:
    rows = gradients(m, d, "plain", m).to(dtype)
    store = GradientStore(m, d, dtype)
    for row in rows:
        store.append(row)
    wide = rows.double()
    assert torch.allclose(store.gram(), wide @ wide.T)
    assert torch.allclose(store @ torch.ones(d), wide.sum(1))
    assert torch.allclose(store.T @ torch.ones(m, 2), wide.sum(0)[:, None].expand(-1, 2))
    store.replace(m - 1, torch.ones(d))
    wide[m - 1] = 1
    assert torch.allclose(store.gram(), wide @ wide.T)
    assert torch.equal(store.columns([d - 1]), wide[:, [d - 1]])


def test_a_store_in_a_file(tmp_path: Path) -> None:
    store = GradientStore(3, 1000, memmap=tmp_path / "gradients")
    rows = gradients(3, 1000, "plain", 0)
    for row in rows:
        store.append(row)
    assert (tmp_path / "gradients").stat().st_size == 12_000
    x = torch.ones(1000)
    assert torch.equal(InverseFisher(store, 0.1) @ x, InverseFisher(rows, 0.1) @ x)


def test_bad_gradients_change_nothing() -> None:
    store = GradientStore(2, 3)
    store.append({"a": torch.ones(2), "b": torch.ones(1)})
    cases: list[tuple[Any, str]] = [
        ({"weight": torch.tensor([1.0, math.nan]), "b": torch.ones(1)}, "gradient of weight has NaN"),
        ([torch.ones(2), torch.tensor([math.inf])], "part 1 of the gradient has NaN"),
        (torch.ones(4), "3 numbers is expected, got 4"),
    ]
    for bad, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            store.append(bad)
        with pytest.raises(ConfigurationError, match=message):
            store.replace(0, bad)
    assert len(store) == 1 and torch.equal(store.rows, torch.ones(1, 3))
    store.append(torch.full((3,), 3e38))  # whose sum is infinite
    with pytest.raises(ConfigurationError, match="holds 2 gradients already"):
        store.append(torch.ones(3))
    with pytest.raises(ConfigurationError, match="not among the 2"):
        store.replace(2, torch.ones(3))


def test_more_memory_than_there_is_is_refused_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fisher_plan, "available_memory", lambda: 10_000_000)
    with pytest.raises(ConfigurationError, match=r"100 gradients of 1,000,000 numbers take 400.0 MB.*10.0 MB"):
        GradientStore(100, 1_000_000)
    with pytest.raises(ConfigurationError, match=r"10 gradients.*400.0 MB"):
        SlidingFisher([(10_000_000,)], 10, 1.0)
    with pytest.raises(ConfigurationError, match="structure='block'"):
        InverseFisher(torch.ones(2000, 2), 1.0, solver="dual")


def test_plans_choose_the_smaller_matrices() -> None:
    assert plan_fisher(256, 100_000).solver == "dual"
    assert plan_fisher(256, 100).solver == "primal"
    plan = plan_fisher(64, 1000, structure="block", block_size=16)
    assert (plan.solver, plan.factor_bytes) == ("primal", 63 * 16 * 16 * 8)
    assert plan.seconds(gflops=1.0) == plan.gigaflops and plan.seconds() > 0
    with pytest.raises(ConfigurationError, match="streaming keeps none"):
        plan_fisher(4, 100, structure="block", block_size=50, streaming=True, solver="dual")


# --- the window ------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    window=st.sampled_from([1, 2, 5, 8]),
    pushes=st.integers(1, 27),
    damping=st.sampled_from(DAMPINGS),
    beta=st.sampled_from([None, 0.0, 0.5, 0.9]),
    scale=st.sampled_from(["filled", "window"]),
    seed=st.integers(0, 100),
)
def test_window_is_what_a_new_one_would_be(
    window: int, pushes: int, damping: float, beta: float | None, scale: Any, seed: int
) -> None:
    rows = gradients(pushes, 12, "plain", seed)
    fisher = SlidingFisher([(2, 3), (6,)], window, damping, scale=scale)
    for row in rows:
        fisher.push([row[:6].reshape(2, 3), row[6:]])
    kept = rows[-window:].double()
    n = window if scale == "window" else len(kept)
    matrix = kept.T @ kept / n + damping * torch.eye(12, dtype=torch.float64)
    powers = (0.0 if beta is None else beta) ** torch.arange(len(kept) - 1, -1, -1, dtype=torch.float64)
    x = kept.T @ (powers / powers.sum())
    expected = torch.linalg.solve(matrix, x)
    parts = fisher.natural_gradient(None if beta is None else fisher.ema_weights(beta))
    found = torch.cat([part.reshape(-1) for part in parts]).double()
    assert parts[0].shape == (2, 3) and error(found, expected) < 1e-5
    quadratic, length = fisher.curvature()
    assert math.isclose(quadratic, float(expected @ matrix @ expected), rel_tol=1e-5)
    assert math.isclose(length, float(expected.norm()), rel_tol=1e-5)
    if damping >= 1:
        foreign = torch.randn(12, generator=torch.Generator().manual_seed(seed))
        assert error(fisher.mv(foreign), torch.linalg.solve(matrix, foreign.double())) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_window_goes_on_after_a_pause_as_if_there_had_been_none(dtype: torch.dtype, tmp_path: Path) -> None:
    rows = gradients(20, 9, "plain", 4)
    one = SlidingFisher([(9,)], 6, 1e-3, dtype=dtype)
    for row in rows[:10]:
        one.push(row)
    torch.save(one.state_dict(), tmp_path / "state")
    other = SlidingFisher([(9,)], 6, 5.0, dtype=dtype)
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for row in rows[10:]:
        assert one.push(row) == other.push(row)
        assert torch.equal(one.natural_gradient()[0], other.natural_gradient()[0])
    with pytest.raises(ConfigurationError, match="gradients of"):
        SlidingFisher([(9,)], 7, 1e-3, dtype=dtype).load_state_dict(one.state_dict())


def test_bad_pushes_change_nothing() -> None:
    fisher = SlidingFisher([(2,), (1,)], 3, 1.0)
    with pytest.raises(ConfigurationError, match="no gradient was pushed"):
        fisher.natural_gradient()
    fisher.push([torch.ones(2), torch.ones(1)])
    before = copy.deepcopy(fisher.state_dict())
    for bad, message in (
        ([torch.ones(2), torch.tensor([math.nan])], "part 1"),
        ([torch.full((2,), 1e19), torch.ones(1)], "part 0 of the gradient is longer than 1e"),
        ([torch.ones(2)], "3 numbers is expected, got 2"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            fisher.push(bad)
    assert all(
        torch.equal(value, before[key]) if isinstance(value, Tensor) else value == before[key]
        for key, value in fisher.state_dict().items()
    )
    cases: list[tuple[dict[str, Any], str]] = [
        ({"window": 0}, "at least one number"),
        ({"damping": 0.0}, "damping must be"),
        ({"dtype": torch.float16}, "float32 or bfloat16"),
        ({"scale": "all"}, "scale is"),
    ]
    for arguments, message in cases:
        with pytest.raises(ConfigurationError, match=message):
            SlidingFisher([(2,)], **({"window": 2, "damping": 1.0} | arguments))
    fisher.push([torch.zeros(2), torch.zeros(1)])
    assert not any(part.any() for part in fisher.natural_gradient())  # a zero gradient has a zero product
