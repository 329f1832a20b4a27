"""docs/reference/models.md, which scripts/model_types.py writes, says of every model type what runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.native.architectures import NATIVE_ARCHITECTURES

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
import model_types as script  # noqa: E402  found on the path that was set above

SAMPLE = ["llama", "qwen3_moe", "lfm2", "bloom"]  # one of each outcome


def test_the_page_names_every_model_type_of_this_version() -> None:
    assert script.written().keys() == script.causal_types().keys()
    assert "differs" not in script.written().values()


def test_native_ones_are_those_of_the_list() -> None:
    native = {kind for kind, outcome in script.written().items() if outcome == "native"}
    listed = NATIVE_ARCHITECTURES.keys() & script.causal_types().keys()
    assert {kind for kind in native if f"{kind}_text" not in listed} == listed


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_sample_is_as_the_page_says(kind: str) -> None:
    assert script.judge_apart(kind).outcome == script.written()[kind]


@pytest.mark.slow
def test_all_are_as_the_page_says() -> None:
    done = subprocess.run([sys.executable, ROOT / "scripts" / "model_types.py", "--check"], check=False)
    assert done.returncode == 0
