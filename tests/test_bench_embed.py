"""The benchmark of embeddings measures what it says, and a peer that is missing or fails stops nobody."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from encoders import write_bert
from gossamer.bench import embed as bench
from gossamer.cli.app import app
from gossamer.errors import ConfigurationError

# Embeds with transformers and pools by itself; fails when it is told to.
FAKE = """
import base64, torch
from transformers import AutoModel, AutoTokenizer

class Encoder:
    def load(self, model, threads, dtype):
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(model), AutoModel.from_pretrained(model).eval()
        return {"versions": {"fake": "1.0"}, "weights": dtype}

    @torch.no_grad()
    def encode(self, texts, batch):
        if "fail" in texts:
            raise ValueError("it is to fail")
        rows = []
        for text in texts:
            ids = self.tokenizer(text, truncation=True, max_length=40, return_tensors="pt")["input_ids"]
            rows.append(torch.nn.functional.normalize(self.model(ids).last_hidden_state.mean(1)))
        return {"seconds": 0.5, "embeddings": base64.b64encode(torch.cat(rows).numpy().tobytes()).decode()}
"""


@pytest.fixture
def environments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment in which the fake is installed in the place of the peer."""
    directory = tmp_path / "environments"
    (directory / "sentence-transformers" / "bin").mkdir(parents=True)
    (directory / "sentence-transformers" / ".installed").touch()
    (tmp_path / "fake.py").write_text(FAKE)
    python = directory / "sentence-transformers" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')  # a link would lose its environment
    python.chmod(0o755)
    monkeypatch.setitem(bench.PEERS, "sentence-transformers", str(tmp_path / "fake.py"))
    return directory


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["bench", "embed", *arguments])


def test_ours_and_the_peers_vectors_are_the_same(
    tmp_path: Path, environments: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("a cat\n\nThe dog barks.\n" + "long " * 30 + "\n")
    options = ["--model", str(write_bert(tmp_path / "bert")), "--file", str(texts), "--rounds", "2"]
    peers = ["--peers", "sentence-transformers", "--peers-in", str(environments)]
    result = run(*options, *peers, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["texts"] == 3 and report["peers"]["sentence-transformers"]["versions"] == {"fake": "1.0"}
    peer, exact, int8 = report["results"]
    assert [each["contestant"] for each in report["results"]] == [
        "sentence-transformers",
        "gossamer float32",
        "gossamer int8",
    ]
    assert peer["texts_per_s"] == 6 and peer["over_peer"] == 1
    assert exact["cosine_min"] > 0.99999 > int8["cosine_min"] > 0.99
    assert exact["over_peer"] > 0 and exact["texts_per_s"] > 0
    monkeypatch.setattr(bench, "bench_embed", lambda *_, **__: report)  # measuring it again would say nothing more
    table = run(*options, *peers).stdout
    assert "gossamer int8" in table and "fake 1.0" in table


def test_a_peer_that_is_not_there_or_fails(tmp_path: Path, environments: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("fail\n")
    options = ["--model", str(write_bert(tmp_path / "bert")), "--file", str(texts), "--peers", "all", "--json"]
    for where, reason in ((tmp_path, "make bench-embed"), (environments, "it is to fail")):
        result = run(*options, "--peers-in", str(where), "--weights", "float32")
        assert result.exit_code == 0, result.output
        failed, own = json.loads(result.stdout)["results"]
        assert reason in failed["error"] and own["error"] is None and own["over_peer"] is None


@pytest.mark.parametrize(
    "options", [("--weights", "int4"), ("--weights", ""), ("--peers", "nobody"), ("--file", "/no")]
)
def test_what_is_wrong_is_told_before_anything_is_loaded(options: tuple[str, str]) -> None:
    error = run(*options).exception
    assert isinstance(error, ConfigurationError) and options[-1] in str(error)
