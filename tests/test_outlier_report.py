"""The report of outlier features: its page, and the command that writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from gossamer import find_outliers
from gossamer.cli.app import app
from gossamer.cli.inspect import memory_by_scheme
from gossamer.errors import ConfigurationError
from gossamer.models.load import load_model
from gossamer.report import html
from gossamer.report.ablation import ablate
from gossamer.texts import token_windows
from html_page import Page
from outlier_models import LAYERS, TOKENS, assert_close, plant, tiny_llama


def test_page_is_whole_by_itself_and_shows_every_input() -> None:
    model = plant(5, -1, [1, 2, 3], list(range(TOKENS)))
    ids = torch.arange(40)
    report = find_outliers(model, [ids])
    ablations = ablate(model, [ids], report)
    source = html.render(report, ablations, memory_by_scheme(model), model="<b>&model", text="a & b")
    page = Page(source)
    assert page.links == ["https://arxiv.org/abs/2208.07339"]  # for the reader, not for the page
    assert "<b>&model" in page.text and "<b>&model" not in source
    assert source.count("<svg") == len({each.label for each in report.inputs if each.layer is not None}) == 4
    assert source.count("<title>layer") == 4 * LAYERS
    assert f"{ablations[0].features.perplexity:,.2f}" in page.text
    assert "prefers-color-scheme: dark" in source


def test_page_of_a_model_where_everything_is_large() -> None:
    model = tiny_llama(hidden_size=64)
    report = find_outliers(model, [torch.arange(40)], magnitude=1e-6)
    source = html.render(report, (), memory_by_scheme(model), model="m", text="t")
    assert "and 44 more" in Page(source).text
    assert "64 of the 64 dimensions (residual width) are features" in Page(source).text


def test_file_is_the_old_one_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    html.write(path, "old")
    html.write(path, "new")
    assert path.read_text() == "new"

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(html.os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        html.write(path, "newer")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# --- the command -----------------------------------------------------------------------------------------------------


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["inspect", *map(str, arguments)])


@pytest.fixture(scope="module")
def arguments(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 6)
    return [str(tiny), "--text", str(text), "--window", "50", "--magnitude", "2.9"]


def test_command_as_json(arguments: list[str], tiny: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    result = json.loads(invoke(*arguments, "--tokens", "0.5", "--json", "--html", page).stdout)
    model, tokenizer = load_model(tiny)
    expected = find_outliers(model, token_windows(tokenizer, Path(arguments[2]).read_text(), 50, 4), 2.9, 0.25, 0.5)
    assert_close({key: result[key] for key in expected.to_dict()}, json.loads(json.dumps(expected.to_dict())))
    assert any(found["features"] for found in result["groups"]) and result["ablation"]
    assert result["windows"] == 4 and result["memory"]["linear layers"]["fp32"] > 0
    Page(page.read_text())


def test_command_as_tables(arguments: list[str]) -> None:
    shown = invoke(*arguments, "--no-ablation").stdout
    assert "feed-forward contraction" in shown and "mlp.down_proj" in shown and "linear layers" in shown
    assert "Without the features" not in shown
    assert "no outlier" in invoke(*arguments[:-1], "1000").stdout


@pytest.mark.parametrize("path", ["/no/such/directory/report.html", "/"])
def test_a_report_that_cannot_be_written_is_said_first(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.models.load.load_model", lambda *arguments, **others: pytest.fail("loaded"))
    result = invoke("smollm2-135m", "--html", path)
    assert isinstance(result.exception, ConfigurationError)
