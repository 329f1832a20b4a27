"""The benchmark measures what it says: every mode, the same work, plausible counts. No timing is asserted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gossamer.bench.decode import bench_decode
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError


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
        if sharing != "no-attention":
            assert row["floor_ms"] > 0
            assert row["prefill_tokens_per_s"] > 0
    # one prefix against one for every sequence
    assert rows[5, "off"]["kv_bytes"] > 2.5 * rows[5, "attention"]["kv_bytes"]


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
