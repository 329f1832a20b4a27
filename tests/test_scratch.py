"""What is built aside appears whole or not at all: whatever is killed or full, and whoever builds at the same time."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from forked import run_program
from gguf_files import export_model
from gossamer.compress.output import all_or_nothing
from gossamer.errors import CheckpointError, DownloadError, OutputError
from gossamer.models import scratch
from gossamer.models.cache import entry_path, get_or_build
from gossamer.models.manifest import write_manifest
from gossamer.models.scratch import os_error_in, put_in_place, remove_leftovers, scratch_directory

MAIN = "from gossamer.cli.app import main; main()"
RESTRICTED = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
"""


def make(path: Path, content: str, *, directory: bool = True) -> Path:
    if directory:
        path.mkdir()
    (path / "file" if directory else path).write_text(content)
    return path


def content(path: Path) -> str:
    return (path / "file" if path.is_dir() else path).read_text()


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("directory", [True, False])
@pytest.mark.parametrize("existing", [True, False])
def test_what_is_built_takes_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool, directory: bool, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(scratch, "_exchange", lambda one, other: False)
    target = tmp_path / "target"
    if existing:
        make(target, "old", directory=directory)
    with scratch_directory(target) as aside:
        put_in_place(make(aside / "built", "new", directory=directory), target)
        assert content(target) == "new"
        assert not directory or [each.name for each in aside.iterdir()] == (["built"] if existing else [])
    assert [each.name for each in tmp_path.iterdir()] == ["target"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems exchange nothing")
def test_a_directory_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = make(tmp_path / "target", "old")

    def never(*paths: Path) -> None:
        raise AssertionError("a rename leaves a moment without a target")

    monkeypatch.setattr(Path, "rename", never)
    put_in_place(make(tmp_path / "built", "new"), target)
    assert (content(target), content(tmp_path / "built")) == ("new", "old")


def test_leftovers_of_the_dead_are_removed_and_those_of_the_living_are_not(tmp_path: Path) -> None:
    target, other = tmp_path / "tar[get", tmp_path / "tar[get.more"
    (tmp_path / ".tar[get.dead.tmp").mkdir()
    (tmp_path / ".tar[get.dead.tmp" / "weights").write_text("much")
    with scratch_directory(other) as beside, scratch_directory(target) as alive:
        assert not (tmp_path / ".tar[get.dead.tmp").exists()
        remove_leftovers(target)
        with scratch_directory(target) as another:
            assert alive.exists() and another.exists() and beside.exists()
    assert not any(tmp_path.iterdir())


def test_a_killed_build_is_cleared_away_by_the_next(tmp_path: Path) -> None:
    build = "import os, signal, sys; from pathlib import Path; from gossamer.models.scratch import scratch_directory\n"
    build += "with scratch_directory(Path(sys.argv[1])) as aside:\n"
    build += "    (aside / 'weights').write_text('much'); os.kill(os.getpid(), signal.SIGKILL)"
    target = tmp_path / "target"
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", build, str(target)])
        assert done.returncode == -signal.SIGKILL
        assert len(list(tmp_path.iterdir())) == 1
    remove_leftovers(target)
    assert not any(tmp_path.iterdir())


@pytest.mark.usefixtures("private_cache")
def test_an_entry_that_is_there_needs_no_leftovers() -> None:
    def build(aside: Path) -> Path:
        directory = make(aside / "model", "weights")
        write_manifest(directory, {})
        return directory

    assert get_or_build("entry", build).outcome == "built"
    leftover = entry_path("entry").with_name(".entry.dead.tmp")
    leftover.mkdir()
    assert get_or_build("entry", build).outcome == "present"
    assert not leftover.exists()
    leftover.mkdir()
    assert get_or_build("entry", build, force=True).outcome == "repaired"
    assert not leftover.exists()


@pytest.mark.usefixtures("private_cache")
@pytest.mark.parametrize(
    "error",
    [OSError(28, "No space left on device"), Exception("No space left on device (os error 28)")],
    ids=["of Python", "of a library in Rust"],
)
def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, error: Exception) -> None:
    def build(aside: Path) -> Path:
        (aside / "half").write_text("half")
        raise error

    with pytest.raises(DownloadError, match=r"No space left on device.*Make room there"):
        get_or_build("entry", build)
    assert not any(path for path in entry_path("entry").parent.iterdir() if path.suffix != ".lock")
    with (
        pytest.raises(OutputError, match="No space left on device; make room"),
        all_or_nothing(tmp_path / "out") as aside,
    ):
        build(aside.parent)
    assert not (tmp_path / "out").exists() and not any(tmp_path.glob(".*"))


def test_other_errors_are_not_taken_for_it(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), all_or_nothing(tmp_path / "out"):
        raise ZeroDivisionError("os error")
    with pytest.raises(CheckpointError), all_or_nothing(tmp_path / "out"):  # which says more than the system does
        raise CheckpointError("it cannot be read: no such file (os error 2)")
    assert os_error_in(ValueError("28")) is None


@pytest.mark.parametrize("command", ["compress", "pull"])
def test_commands_on_a_full_disk(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    """A file that may not grow any more stands for a disk that takes no more; the error is another one."""
    gguf = tmp_path / "renamed.gguf"
    arguments = ["compress", str(tiny), "--int8", "--skip", "", "-o", str(tmp_path / "out")]
    if command == "pull":
        export_model("llama", tmp_path)[1].rename(gguf)
        arguments = ["pull", str(gguf)]

    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    done = run_program(RESTRICTED + MAIN, *arguments)
    assert done.returncode == 2 and "File too large" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()
    assert not any(tmp_path.rglob(".*.tmp")) and not any(tmp_path.glob("cache/models/gguf-*"))
