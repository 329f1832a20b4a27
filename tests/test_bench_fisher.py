"""``gossamer bench fisher``: what it prints, and the recursion that it compares with."""

from __future__ import annotations

import json

import pytest
import torch
from typer.testing import CliRunner

from gossamer.bench.fisher import bench_fisher, published_recursion
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError
from gossamer.operators.inverse_fisher import InverseFisher

SMALL = {"m": 8, "d": 200, "window": 4, "parameters": 300, "largest": 1000, "repeats": 1}


def test_published_recursion_is_the_same_matrix() -> None:
    gradients, x = torch.randn(6, 20, dtype=torch.float64), torch.randn(20, dtype=torch.float64)
    vectors, q = published_recursion(gradients, 0.1)
    product = x / 0.1 - vectors.T @ (vectors @ x / q)
    assert torch.allclose(product, InverseFisher(gradients.float(), 0.1) @ x, rtol=1e-4, atol=1e-5)


def test_every_measure_has_something_beside_it() -> None:
    options = [f"--{name}={value}" for name, value in SMALL.items()]
    result = CliRunner().invoke(app, ["bench", "fisher", *options, "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert {row["measure"] for row in rows} == {
        "static build", "element", "window step", "MFAC step", "build and diag"
    }  # fmt: skip
    assert all(row["ms"] > 0 and row["against_ms"] > 0 and row["against"] and row["setting"] for row in rows)
    assert all(row["ratio"] == pytest.approx(row["ms"] / row["against_ms"]) for row in rows)
    table = CliRunner().invoke(app, ["bench", "fisher", *options])
    assert table.exit_code == 0 and "published recursion" in table.stdout


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigurationError, match="at least 1"):
        bench_fisher(**(SMALL | {"m": 0}))
