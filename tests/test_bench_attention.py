"""The attention benchmark measures what it says: every contestant, the same result. No timing is asserted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gossamer.bench import attention as bench
from gossamer.bench.attention import bench_attention, exact_attention
from gossamer.bench.attention_contestants import CONTESTANTS, Native, Reference, TorchAttention, random_problem
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import VARIABLE, instruction_set

NAMES = [kind.name for kind in CONTESTANTS]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "COLD_BYTES", 10**5)
    monkeypatch.setattr(bench, "MINIMUM_LAYERS", 2)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "attention", *arguments])


@pytest.mark.parametrize("kind", [Native, Reference, TorchAttention])
@pytest.mark.parametrize(
    ("sequences", "keys", "dim", "kv_heads", "group"),
    [(1, 1, 2, 1, 1), (1, 2048, 64, 3, 3), (8, 700, 64, 3, 3), (64, 130, 32, 2, 4), (5, 33, 80, 4, 1)],
)
def test_every_contestant_attends(kind: Any, sequences: int, keys: int, dim: int, kv_heads: int, group: int) -> None:
    if kind is Native and instruction_set() is None:
        pytest.skip("the native kernels are not installed")
    problem = random_problem(sequences, keys, dim, kv_heads, group, layers=3)
    exact = exact_attention(problem)
    contestant = kind(problem)
    for _ in range(2):
        seconds, found = contestant.walk()
        assert seconds > 0 and found.shape == (sequences, kv_heads * group, dim)
        assert (found.double() - exact).norm() < 0.01 * exact.norm()


def test_the_exact_result_is_that_of_attention_per_head() -> None:
    problem = random_problem(2, 9, 4, kv_heads=2, group=3, layers=1)
    exact = exact_attention(problem)
    for head in range(6):
        key, value = problem.keys[0][head // 3].double(), problem.values[0][head // 3].double()
        expected = (problem.query[:, head].double() @ key.T * 4**-0.5).softmax(-1) @ value
        assert torch.allclose(exact[:, head], expected)


def test_every_shape_is_measured() -> None:
    result = run("--rows", "3,6", "--keys", "64,100", "--dim", "16", "--repeats", "2", "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    machine = report["machine"]
    rows = {(row["rows"], row["keys"], row["contestant"]): row for row in report["results"]}
    assert set(rows) == {(count, keys, name) for count in (3, 6) for keys in (64, 100) for name in NAMES}
    for (count, keys, name), row in rows.items():
        if name == Native.name and instruction_set() is None:
            continue
        assert row["error"] is None and row["relative_error"] < 0.01
        assert row["layers"] * 2 * 2 * 3 * keys * 16 >= 10**5
        fastest, slowest = row["ms_range"]
        assert fastest <= row["ms"] <= slowest
        assert row["gflops"] == pytest.approx(4 * 3 * count * keys * 16 / row["ms"] / 1e6)
        assert row["gb_per_s"] == pytest.approx(2 * 2 * 3 * keys * 16 / row["ms"] / 1e6)
        for share, rate, ceiling in (
            ("gemm_share", "gflops", "gemm_gflops"),
            ("read_share", "gb_per_s", "read_gb_per_s"),
        ):
            assert row[share] == pytest.approx(row[rate] / row["ceilings"][ceiling])
            assert row["ceilings"][ceiling] <= machine[ceiling]


def test_without_native_kernels_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "reference")
    result = run("--rows", "4", "--keys", "40", "--group", "2", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert f"4 x 40, {Native.name}: the native kernels are not installed, or switched off" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("│")]
    assert sum(Reference.name in line for line in lines) == sum(TorchAttention.name in line for line in lines) == 1
    assert [line[1:4] for line in lines if Native.name in line] == [["4", "│", "40"]]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": (3, 4)}, "4 is not a multiple of 3"),
        ({"rows": ()}, "at least 1"),
        ({"keys": (0,)}, "at least 1"),
        ({"dim": 3}, "even"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        bench_attention(**({"rows": (3,), "keys": (8,)} | changes))
