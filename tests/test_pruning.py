"""The pruner: targets of all kinds, masks, and models pruned whole and block by block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from gossamer import MFAC
from gossamer.errors import CheckpointError, ConfigurationError
from gossamer.pruning import (
    NM,
    Block,
    BlockFisher,
    CubicSchedule,
    DiagFisher,
    LayerGram,
    Magnitude,
    MFACFisher,
    Pruner,
    Unstructured,
    Wanda,
    load_masks,
    save_masks,
)
from gossamer.pruning.targets import Target, find_targets
from pruning_models import CURVATURES, batches, language_model, perceptron, same, state


class TestTargets:
    @pytest.mark.parametrize(
        "layer",
        [
            nn.Conv2d(3, 5, 3, padding=1),
            nn.Conv2d(4, 2, (3, 2), stride=(2, 1), padding=(0, 2), dilation=(1, 2)),
            nn.Conv2d(4, 2, 3, padding="same", padding_mode="circular"),
            nn.Conv1d(3, 4, 5, stride=2),
            nn.Conv3d(2, 3, 2),
            nn.Linear(6, 3),
            Conv1D(3, 6),
        ],
    )
    def test_a_layer_is_its_matrix(self, layer: Any) -> None:
        target = next(iter(find_targets(nn.Sequential(layer)).values()))
        shape = {nn.Conv1d: (2, 3, 11), nn.Conv2d: (2, 0, 8, 9), nn.Conv3d: (2, 2, 4, 4, 4)}.get(type(layer), (2, 5, 6))
        shape = tuple(layer.in_channels if size == 0 else size for size in shape)
        x = torch.randn(shape)
        rows = target.inputs(layer, x)
        out = layer(x) - (
            0
            if layer.bias is None
            else layer.bias.reshape([-1] + [1] * (x.dim() - 2))
            if x.dim() != 3 or isinstance(layer, nn.Conv1d)
            else layer.bias
        )
        wanted = out.movedim(1, -1) if "Conv" in type(layer).__name__ and not isinstance(layer, Conv1D) else out
        assert torch.allclose(rows @ target.read().T, wanted.reshape(-1, target.shape[0]), atol=1e-5)
        before = target.parameter.detach().clone()
        target.write(target.read())
        assert torch.equal(before, target.parameter)
        assert torch.equal(target.from_matrix(target.to_matrix(before)), before)

    def test_shared_weights_are_one_target_and_tied_embeddings_none(self) -> None:
        shared = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        shared[1].weight = shared[0].weight
        assert [len(target.modules) for target in find_targets(shared).values()] == [2]
        names = list(find_targets(language_model("gpt2"), exclude=()))
        assert "lm_head.weight" not in names and "transformer.h.0.attn.c_attn.weight" in names

    def test_nothing_to_prune_is_an_error(self) -> None:
        with pytest.raises(ConfigurationError, match="has no weight to prune"):
            find_targets(nn.Sequential(nn.ReLU()))


class TestPruner:
    @pytest.mark.parametrize("curvature", CURVATURES, ids=lambda c: type(c).__name__)
    @pytest.mark.parametrize("update", ["none", "independent", "joint"])
    @pytest.mark.parametrize("pattern", [None, NM(2, 4), Block(4)], ids=str)
    def test_every_combination_prunes_as_many_as_asked(self, curvature: Any, update: Any, pattern: Any) -> None:
        model = perceptron()
        pruner = Pruner(model, curvature, pattern, update)
        report = pruner.prune_to(0.5, batches(), F.cross_entropy)
        assert report.sparsity == pytest.approx(0.5)
        assert pruner.sparsity == pytest.approx(0.5)
        for name, mask in pruner.masks.items():
            weight = model.get_parameter(name)
            assert torch.equal(weight != 0, mask)
            if isinstance(pattern, NM):
                assert bool((mask.reshape(-1, 4).sum(1) == 2).all())
        assert report.loss_before is not None and report.loss_after is not None
        assert "50.00% of" in str(report) and report.to_dict()["sparsity"] == report.sparsity

    def test_a_convolutional_network(self) -> None:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4))
        data = [(torch.randn(4, 4, 6, 6), torch.randint(4, (4,))) for _ in range(3)]
        for curvature in CURVATURES:
            pruned = copy.deepcopy(model)
            Pruner(pruned, curvature, NM(2, 4)).prune_to(0.5, data, F.cross_entropy)
            channels = (pruned[0].weight != 0).reshape(8, 1, 4, 9).sum(2)  # of every four input channels, two
            assert bool((channels == 2).all())

    def test_much_damping_is_magnitude(self) -> None:
        wanted = Pruner(perceptron(), Magnitude(), Unstructured(), "none")
        wanted.prune_to(0.6)
        for curvature in (DiagFisher(1e9), BlockFisher(4, 1e9), MFACFisher(8, 1e9, torch.float32)):
            model = perceptron()
            # the damping is relative to each weight's own scale, which must be one for all to compare
            pruner = Pruner(model, curvature, Unstructured("layer"), "none")
            pruner.prune_to(0.6, batches(), F.cross_entropy)
            by_layer = Pruner(perceptron(), Magnitude(), Unstructured("layer"), "none")
            by_layer.prune_to(0.6)
            assert same(pruner.masks, by_layer.masks)

    def test_recomputing_prunes_further_and_never_less(self) -> None:
        model = perceptron()
        pruner = Pruner(model, MFACFisher(16, dtype=torch.float32), recompute=4)
        pruner.prune_to(0.5, batches(), F.cross_entropy)
        first = dict(pruner.masks)
        pruner.prune_to(0.9, batches(), F.cross_entropy, vectorize=True)
        assert pruner.sparsity == pytest.approx(0.9, abs=1e-3)
        assert all(not bool((pruner.masks[name] & ~mask).any()) for name, mask in first.items())
        with pytest.raises(ConfigurationError, match="would undo some"):
            pruner.prune_to(0.5, batches(), F.cross_entropy)

    @pytest.mark.parametrize("curvature", [BlockFisher(4), MFACFisher(8, dtype=torch.float32)])
    def test_groups_that_fit_into_memory_prune_as_all_at_once(self, curvature: Any) -> None:
        model = perceptron()
        together, apart = copy.deepcopy(model), copy.deepcopy(model)
        one = Pruner(together, curvature)
        one.prune_to(0.5, batches(), F.cross_entropy)
        largest = max(curvature.bytes(target.shape) for target in one.targets.values())
        several = Pruner(apart, curvature, memory=largest)
        several.prune_to(0.5, batches(), F.cross_entropy)
        assert same(one.masks, several.masks)
        with pytest.raises(ConfigurationError, match=r"alone, and .* may be used"):
            Pruner(model, curvature, memory=largest - 1).prune_to(0.5, batches(), F.cross_entropy)

    def test_bad_data_leaves_the_model_as_it_was(self) -> None:
        model = perceptron()
        before = state(model)
        bad = batches()
        bad[2] = (bad[2][0] * float("nan"), bad[2][1])
        silent = [(torch.zeros_like(x), y) for x, y in batches()]
        cases: list[tuple[Any, Any, str]] = [
            (BlockFisher(4), bad, "gradient of .* has NaN"),
            (LayerGram(), bad, "NaN"),
            (LayerGram(), silent, "nothing tells them apart|not positive"),
            (Wanda(), None, "needs calibration data"),
            (LayerGram(), [], "gave no batch"),
        ]
        for curvature, data, message in cases:
            only_first = Pruner(model, curvature, params=["0"])
            with pytest.raises(ConfigurationError, match=message):
                only_first.prune_to(0.5, data, F.cross_entropy)
            assert same(before, state(model)) and not only_first.masks
        with pytest.raises(ConfigurationError, match="needs the loss"):
            Pruner(model, DiagFisher()).prune_to(0.5, batches())
        zero = Pruner(model, MFACFisher(4))
        with pytest.raises(ConfigurationError, match="are zero"):
            zero.prune_to(0.5, batches(), lambda outputs, targets: 0 * outputs.sum())
        assert same(before, state(model))

    def test_a_failure_in_a_later_stage_undoes_the_first(self) -> None:
        model = perceptron()
        before = state(model)
        calls = 0

        def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            return F.cross_entropy(outputs, targets) * (float("nan") if calls > 60 else 1)

        pruner = Pruner(model, BlockFisher(4), recompute=3)
        with pytest.raises(ConfigurationError, match="NaN"):
            pruner.prune_to(0.9, batches(), loss)
        assert calls > 60 and same(before, state(model)) and not pruner.masks

    def test_rows_that_do_not_divide_are_refused_before_anything(self) -> None:
        model = nn.Sequential(nn.Linear(10, 4))
        with pytest.raises(ConfigurationError, match=r"rows of 0.weight have 10 weights.*2:4"):
            Pruner(model, Magnitude(), NM(2, 4))
        with pytest.raises(ConfigurationError, match=r"share of 0.5 zero"):
            Pruner(perceptron(), Magnitude(), NM(2, 4)).prune_to(0.6)
        with pytest.raises(ConfigurationError, match="update is"):
            Pruner(perceptron(), Magnitude(), update="all")  # type: ignore[arg-type]  # wrong on purpose
        with pytest.raises(ConfigurationError, match="stages"):
            Pruner(perceptron(), Magnitude(), recompute=0)

    def test_a_layer_on_its_own_and_one_that_is_not_called(self) -> None:
        layer = nn.Linear(16, 4)
        assert list(Pruner(layer, Magnitude()).targets) == ["weight"]
        Pruner(layer, DiagFisher()).prune_to(0.5, batches(), F.cross_entropy)
        assert float((layer.weight == 0).float().mean()) == 0.5
        model = perceptron()
        used = nn.Sequential(*perceptron())
        model = nn.ModuleDict({"used": used, "unused": nn.Linear(4, 4)})
        setattr(model, "forward", used.forward)  # noqa: B010  a method cannot be assigned for the type checker
        with pytest.raises(ConfigurationError, match=r"unused.weight was not used"):
            Pruner(model, LayerGram()).prune_to(0.5, batches())

    def test_what_is_pruned_stays_so_under_another_curvature(self) -> None:
        model = perceptron()
        first = Pruner(model, Magnitude(), Unstructured("global"), params=["0"])
        first.prune_to(0.8)
        second = Pruner(model, LayerGram(), Unstructured("row"), params=["0"])
        second.masks = dict(first.masks)
        second.prune_to(0.85, batches())
        assert not bool((second.masks["0.weight"] & ~first.masks["0.weight"]).any())

    def test_no_file_is_left_behind(self, tmp_path: Any) -> None:
        Pruner(perceptron(), LayerGram(), scratch=tmp_path).prune_to(0.5, batches())
        assert not list(tmp_path.iterdir())
        with pytest.raises(ConfigurationError, match="cannot keep a copy"):
            Pruner(perceptron(), Magnitude(), scratch=tmp_path / "missing").prune_to(0.5)


class TestMasks:
    @pytest.mark.parametrize(
        "make",
        [
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
            lambda p: torch.optim.AdamW(p, lr=0.01),
            lambda p: MFAC(p, lr=0.01, window=8, damping=1e-3, momentum=0.9),
        ],
    )
    def test_masks_hold_through_training_with_any_optimizer(self, make: Any) -> None:
        model = perceptron()
        pruner = Pruner(model, Magnitude())
        optimizer = make(model.parameters())
        for sparsity in CubicSchedule(0.9, 4):
            pruner.prune_to(sparsity)
            with pruner.hold(optimizer):
                for x, y in batches(25):
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
                    for name, mask in pruner.masks.items():
                        assert not bool((model.get_parameter(name)[~mask] != 0).any())
        assert pruner.sparsity == pytest.approx(0.9, abs=0.01)
        assert any(bool((model.get_parameter(name)[mask] != 0).any()) for name, mask in pruner.masks.items())

    def test_saved_masks_come_back(self, tmp_path: Any) -> None:
        model = perceptron()
        pruner = Pruner(model, Magnitude())
        pruner.prune_to(0.7)
        pruner.save_masks(tmp_path / "masks.safetensors")
        other = Pruner(perceptron(), Magnitude())
        other.load_masks(tmp_path / "masks.safetensors")
        assert same(pruner.masks, other.masks) and same(state(model), state(other.model))
        assert other.sparsity == pruner.sparsity

    def test_masks_of_something_else_are_refused(self, tmp_path: Any) -> None:
        save_masks(tmp_path / "m", {"0.weight": torch.ones(3, 3, dtype=torch.bool)})
        pruner = Pruner(perceptron(), Magnitude())
        with pytest.raises(ConfigurationError, match=r"the weight needs bool \[32, 16\]"):
            pruner.load_masks(tmp_path / "m")
        save_masks(tmp_path / "n", {"7.weight": torch.ones(3, dtype=torch.bool)})
        with pytest.raises(ConfigurationError, match="no weight that is pruned here"):
            pruner.load_masks(tmp_path / "n")
        few = {"weight": torch.zeros(1, dtype=torch.uint8)}
        save_file(few, tmp_path / "few", {"format": "gossamer-masks", "weight": "1000,1000"})
        with pytest.raises(CheckpointError, match="no bit for each"):
            load_masks(tmp_path / "few")
        (tmp_path / "m").write_bytes((tmp_path / "m").read_bytes()[:-1])
        for path in (tmp_path / "m", tmp_path / "missing"):
            with pytest.raises(CheckpointError, match="cannot be read"):
                load_masks(path)


def test_a_target_is_its_own_layer() -> None:
    """The name of a target is that of its parameter."""
    model = perceptron()
    for name, target in find_targets(model).items():
        assert isinstance(target, Target) and model.get_parameter(name) is target.parameter
