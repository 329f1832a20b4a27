"""``gossamer bench restart``, with real servers of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gossamer.bench.restart import COMPUTED, READ
from gossamer.cli.app import app

TINY_CONTEXT = 512


@pytest.mark.slow
def test_the_second_server_reads_what_the_first_has_written(tiny: Path) -> None:
    command = [
        "bench",
        "restart",
        "--model",
        str(tiny),
        "--prefix",
        "300",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json",
    ]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    cached = {row["start"]: row["cached_tokens"] for row in report["results"]}
    assert cached == {COMPUTED: 0, READ: 300}
    assert report["speedup"] > 0 and report["file_bytes"] > 0
