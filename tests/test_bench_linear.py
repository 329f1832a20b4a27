"""The linear benchmark measures what it says: every contestant, the same product, outliers. No timing is asserted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from gossamer.bench import linear as bench
from gossamer.bench.linear import bench_linear, random_activations
from gossamer.bench.linear_contestants import PEER_NAMES, Contestant, Product, package_version
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError
from gossamer.kernels.library import instruction_sets
from gossamer.ops.int8 import outlier_mask

TORCH = ("torch-fp32", "torch-bf16", "torch-int-mm")
OWN = ("gossamer", "gossamer-paper", "gossamer-torch")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "linear", *arguments])


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="torch._int_mm is a slow loop here")
def test_every_contestant_is_measured_at_every_shape() -> None:
    result = run("--dims", "64,128", "--rows", "1,5", "--repeats", "3", "--peers", ",".join(TORCH), "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["machine"]["read_gb_per_s"] > 0 and report["machine"]["int8_gops"] > 0 and report["peers"] == {}
    rows = {(row["dim"], row["rows"], row["contestant"]): row for row in report["results"]}
    assert set(rows) == {(dim, count, name) for dim in (64, 128) for count in (1, 5) for name in OWN + TORCH}
    for (dim, count, _), row in rows.items():
        assert row["error"] is None and row["floor_ms"] > 0 and row["floor_share"] > 0
        fastest, slowest = row["ms_range"]
        assert fastest <= row["ms"] <= slowest
        assert row["gops"] == pytest.approx(8 * count * dim**2 / row["ms"] / 1e6)
        assert row["over_fp32"] > 0 and row["over_bf16"] > 0
    for name, limit in (
        ("gossamer", 0.02),
        ("gossamer-paper", 0.02),
        ("gossamer-torch", 0.02),
        ("torch-bf16", 0.005),
        ("torch-fp32", 1e-6),
    ):
        assert all(row["relative_error"] < limit for (_, _, other), row in rows.items() if other == name)


@pytest.mark.skipif(not instruction_sets(), reason="the native kernels are not installed")
def test_instruction_sets_take_turns() -> None:
    result = run("--dims", "64", "--rows", "3", "--repeats", "1", "--peers", "", "--isa", "all", "--json")
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["results"]
    assert [row["contestant"] for row in rows] == [f"gossamer-{isa}" for isa in instruction_sets()]
    assert all(
        row["ms"] > 0 and row["relative_error"] == pytest.approx(rows[0]["relative_error"], rel=1e-3) for row in rows
    )
    refused = run("--isa", "avx1024")
    assert refused.exit_code != 0 and "avx1024" in str(refused.exception)


def test_the_table_shows_each_shape_and_what_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "package_version", lambda package: None)
    result = run("--dims", "64", "--rows", "3", "--repeats", "1", "--threads", str(torch.get_num_threads()))
    assert result.exit_code == 0, result.output
    assert "bitsandbytes is not installed" in result.stdout and "torchao is not installed" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines() if line.startswith("│")]
    assert [line[1:4] for line in lines if "gossamer" in line] == [["64", "│", "3"]]
    assert sum("torch-fp32" in line for line in lines) == 1


def test_a_processor_without_int8_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    result = run("--dims", "64", "--rows", "3", "--repeats", "1", "--peers", "torch-int-mm")
    assert result.exit_code == 0, result.output
    assert "int8 product no GOP/s" in result.stdout
    assert "64 x 3, torch-int-mm: torch._int_mm is a slow loop" in result.stdout
    report = bench_linear(dims=(64,), rows=(3,), peers=(), repeats=1)
    assert report["machine"]["int8_gops"] is None
    assert all(row["ms"] > 0 and row["floor_ms"] is None for row in report["results"])


def test_a_peer_that_fails_costs_only_its_own_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(weight: Tensor, columns: Tensor) -> Product:
        raise RuntimeError("no kernel for this\nand a long story")

    def breaks_later(weight: Tensor, columns: Tensor) -> Product:
        return lambda x: x @ x

    peers = (
        Contestant("one", torch.float32, broken),
        Contestant("two", torch.float32, breaks_later),
        Contestant("three", torch.float64, lambda weight, columns: lambda x: x @ weight.double().T),
    )
    monkeypatch.setattr(bench, "PEERS", peers)
    monkeypatch.setattr(bench, "PEER_NAMES", ("one", "two", "three"))
    report = bench_linear(dims=(64,), rows=(2,), peers=("one", "two", "three"), repeats=2)
    rows = {row["contestant"]: row for row in report["results"]}
    assert rows["one"]["error"] == "no kernel for this" and rows["one"]["ms"] is None
    assert "shapes" in rows["two"]["error"] and rows["two"]["relative_error"] is None
    assert rows["three"]["ms"] > 0 and rows["three"]["relative_error"] < 1e-6
    # without torch-fp32 and torch-bf16 there is nothing to compare with
    assert rows["gossamer"]["ms"] > 0 and rows["gossamer"]["over_fp32"] is None


@pytest.mark.parametrize("dim", [768, 2048])
def test_activations_have_the_outliers_that_are_claimed(dim: int) -> None:
    x = random_activations(512, dim, torch.Generator().manual_seed(0))
    size = x.abs().mean(1, keepdim=True)
    assert float((x[:, :6].abs() > 10 * size).float().mean()) == pytest.approx(0.75, abs=0.03)
    relative = outlier_mask(x, 6.0, "relative", "token")
    assert 0.02 < float(relative.any(0).float().mean()) < 0.06
    assert outlier_mask(x, 6.0, "absolute", "token").any(0).nonzero().flatten().tolist() == list(range(6))
    assert 0.7 < float(size.mean()) < 1.0  # else 6.0 would not be what it is in the paper


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peers": ("numpy",)}, "'numpy'"),
        ({"dims": (64, 0)}, "at least 64"),
        ({"dims": ()}, "at least 64"),
        ({"rows": (0,)}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
    ],
)
def test_bad_arguments(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        bench_linear(**({"dims": (64,), "rows": (1,), "peers": ()} | changes))


@pytest.mark.parametrize("option", ["--dims", "--rows"])
def test_options_that_are_not_numbers(option: str) -> None:
    error = run(option, "64;128").exception
    assert isinstance(error, ConfigurationError) and option in str(error)


@pytest.mark.peers
@pytest.mark.parametrize("name", [name for name in PEER_NAMES if name not in TORCH])
def test_peers_compute_the_same_product(name: str) -> None:
    if package_version(name) is None:
        pytest.skip(f"{name} is not installed")
    report = bench_linear(dims=(128, 256), rows=(1, 9), peers=(name,), repeats=1)
    assert report["peers"] == {name: package_version(name)}
    rows = [row for row in report["results"] if row["contestant"] == name]
    assert len(rows) == 4
    assert all(row["error"] is None and row["ms"] > 0 and row["relative_error"] < 0.06 for row in rows), rows
