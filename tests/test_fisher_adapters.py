"""Inverse Fisher matrices as operators of other libraries, where these are installed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.errors import ConfigurationError
from gossamer.operators import adapters
from gossamer.operators.adapters import to_curvlinops, to_linear_operator, to_scipy
from gossamer.operators.inverse_fisher import InverseFisher


@pytest.fixture
def inverse() -> InverseFisher:
    torch.manual_seed(0)
    return InverseFisher(torch.randn(5, 12), 0.1)


def test_scipy(inverse: InverseFisher) -> None:
    linalg = pytest.importorskip("scipy.sparse.linalg")
    operator, dense = to_scipy(inverse), (inverse @ torch.eye(12, dtype=torch.float64)).numpy()
    x = np.random.default_rng(0).standard_normal((12, 3))
    assert np.allclose(operator @ x, dense @ x) and np.allclose(operator @ x[:, 0], dense @ x[:, 0])
    assert np.allclose(operator.T @ x[:, 0], dense @ x[:, 0])
    solution, info = linalg.cg(np.linalg.inv(dense), x[:, 0], M=operator, rtol=1e-10, maxiter=3)
    assert info == 0 and np.allclose(solution, dense @ x[:, 0])  # a perfect preconditioner


def test_linear_operator(inverse: InverseFisher) -> None:
    pytest.importorskip("linear_operator")
    operator, dense = to_linear_operator(inverse), inverse @ torch.eye(12, dtype=torch.float64)
    x = torch.randn(12, 3, dtype=torch.float64)
    assert operator.shape == (12, 12)
    assert torch.allclose(operator @ x, dense @ x) and torch.allclose(operator.T @ x, dense @ x)
    assert torch.allclose(operator.diagonal(), dense.diagonal())


def test_curvlinops(inverse: InverseFisher) -> None:
    pytest.importorskip("curvlinops")
    operator, dense = to_curvlinops(inverse, [(2, 3), (6,)]), inverse @ torch.eye(12, dtype=torch.float64)
    x = torch.randn(12)
    assert torch.allclose((operator @ x).double(), dense @ x.double(), atol=1e-5)
    parts = operator @ [x[:6].reshape(2, 3), x[6:]]
    assert parts[0].shape == (2, 3)
    assert torch.allclose(torch.cat([part.reshape(-1) for part in parts]).double(), dense @ x.double(), atol=1e-5)
    with pytest.raises(ConfigurationError, match="the shapes make up 5"):
        to_curvlinops(inverse, [(5,)])


def test_what_is_missing_is_named(inverse: InverseFisher, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(adapters, "import_module", missing)
    with pytest.raises(ConfigurationError, match="pip install scipy"):
        to_scipy(inverse)
    with pytest.raises(ConfigurationError, match="pip install linear_operator"):
        to_linear_operator(inverse)
