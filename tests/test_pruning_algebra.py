"""What pruning rests on: quadratic forms, the best step under a mask, and patterns."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from gossamer.errors import ConfigurationError
from gossamer.operators.gradient_store import GradientStore
from gossamer.operators.inverse_fisher import FisherBlocks, InverseFisher
from gossamer.pruning import (
    NM,
    Block,
    Magnitude,
    Pruner,
    Unstructured,
)
from gossamer.pruning.patterns import parse_pattern, subset_costs
from gossamer.pruning.quadratic import Diagonal, FisherForm, SharedGram


def dense_fisher(gradients: torch.Tensor, damping: float, block: int) -> torch.Tensor:
    m, d = gradients.shape
    full = gradients.double().T @ gradients.double() / m + damping * torch.eye(d, dtype=torch.float64)
    groups = torch.arange(d) // block
    return full * (groups[:, None] == groups)


def best_step(matrix: torch.Tensor, w: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """Minimizes 1/2 s^T F s under s_Q = -w_Q."""
    step = -w.double()
    if keep.any():
        right = matrix[keep][:, ~keep] @ w.double()[~keep]
        step[keep] = torch.linalg.solve(matrix[keep][:, keep], right)
    return step


class TestInverseFisher:
    @settings(max_examples=60, deadline=None)
    @given(
        m=st.integers(1, 12),
        groups=st.integers(1, 6),
        size=st.integers(1, 4),
        kind=st.sampled_from(["full", "block", "streaming", "one"]),
        damping=st.sampled_from([1e-3, 1e-1, 10.0]),
        share=st.floats(0, 1),
        seed=st.integers(0, 10**6),
    )
    def test_joint_step_blocks_and_curvature_equal_the_dense_matrix(
        self, m: int, groups: int, size: int, kind: str, damping: float, share: float, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        d = groups * size * 2
        gradients = torch.randn(m, d, generator=generator)
        block = {"full": d, "block": 2 * size, "streaming": 2 * size, "one": 2 * size}[kind]
        if kind == "streaming":
            sums = FisherBlocks(d, block)
            sums.add(gradients)
            inverse = InverseFisher(sums, damping)
        elif kind == "full":
            inverse = InverseFisher(gradients, damping)
        else:
            store = GradientStore.of(gradients)
            solver = "dual" if kind == "block" else "primal"
            inverse = InverseFisher(store, damping, structure="block", block_size=block, solver=solver)
        matrix = dense_fisher(gradients, damping, block)
        w = torch.randn(d, generator=generator, dtype=torch.float64)
        keep = torch.rand(d, generator=generator) > share
        step, wanted = inverse.joint_step(w, keep), best_step(matrix, w, keep)
        assert torch.allclose(step, wanted, rtol=1e-7, atol=1e-7 * float(w.abs().max()))
        assert torch.equal((w + step)[~keep], torch.zeros(int((~keep).sum()), dtype=torch.float64))
        assert inverse.curvature(w) == pytest.approx(float(w @ matrix @ w), rel=1e-9)
        full = torch.linalg.inv(matrix)
        cut = torch.stack([full[i : i + size, i : i + size] for i in range(0, d, size)])
        assert torch.allclose(inverse.diagonal_blocks(size), cut, rtol=1e-6, atol=1e-9 * float(full.abs().max()))

    def test_squares_that_do_not_divide_are_refused(self) -> None:
        inverse = InverseFisher(torch.randn(3, 10), 1.0)
        with pytest.raises(ConfigurationError, match="squares of 4 do not divide 10"):
            inverse.diagonal_blocks(4)
        with pytest.raises(ConfigurationError, match="a mask of 10 entries"):
            inverse.joint_step(torch.randn(10), torch.ones(9, dtype=torch.bool))


class TestQuadratic:
    @pytest.mark.parametrize("seed", range(5))
    def test_a_shared_gram_gives_each_row_its_least_squares(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(40, 12, generator=generator, dtype=torch.float64)
        matrix = x.T @ x / 40 + 0.01 * torch.eye(12, dtype=torch.float64)
        form, weight = SharedGram(matrix), torch.randn(7, 12, generator=generator)
        keep = torch.rand(7, 12, generator=generator) > torch.linspace(0, 1, 7)[:, None]  # rows from full to empty
        found = form.joint(weight, keep)
        for row in range(7):
            wanted = weight[row].double() + best_step(matrix, weight[row], keep[row])
            assert torch.allclose(found[row].double(), wanted, rtol=1e-4, atol=1e-4)
            assert torch.equal(found[row] != 0, keep[row])
        one_by_one = form._one_by_one(weight, keep)
        assert torch.allclose(found, one_by_one, atol=1e-4)
        assert form.cost(found - weight) <= form.cost(one_by_one - weight) * (1 + 1e-6)

    @pytest.mark.parametrize("seed", range(3))
    def test_joint_costs_least(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        weight, keep = torch.randn(6, 8, generator=generator), torch.rand(6, 8, generator=generator) > 0.5
        x = torch.randn(30, 8, generator=generator, dtype=torch.float64)
        forms = [
            Diagonal(torch.rand(6, 8, generator=generator) + 0.1, (6, 8)),
            SharedGram(x.T @ x / 30 + 0.01 * torch.eye(8)),
            FisherForm(InverseFisher(torch.randn(5, 48, generator=generator), 0.01), (6, 8)),
            FisherForm(
                InverseFisher(torch.randn(50, 48, generator=generator), 0.01, structure="block", block_size=8), (6, 8)
            ),
        ]
        for form in forms:
            joint = form.cost(form.joint(weight, keep) - weight)
            assert joint <= form.cost(form.independent(weight, keep) - weight) * (1 + 1e-5)
            assert joint <= form.cost(weight * keep - weight) * (1 + 1e-5)

    def test_rows_that_do_not_converge_are_solved_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gossamer.pruning.quadratic._MOST_STEPS", 1)
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(100, 20, generator=generator, dtype=torch.float64) * torch.logspace(-3, 3, 20)
        matrix = x.T @ x / 100 + 1e-9 * torch.eye(20)
        form, weight = SharedGram(matrix), torch.randn(5, 20, generator=generator)
        keep = torch.rand(5, 20, generator=generator) > 0.5
        found = form.joint(weight, keep)
        assert torch.allclose(found, form._one_by_one(weight, keep), rtol=1e-4)

    @pytest.mark.parametrize(
        "pattern", [Unstructured("layer"), Unstructured("row"), NM(2, 4), Block(4, "layer")], ids=str
    )
    def test_a_searched_mask_costs_less_than_one_chosen_weight_by_weight(self, pattern: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(300, 32, generator=generator) @ torch.randn(32, 32, generator=generator)  # related inputs
        matrix = (x.T @ x / 300).double() + 0.1 * torch.eye(32)
        weight = torch.randn(24, 32, generator=generator)
        costs = []
        for rounds in (0, 30):
            form = SharedGram(matrix, rounds)
            keep = form.choose(weight, pattern, 0.5)
            assert float(keep.float().mean()) == 0.5
            costs.append(form.cost(form.joint(weight, keep) - weight))
        assert costs[1] < 0.9 * costs[0]

    def test_one_pruned_weight_costs_what_its_saliency_says(self) -> None:
        """And the joint update is the independent one then."""
        form = FisherForm(InverseFisher(torch.randn(5, 12), 0.1), (3, 4))
        weight = torch.randn(3, 4)
        costs = subset_costs(weight, form.inverse_blocks(1), Unstructured())
        for row in range(3):
            for column in range(4):
                keep = torch.ones(3, 4, dtype=torch.bool)
                keep[row, column] = False
                new = form.joint(weight, keep)
                assert torch.allclose(new, form.independent(weight, keep), atol=1e-5)
                assert form.cost(new - weight) == pytest.approx(float(costs[row, column, 0]), rel=1e-3)


class TestPatterns:
    @pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), Block(4), Block(2)])
    @pytest.mark.parametrize("shared", [False, True])
    def test_costs_are_the_least_losses(self, pattern: Any, shared: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        gradients = torch.randn(20, 8 if shared else 24, generator=generator)
        weight = torch.randn(3, 8, generator=generator)
        if shared:
            matrix = dense_fisher(gradients, 0.1, 8)
            form: Any = SharedGram(matrix)
        else:
            matrix = dense_fisher(gradients, 0.1, 24)
            form = FisherForm(InverseFisher(gradients, 0.1), (3, 8))
        costs = subset_costs(weight, form.inverse_blocks(pattern.size), pattern)
        for row in range(3):
            for group in range(8 // pattern.size):
                for number, subset in enumerate(pattern.subsets.tolist()):
                    keep = torch.ones(3, 8, dtype=torch.bool)
                    keep[row, [group * pattern.size + place for place in subset]] = False
                    if shared:
                        step = best_step(matrix, weight[row], keep[row])
                        wanted = float(step @ matrix @ step) / 2
                    else:
                        step = best_step(matrix, weight.reshape(-1), keep.reshape(-1))
                        wanted = float(step @ matrix @ step) / 2
                    assert float(costs[row, group, number]) == pytest.approx(wanted, rel=1e-4)

    @given(st.integers(1, 6), st.integers(1, 5), st.floats(0.01, 0.99), st.booleans(), st.integers(0, 1000))
    @settings(max_examples=50, deadline=None)
    def test_as_many_are_pruned_as_asked_for(
        self, rows: int, columns: int, sparsity: float, ties: bool, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        costs = {
            name: torch.randint(3, (rows, columns, 1), generator=generator).float()
            if ties
            else torch.rand(rows, columns, 1, generator=generator)
            for name in "ab"
        }
        for scope, competitions in (("global", 1), ("layer", 2), ("row", 2 * rows)):
            masks = Unstructured(scope).keep(costs, sparsity)  # type: ignore[arg-type]  # one of three literals
            entries = 2 * rows * columns
            dropped = sum(int((~mask).sum()) for mask in masks.values())
            assert dropped == competitions * round(entries // competitions * sparsity)
            if scope == "global" and 0 < dropped < entries:
                kept = torch.cat([costs[name][..., 0][mask] for name, mask in masks.items()])
                lost = torch.cat([costs[name][..., 0][~mask] for name, mask in masks.items()])
                assert lost.max() <= kept.min()

    @pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 4)])
    def test_n_of_every_m_are_kept(self, n: int, m: int) -> None:
        pattern = NM(n, m)
        weight = torch.randn(5, 2 * m)
        costs = subset_costs(weight, torch.eye(m).expand(1, 2, m, m), pattern)
        keep = pattern.keep({"w": costs}, pattern.sparsity)["w"]
        assert torch.equal(keep.reshape(5, 2, m).sum(2), torch.full((5, 2), n))
        largest = weight.abs().reshape(5, 2, m).topk(n, dim=2).indices  # F = I: the largest are kept
        assert torch.equal(keep.reshape(5, 2, m), torch.zeros(5, 2, m, dtype=torch.bool).scatter(2, largest, True))
        assert len(pattern.subsets) == len(list(combinations(range(m), n)))

    @pytest.mark.parametrize("text", ["4:2", "0:4", "a:b", "2:4:8", "block", "sparse", "10:40"])
    def test_names_of_no_pattern_are_refused(self, text: str) -> None:
        with pytest.raises(ConfigurationError):
            parse_pattern(text)

    @pytest.mark.parametrize("sparsity", [0, 1, -0.5, 1.5, True, "half", float("nan")])
    def test_shares_that_are_none_are_refused(self, sparsity: Any) -> None:
        with pytest.raises(ConfigurationError, match="share of weights"):
            Pruner(nn.Linear(8, 4), Magnitude()).prune_to(sparsity)
