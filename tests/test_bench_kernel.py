"""``gossamer bench kernel``: what it prints and what it refuses."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from gossamer.bench.kernel import bench_kernel
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError

SMALL = ["--n", "300,600", "--d", "4", "--repeats", "1", "--family", "clustered", "--no-keops"]


def test_figures_of_every_size() -> None:
    result = CliRunner().invoke(app, ["bench", "kernel", *SMALL, "--json"])
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert [(row["family"], row["n"]) for row in report["results"]] == [("clustered", 300), ("clustered", 600)]
    for row in report["results"]:
        assert row["exact"] > 0 and row["first"] > 0 and row["floor"] > 0 and row["keops"] is None
        assert row["error"] <= 0.1 and row["report"]["mode"] == "exact"
    assert report["growth"]["clustered"]["published"] == 1.89


def test_the_table_names_what_was_measured() -> None:
    table = CliRunner().invoke(app, ["bench", "kernel", *SMALL])
    assert table.exit_code == 0, table.output
    assert "clustered" in table.stdout and "n^" in table.stdout


@pytest.mark.parametrize(
    "change", [{"families": ["cubes"]}, {"sizes": [0]}, {"eps": 0.0}, {"repeats": 0}, {"sizes": [10], "d": 0}]
)
def test_bad_settings(change: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        bench_kernel(**{"families": ["clustered"], "sizes": [100], **change})
