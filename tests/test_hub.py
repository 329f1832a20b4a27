"""Models of the Hugging Face hub: names that are not found, and files that are refused."""

from __future__ import annotations

import shutil
import time
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

import gossamer.models.hub
from gossamer.errors import CheckpointError, ModelNotFoundError
from gossamer.models import resolve_model

pytestmark = pytest.mark.usefixtures("private_cache")


class TestHub:
    @pytest.fixture(autouse=True)
    def offline(self, tmp_path, monkeypatch):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        # Nothing listens on the discard port, so this is what a machine without a network sees.
        monkeypatch.setattr(gossamer.models.hub, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))

    @pytest.mark.parametrize("name", ["smolm2-135m", "Someone/SmolLM2-135M"])
    def test_unreachable_hub_answers_quickly_and_suggests(self, name):
        started = time.perf_counter()
        with pytest.raises(ModelNotFoundError) as caught:
            resolve_model(name)
        assert time.perf_counter() - started < 5
        for part in (name, "cannot be reached", "Did you mean smollm2-135m?", "gemma3-270m", ".gguf"):
            assert part in str(caught.value)

    def test_invalid_name(self):
        with pytest.raises(ModelNotFoundError, match="nor a valid Hugging Face id"):
            resolve_model("two words")

    def test_cached_snapshot_needs_no_network(self, tiny, tmp_path):
        repository = tmp_path / "hub" / "models--someone--tiny"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("a" * 40)
        shutil.copytree(tiny, repository / "snapshots" / ("a" * 40))
        path = resolve_model("someone/tiny")
        assert path == repository / "snapshots" / ("a" * 40)
        (path / "model.safetensors").unlink()
        with pytest.raises(ModelNotFoundError, match="cannot be reached"):
            resolve_model("someone/tiny")

    def test_repository_of_pickles_is_refused_before_the_download(self, monkeypatch):
        names = ["config.json", "tokenizer.json", "pytorch_model.bin"]
        info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in names])
        api = SimpleNamespace(model_info=lambda repo_id, timeout: info)
        monkeypatch.setattr(gossamer.models.hub, "HfApi", lambda: api)
        with pytest.raises(CheckpointError, match="pickled"):
            resolve_model("someone/pickles")
