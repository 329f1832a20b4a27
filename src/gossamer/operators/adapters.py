"""An inverse Fisher matrix as an operator of other libraries: SciPy, linear_operator, curvlinops.

Each is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ConfigurationError
from gossamer.operators.inverse_fisher import InverseFisher


def to_scipy(inverse: InverseFisher, dtype: Any = np.float64) -> Any:
    """A :class:`scipy.sparse.linalg.LinearOperator`, symmetric, for vectors in NumPy; for instance to precondition.

    Raises:
        ConfigurationError: SciPy is not installed, or several processes keep the matrix.

    >>> operator = to_scipy(inverse)  # doctest: +SKIP
    >>> operator @ np.ones(inverse.d)  # doctest: +SKIP
    """
    _check_whole(inverse)
    linalg = _import("scipy.sparse.linalg", "scipy")

    def multiply(x: Any) -> Any:
        return inverse.mv(torch.from_numpy(np.ascontiguousarray(x)).to(torch.float64)).cpu().numpy().astype(dtype)

    return linalg.LinearOperator(inverse.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, dtype=dtype)


def to_linear_operator(inverse: InverseFisher, dtype: torch.dtype = torch.float64) -> Any:
    """A :class:`linear_operator.LinearOperator` (GPyTorch's), with its diagonal.

    Raises:
        ConfigurationError: linear_operator is not installed, or several processes keep the matrix.
    """
    _check_whole(inverse)
    base = _import("linear_operator", "linear_operator").LinearOperator

    class InverseFisherOperator(base):  # type: ignore[misc,valid-type]  # its base is not known before
        def __init__(self, like: Tensor) -> None:
            super().__init__(like)  # what tells it dtype and device, and how to make another one of itself
            self._like = like

        def _matmul(self, rhs: Tensor) -> Tensor:
            return inverse.mv(rhs)

        def _size(self) -> torch.Size:
            return torch.Size(inverse.shape)

        def _transpose_nonbatch(self) -> Any:
            return self

        def _diagonal(self) -> Tensor:
            return inverse.diag().to(self._like.dtype)

    return InverseFisherOperator(torch.empty(0, dtype=dtype, device=inverse.device))


def to_curvlinops(inverse: InverseFisher, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> Any:
    """A ``PyTorchLinearOperator`` of curvlinops, for vectors that are flat or lists of tensors of these shapes.

    Raises:
        ConfigurationError: curvlinops is not installed, several processes keep the matrix, or the shapes do not make
            up d numbers.
    """
    base = _import("curvlinops._torch_base", "curvlinops-for-pytorch").PyTorchLinearOperator
    _check_whole(inverse)
    sizes = [torch.Size(shape).numel() for shape in shapes]
    if sum(sizes) != inverse.d:
        raise ConfigurationError(f"the shapes make up {sum(sizes):,} numbers, and the matrix has {inverse.d:,} rows")

    class InverseFisherOperator(base):  # type: ignore[misc,valid-type]  # its base is not known before
        SELF_ADJOINT = True

        def __init__(self) -> None:
            super().__init__([tuple(shape) for shape in shapes], [tuple(shape) for shape in shapes])

        @property
        def device(self) -> torch.device:
            return inverse.device

        @property
        def dtype(self) -> torch.dtype:
            return dtype

        def _matmat(self, parts: list[Tensor]) -> list[Tensor]:
            columns = torch.cat([part.reshape(size, -1) for part, size in zip(parts, sizes, strict=True)])
            found = inverse.mv(columns).split(sizes)
            return [part.reshape(*shape, -1) for part, shape in zip(found, shapes, strict=True)]

    return InverseFisherOperator()


def _check_whole(inverse: InverseFisher) -> None:
    if inverse.d != inverse.total:
        raise ConfigurationError(
            f"this process keeps {inverse.d:,} of {inverse.total:,} columns, and other libraries take whole vectors: "
            "use the matrix itself"
        )


def _import(module: str, package: str) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        raise ConfigurationError(f"this needs {package}: pip install {package}") from error
