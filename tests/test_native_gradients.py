"""Products with rows of gradients: every instruction set, and PyTorch's way, against fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.kernels.gradients import combine_rows, dot_rows, gram
from gossamer.kernels.library import instruction_sets


@pytest.mark.parametrize("isa", [*instruction_sets(), "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@settings(max_examples=40, deadline=None)
@given(
    m=st.sampled_from([1, 2, 5, 7, 8, 12, 13, 17, 33, 70]),
    d=st.sampled_from([1, 3, 16, 127, 129, 2049, 4097, 40_001]),
    extra=st.sampled_from([0, 5]),
    seed=st.integers(0, 1000),
)
def test_products(isa: str, dtype: torch.dtype, m: int, d: int, extra: int, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GOSSAMER_ISA", isa)
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randn(m, d + extra, generator=generator).to(dtype)[:, :d]  # perhaps with a stride
        x, w = torch.randn(d, generator=generator), torch.randn(m, generator=generator, dtype=torch.float64)
        wide = rows.double()
        exact = wide @ wide.T
        assert torch.allclose(gram(rows), exact, rtol=0, atol=1e-13 * float(exact.diagonal().max()))
        assert torch.equal(gram(rows), gram(rows).T)
        size = wide.abs() @ x.abs().double()
        assert ((dot_rows(rows, x) - wide @ x.double()).abs() <= 2e-6 * size).all()
        size = wide.abs().T @ w.abs()
        assert ((combine_rows(rows, w).double() - wide.T @ w).abs() <= 1e-6 * size).all()


def test_not_finite_numbers_stay_where_they_are() -> None:
    rows = torch.ones(3, 50)
    rows[1, 7] = torch.nan
    assert dot_rows(rows, torch.ones(50)).isnan().tolist() == [False, True, False]
    assert gram(rows).isnan().any(0).tolist() == [True, True, True] and not gram(rows)[0, 2].isnan()
    assert combine_rows(rows, torch.ones(3)).isnan().nonzero().tolist() == [[7]]
