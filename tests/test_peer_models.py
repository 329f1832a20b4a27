"""Models in other projects' formats, made once and kept."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from gossamer.bench.peers.models import gguf
from gossamer.models.gguf_file import GGUFFile
from native_checkpoints import save_model


@pytest.mark.usefixtures("private_cache")
def test_a_checkpoint_becomes_a_gguf_file_once(tmp_path: Path) -> None:
    """What builds it holds the directory that it is built in, and must not wait for itself."""
    model = save_model("llama", tmp_path / "model")
    made: list[Path] = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: made.append(gguf(model)), daemon=True)
        thread.start()
        thread.join(120)
        assert not thread.is_alive()
    assert made[0] == made[1]
    assert GGUFFile(made[0]).tensors
    assert gguf(made[0]) == made[0]
