"""Pruning by several processes: what one would make of the same data, and what ends all of them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from typer.testing import CliRunner

from forked import Program
from gossamer.cli.app import app
from gossamer.compress.sparse import SparsityRecipe, compress_sparse
from gossamer.distributed.fisher import Group
from gossamer.errors import ConfigurationError, GossamerError
from gossamer.pruning import (
    NM,
    BlockFisher,
    LayerGram,
    Pruner,
    Reconstruction,
    Unstructured,
    Wanda,
    decoder_blocks,
    load_masks,
)
from gossamer.pruning.unfinished import Unfinished
from gossamer.texts import reference_text
from native_checkpoints import save_model
from process_groups import run_ranks
from pruning_models import CURVATURES, batches, language_batches, language_loss, language_model, perceptron, state

TEXT = reference_text()[:20_000]


def everywhere(group: Group, model: nn.Module) -> bool:
    flat = torch.cat([value.reshape(-1) for value in model.state_dict().values()])
    return all(torch.equal(each, flat) for each in group.gather(flat, [len(flat)] * group.size))


def agreement(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert one.keys() == other.keys()
    same = sum(int((one[name] == other[name]).sum()) for name in one)
    return same / sum(mask.numel() for mask in one.values())


def compare(group: Group, make: Any, data: list[Any], loss: Any, sparsity: float, **settings: Any) -> None:
    """A model pruned by all processes against one that each prunes for itself."""
    (shared, several), (alone, one) = make(group), make(None)
    found = several.prune_to(sparsity, data, loss, **settings)
    expected = one.prune_to(sparsity, data, loss, **settings)
    assert agreement(several.masks, one.masks) >= 0.9999
    if loss:
        assert found.loss_before == pytest.approx(expected.loss_before, rel=1e-6)
        assert found.loss_after == pytest.approx(expected.loss_after, rel=1e-6)
    assert found.predicted_loss == pytest.approx(expected.predicted_loss, rel=1e-4)
    assert found.sparsity == expected.sparsity
    for (name, value), own in zip(alone.state_dict().items(), shared.state_dict().values(), strict=True):
        assert torch.allclose(own, value, rtol=1e-4, atol=1e-5), name
    assert everywhere(group, shared)


def whole_models(directory: Path) -> None:
    group = Group()
    data = batches(count=5, size=3)

    def pruner(curvature: Any, **settings: Any) -> Any:
        def make(ranks: Group | None) -> tuple[nn.Module, Pruner]:
            model = perceptron()
            more = settings | ({"ranks": ranks} if ranks else {})
            return model, Pruner(model, curvature, **more)

        return make

    loss = nn.functional.cross_entropy
    for curvature in CURVATURES:
        compare(group, pruner(curvature), data, loss, 0.6)
    compare(group, pruner(BlockFisher(4), pattern=NM(2, 4)), data, loss, 0.5)
    compare(group, pruner(BlockFisher(4), recompute=3, update="independent"), data, loss, 0.7, samples=11)
    compare(group, pruner(BlockFisher(4), update="none"), data, loss, 0.7, samples=40)  # each sample several times
    # Costs of all weights first, then statistics again for the update. Two processes hold twice as much as one: the
    # first two weights here, and three of them all.
    first, second, _ = (BlockFisher(4).bytes(shape) for shape in ((32, 16), (8, 32), (4, 8)))
    several, alone = pruner(BlockFisher(4), memory=first), pruner(BlockFisher(4), memory=first + second)
    if group.size == 3:
        alone = pruner(BlockFisher(4))
    compare(group, lambda ranks: several(ranks) if ranks else alone(ranks), data, loss, 0.6)
    check_faults(group, data)


def check_faults(group: Group, data: list[Any]) -> None:
    """What one process meets is said by all, and the model and the masks are as they were."""
    last = group.size - 1
    for curvature in (LayerGram(), BlockFisher(4)):
        model = perceptron()
        before = state(model)
        pruner = Pruner(model, curvature, ranks=group)
        bad = [(x.clone(), y) for x, y in data]
        # which batch, or which sample, is the last process's
        bad[last if curvature.source == "inputs" else 0][0][0 if curvature.source == "inputs" else last] = torch.nan
        with pytest.raises(ConfigurationError, match=f"^process {last}: .*NaN or infinite"):
            pruner.prune_to(0.5, bad, None if curvature.source == "inputs" else nn.functional.cross_entropy)
        assert not pruner.masks and all(torch.equal(value, before[name]) for name, value in state(model).items())
        few = data[: group.size - 1]
        with pytest.raises(ConfigurationError, match=f"{len(few)} batches .* not enough for {group.size} processes"):
            pruner.prune_to(0.5, few, nn.functional.cross_entropy)

    def stop(phase: str, done: int, total: int) -> None:
        if group.rank == last:
            raise OSError("the disk is gone")

    pruner = Pruner(perceptron(), LayerGram(), ranks=group)
    with pytest.raises(GossamerError, match=f"^process {last}: pruning: OSError: the disk is gone"):
        pruner.prune_to(0.5, data, progress=stop)


def blocks(directory: Path) -> None:
    group = Group()

    def pruner(curvature: Any, **settings: Any) -> Any:
        def make(ranks: Group | None) -> tuple[nn.Module, Pruner]:
            model = language_model("llama")
            more = settings | ({"ranks": ranks} if ranks else {})
            return model, Pruner(model, curvature, exclude=["lm_head"], blocks=decoder_blocks(model), **more)

        return make

    data = language_batches()
    trained = {"reconstruction": Reconstruction(2)}
    compare(group, pruner(LayerGram(), **trained), data, language_loss, 0.5)
    compare(group, pruner(LayerGram(), pattern=NM(2, 4)), data, language_loss, 0.5)
    compare(group, pruner(Wanda(), pattern=Unstructured("row"), memory=LayerGram().bytes((32, 48))), data, None, 0.5)
    compare(group, pruner(BlockFisher(4), **trained), data, language_loss, 0.5)
    check_parts(group, directory, data)


def check_parts(group: Group, directory: Path, data: list[Any]) -> None:
    """What was interrupted after the first block goes on there; only the first process sees the parts."""
    kept = directory / f"parts-{group.rank}"  # those of other machines have no such directory

    def stop(phase: str, done: int, total: int) -> None:
        if phase == "blocks":
            raise KeyboardInterrupt

    def run(unfinished: Unfinished, progress: Any = lambda phase, done, total: None) -> nn.Module:
        model = language_model("llama")
        settings: dict[str, Any] = {"blocks": decoder_blocks(model), "reconstruction": Reconstruction(1)}
        pruner = Pruner(model, LayerGram(), exclude=["lm_head"], ranks=group, **settings)
        pruner.prune_to(0.5, data, language_loss, unfinished=unfinished, progress=progress)
        return model

    with pytest.raises(KeyboardInterrupt):
        run(Unfinished(kept), stop)
    again = Unfinished(kept)
    resumed, whole = run(again), run(Unfinished(directory / f"other-{group.rank}"))
    assert again.taken == (1 if group.rank == 0 else 0) and kept.exists() == (group.rank == 0)
    assert all(torch.equal(value, state(whole)[name]) for name, value in state(resumed).items())


@pytest.mark.parametrize(("size", "work"), [(2, whole_models), (3, whole_models), (3, blocks)])
def test_several_processes_prune_as_one(size: int, work: Any, tmp_path: Path) -> None:
    run_ranks(work, size, tmp_path / "ranks", tmp_path)


# The command


def torchrun(size: int, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
    command += ["--local-addr", "127.0.0.1", "-m", "gossamer.cli", "compress", *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model("llama", tmp_path_factory.mktemp("pruned") / "source")


def test_torchrun_writes_what_one_process_would(source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    options = ["--sparsity", 0.5, "--text", text, "--sequences", 5, "--length", 16, "--json"]
    done = torchrun(2, source, "-o", tmp_path / "several", *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)  # one line: the first process's
    one = compress_sparse(source, tmp_path / "one", SparsityRecipe(0.5, sequences=5, length=16), TEXT)
    assert report["bytes"] == sum(file.stat().st_size for file in (tmp_path / "several").rglob("*"))
    assert report["pruning"]["sparsity"] == one.pruning.sparsity
    assert report["pruning"]["loss_after"] == pytest.approx(one.pruning.loss_after, rel=1e-6)
    masks = [load_masks(tmp_path / name / "masks.safetensors") for name in ("several", "one")]
    assert agreement(*masks) >= 0.9999
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("several", "one"))
    assert all(torch.allclose(first[name], second[name], rtol=1e-4, atol=1e-5) for name in second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "several", "text.txt"]


def test_what_is_wrong_is_said_once(source: Path, tmp_path: Path) -> None:
    """As torchrun starts them, but that the statuses are seen: the first process speaks, all end with 2."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT[:60])
    script = "import sys; from gossamer.cli.app import main; main()"
    arguments = ["compress", source, "-o", tmp_path / "out", "--sparsity", 0.5, "--text", text, "--length", 16]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    programs = [Program(script, *arguments, environment=os.environ | meeting | {"RANK": str(rank)}) for rank in (0, 1)]
    answers = [program.communicate() for program in programs]
    assert [program.returncode for program in programs] == [2, 2]
    assert [out for out, _ in answers] == ["", ""]
    assert "error: the calibration text holds" in answers[0][1] and "error" not in answers[1][1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_only_pruning_is_for_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigurationError, match=r"several processes .* prune together, with --sparsity"):
        CliRunner().invoke(app, ["compress", "x", "-o", str(tmp_path / "out"), "--int8"], catch_exceptions=False)
