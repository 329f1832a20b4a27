"""What we say runs natively is what does."""

from __future__ import annotations

from pathlib import Path

import pytest

from gossamer.native.architectures import native_names
from gossamer.options import option_fields

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("path", ["README.md", "docs/explanation/native.md", "docs/reference/python.md"])
def test_the_documentation_quotes_the_list(path: str) -> None:
    assert native_names() in " ".join((ROOT / path).read_text().split())


def test_the_help_of_the_runner_quotes_the_list() -> None:
    assert native_names() in option_fields()["runner"].metadata["help"]
