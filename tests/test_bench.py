"""The benchmark measures what it says: every mode, the same work, plausible counts. No timing is asserted."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gossamer.bench.decode import bench_decode
from gossamer.bench.machine import Ceilings, best_of
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import instruction_sets
from gossamer.options import RunnerOptions


@pytest.fixture(scope="module")
def model(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_llama(tmp_path_factory.mktemp("model"), max_position_embeddings=1024))


@pytest.mark.parametrize("runner", ["transformers", "auto"])
def test_every_mode_is_measured_in_one_run(model: str, runner: str) -> None:
    arguments = [
        "bench",
        "decode",
        "--model",
        model,
        "--batch",
        "3,5",
        "--prefix",
        "300",
        "--suffix",
        "7",
        "--new",
        "8",
        "--runner",
        runner,
    ]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["machine"]["gemm_gflops"] > 0 and report["machine"]["read_gb_per_s"] > 0
    rows = {(row["batch"], row["sharing"]): row for row in report["results"]}
    native = report["results"][0]["runner"] == "native"  # which cannot leave attention out
    assert len(rows) == (6 if native else 8)
    assert not (native and runner == "transformers")
    for (batch, sharing), row in rows.items():
        assert row["error"] is None
        assert row["decode_tokens_per_s"] == pytest.approx(batch / row["step_ms"] * 1e3)
        assert (row["profile_ms"] is not None) == native
        if native:
            assert {"linear", "attention", "head"} < set(row["profile_ms"])
            assert 0 < min(row["profile_ms"].values()) < max(row["profile_ms"].values()) < row["step_ms"]
        if sharing != "no-attention":
            assert row["floor_ms"] > 0
            assert row["floor_share"] == pytest.approx(row["floor_ms"] / row["step_ms"])
            assert set(row["ceilings"]) == {"gemm_gflops", "read_gb_per_s"}
            assert all(0 < value <= report["machine"][name] for name, value in row["ceilings"].items())
            assert row["prefill_tokens_per_s"] > 0
    # one prefix against one for every sequence
    assert rows[5, "off"]["kv_bytes"] > 2.5 * rows[5, "attention"]["kv_bytes"]


def test_the_floor_is_that_of_the_best_ceilings_of_the_combination(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[dict[str, float]] = []

    def measure(self: Ceilings, duration: float = 0.0) -> dict[str, float]:
        number = len(measured)
        found = {"gemm_gflops": [10.0, 30.0, 20.0][number % 3], "read_gb_per_s": [5.0, 6.0, 7.0][number % 3] + number}
        measured.append(found)
        self.best = best_of([self.best, found])
        return found

    monkeypatch.setattr(Ceilings, "measure", measure)
    report = bench_decode(model, batches=[2], prefixes=[20, 30], suffix=5, new=8, sharing=("attention",))
    assert len(measured) == 6  # before, in the middle and after, for both
    first, second = (row["ceilings"] for row in report["results"])
    assert first == {"gemm_gflops": 30.0, "read_gb_per_s": 9.0}
    assert second == {"gemm_gflops": 30.0, "read_gb_per_s": 12.0}
    assert report["machine"]["read_gb_per_s"] == 12.0


@pytest.mark.parametrize("int8", [False, True])
def test_ceilings(int8: bool) -> None:
    ceilings = Ceilings(torch.float32, int8=int8)
    threads = torch.get_num_threads()
    found = [ceilings.measure(0.0) for _ in range(2)]
    assert set(found[0]) == {"gemm_gflops", "read_gb_per_s"} | ({"int8_gops"} if int8 else set())
    assert ceilings.best == {name: max(each[name] for each in found) for name in found[0]}
    assert min(ceilings.best.values()) > 0
    assert torch.get_num_threads() == threads


def test_the_table_shows_the_share_of_the_floor(model: str) -> None:
    result = CliRunner().invoke(
        app,
        ["bench", "decode", "--model", model, "--batch", "2", "--prefix", "20", "--new", "8", "--sharing", "storage"],
    )
    assert result.exit_code == 0, result.output
    (row,) = [line.split() for line in result.stdout.splitlines() if "storage" in line]
    assert any(cell.endswith("%") for cell in row)


def test_other_processes_run_while_it_measures_and_not_longer(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: Any, **options: Any) -> subprocess.Popen[bytes]:
        started.append(real(*arguments, **options))
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr("gossamer.bench.busy.subprocess.Popen", start)
    report = bench_decode(model, batches=[2], prefixes=[20], new=8, sharing=("attention",), busy_processes=2)
    assert report["machine"]["busy_processes"] == 2
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


@pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
def test_instruction_sets_take_turns(model: str) -> None:
    report = bench_decode(
        model,
        batches=[2],
        prefixes=[20],
        new=8,
        sharing=("attention",),
        isas=("all",),
        runners=[RunnerOptions("native")],
    )
    assert [row["isa"] for row in report["results"]] == instruction_sets()
    assert all(row["step_ms"] > 0 for row in report["results"])


def test_what_does_not_fit_is_reported_and_the_others_run(model: str) -> None:
    report = bench_decode(
        model, batches=[4], prefixes=[300], suffix=5, new=8, sharing=("off", "attention"), memory=300_000
    )
    off, attention = report["results"]
    assert "needs" in off["error"] and off["step_ms"] is None
    assert attention["error"] is None and attention["step_ms"] > 0


@pytest.mark.parametrize("changes", [{"sharing": ("both",)}, {"batches": [0]}, {"prefixes": [0]}, {"new": 2}])
def test_bad_arguments(model: str, changes: dict[str, object]) -> None:
    arguments = {"batches": [1], "prefixes": [8], **changes}
    with pytest.raises(ConfigurationError):
        bench_decode(model, **arguments)  # type: ignore[arg-type]
