"""Prunes the weights of a model: which go is told by a curvature, how many and in which sets by a pattern."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.experts import SeparateExperts
from gossamer.nn.quantize import SKIP
from gossamer.operators.ranks import ALONE, Ranks, together
from gossamer.pruning.curvature import Curvature
from gossamer.pruning.job import Job, OnProgress
from gossamer.pruning.masks import Hold, check_masks, load_masks, save_masks
from gossamer.pruning.original import Original
from gossamer.pruning.owners import Owners
from gossamer.pruning.patterns import NM, Block, Pattern, Unstructured, subset_costs
from gossamer.pruning.quadratic import Quadratic
from gossamer.pruning.reconstruction import Reconstruction
from gossamer.pruning.report import PrunedLayer, PruneReport
from gossamer.pruning.statistics import (
    LossFn,
    Seen,
    evaluating,
    mean_loss,
)
from gossamer.pruning.targets import Target, find_targets
from gossamer.pruning.unfinished import Unfinished
from gossamer.pruning.walk import prune_blocks
from gossamer.pruning.whole import prune_whole
from gossamer.system import peak_memory

Update = Literal["none", "independent", "joint"]


class Pruner:
    """Sets weights of a model to zero, and has the others make up for it.

    Args:
        model: of any kind. The weights of ``nn.Linear``, transformers' ``Conv1D`` and convolutions are pruned in place.
        curvature: what a weight is worth: :class:`~.curvature.Magnitude`, ``Wanda``, ``DiagFisher``,
            ``BlockFisher``, ``MFACFisher`` or ``LayerGram``.
        pattern: :func:`~.patterns.Unstructured`, :class:`~.patterns.NM` or :class:`~.patterns.Block`. By default
            weights compete in the whole model where their costs are those of one loss (curvatures of gradients), and
            within a weight otherwise.
        update: ``"joint"`` moves all kept weights to where the quadratic form is least under the mask;
            ``"independent"`` sums up what each pruned weight alone would ask for, as M-FAC and WoodFisher do;
            ``"none"`` leaves them.
        recompute: stages in which the sparsity is reached, with new statistics for each; sparsities grow as
            :func:`~.schedule.geometric` says.
        params, exclude: names of modules; see :func:`~.targets.find_targets`.
        blocks: the decoder blocks of a language model (:func:`~.blocks.decoder_blocks`), to be pruned one after the
            other, each on what the pruned blocks before it give; for curvatures of inputs, and for ``reconstruction``.
        reconstruction: train each block afterwards.
        memory: bytes for statistics; a share of what is available by default. What does not fit at once is done in
            groups of weights, each with gradients of its own.
        scratch: a directory for a copy of the weights while they are pruned, so that memory holds one; the system's
            directory for temporary files by default.
        ranks: the processes that prune the same model together, each with the same calibration data: process r runs
            batches r, r + W and so on, and solves for weights r, r + W and so on. All of them end with the same model.

    Attributes:
        targets: what is pruned, by name of the parameter.
        masks: by name, bool of the parameter's shape; True is kept. Empty before :meth:`prune_to`.

    Raises:
        ConfigurationError: nothing can be pruned, the pattern does not divide a weight, or settings contradict.

    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    >>> batches = [(torch.randn(8, 16), torch.randint(4, (8,))) for _ in range(8)]
    >>> from gossamer.pruning import BlockFisher
    >>> pruner = Pruner(model, BlockFisher(block_size=16))
    >>> report = pruner.prune_to(0.75, batches, nn.functional.cross_entropy)
    >>> round(report.sparsity, 3), int((model[0].weight != 0).sum() + (model[2].weight != 0).sum())
    (0.75, 160)
    """

    def __init__(
        self,
        model: nn.Module,
        curvature: Curvature,
        pattern: Pattern | None = None,
        update: Update = "joint",
        *,
        recompute: int = 1,
        params: Sequence[str] = (".*",),
        exclude: Sequence[str] = SKIP,
        blocks: Sequence[nn.Module] | None = None,
        reconstruction: Reconstruction | None = None,
        memory: int | None = None,
        scratch: Path | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.ranks = ranks
        if update not in ("none", "independent", "joint"):
            raise ConfigurationError(f"update is 'none', 'independent' or 'joint', got {update!r}")
        if recompute < 1:
            raise ConfigurationError(f"recompute counts stages, at least 1, got {recompute}")
        if recompute > 1 and isinstance(pattern, NM):
            raise ConfigurationError(f"{pattern} is reached in one stage: recompute=1")
        if reconstruction and blocks is None:
            raise ConfigurationError("a reconstruction goes block by block: pass the model's `blocks`")
        self.model, self.curvature, self.update, self.recompute = model, curvature, update, recompute
        self.pattern = pattern or Unstructured("global" if curvature.source == "gradients" else "layer")
        self.blocks, self.reconstruction, self.memory, self.scratch = blocks, reconstruction, memory, scratch
        if self.in_blocks and (recompute > 1 or self.competes_globally):
            raise ConfigurationError(
                "blocks that are pruned one after the other do it in one stage, and their weights cannot compete with "
                "those of others: recompute=1, and a pattern with the scope 'layer' or 'row'"
            )
        self.targets = find_targets(model, params, exclude)
        self.owners = Owners.of(self.targets, ranks)
        for name, target in self.targets.items():
            self.pattern.check(name, target.shape[1])
        if (coupled := curvature.block_size) and coupled % self.pattern.size:
            raise ConfigurationError(
                f"{self.pattern} takes {self.pattern.size} weights together, which do not divide blocks of {coupled} "
                "of the Fisher matrix: choose another block_size"
            )
        if self.in_blocks:
            self._check_blocks()
        self.masks: dict[str, Tensor] = {}
        self._reached = 0.0
        experts = [name for name, module in model.named_modules() if isinstance(module, SeparateExperts)]
        self._of_experts = {name for name in self.targets if name.startswith(tuple(f"{each}." for each in experts))}

    @property
    def sparsity(self) -> float:
        """Share of the targets' entries that the masks prune."""
        entries = sum(mask.numel() for mask in self.masks.values())
        return sum(mask.numel() - int(mask.sum()) for mask in self.masks.values()) / max(entries, 1)

    def prune_to(
        self,
        sparsity: float,
        loader: Iterable[Any] | None = None,
        loss_fn: LossFn | None = None,
        *,
        samples: int | None = None,
        vectorize: bool = False,
        unfinished: Unfinished | None = None,
        progress: OnProgress = lambda phase, done, total: None,
    ) -> PruneReport:
        """Prune to a share of zeros. What is pruned stays so: sparsities of later calls are of the same weights.

        Args:
            sparsity: between 0 and 1; for N:M, what it makes.
            loader: calibration data, as for :func:`~gossamer.operators.fisher_gradients.gradients_of`, of which all is
                used and kept in memory meanwhile; ``Magnitude`` needs none.
            loss_fn: of a batch, as there. Curvatures of gradients need it; with it the loss is measured before and
                after.
            samples: gradients to take; as many as the loader has samples by default.
            vectorize: compute the gradients of a batch together, as there.
            unfinished: where to keep what is done, and to go on from; for the same model, data and settings.
            progress: called with the phase, how much of it is done, and of how much.

        Raises:
            ConfigurationError: a setting has no meaning, data is missing, or gradients or inputs are not finite or all
                zero. The model and the masks are then as they were.
        """
        self.pattern.check_sparsity(sparsity)
        if sparsity < self._reached:
            raise ConfigurationError(
                f"{self._reached:.1%} is pruned already; pruning to {sparsity:.1%} would undo some"
            )
        if self.curvature.source != "nothing" and loader is None:
            raise ConfigurationError(f"{self.curvature} needs calibration data: pass a loader")
        if self.curvature.source == "gradients" and loss_fn is None:
            raise ConfigurationError(f"{self.curvature} needs the loss of a batch: pass loss_fn")
        batches = list(loader) if loader is not None else []
        if batches and len(batches) < self.ranks.size:
            raise ConfigurationError(
                f"{len(batches)} batches of calibration data are not enough for {self.ranks.size} processes"
            )
        report = PruneReport(str(self.curvature), str(self.pattern), self.update)
        job = Job(sparsity, batches, loss_fn, samples, vectorize, unfinished, progress, report, self.owners)
        with evaluating(self.model), self._all_or_nothing() as original:
            report.loss_before = self._loss(job)
            if not self.in_blocks:
                prune_whole(self, job)
            if self.blocks is not None and (self.in_blocks or self.reconstruction):
                prune_blocks(self, job, original)
            report.loss_after = self._loss(job)
        self._reached = sparsity
        if sparsity:
            report.unreached = [name for name, mask in self.masks.items() if name in self._of_experts and mask.all()]
        for name, target in self.targets.items():
            share = float((target.read() == 0).float().mean(dtype=torch.float64))
            report.layers.append(PrunedLayer(name, target.shape, share, job.predicted.get(name, 0.0)))
        report.peak_bytes = peak_memory()
        return report

    def hold(self, optimizer: torch.optim.Optimizer) -> Hold:
        """Keeps what is pruned at zero while ``optimizer`` trains; see :class:`~.masks.Hold`."""
        return Hold([(self.targets[name].parameter, mask) for name, mask in self.masks.items()], optimizer)

    def save_masks(self, path: str | Path) -> None:
        """Writes the masks; see :func:`~.masks.save_masks`."""
        save_masks(path, self.masks)

    def load_masks(self, path: str | Path) -> None:
        """Takes masks over from a file, and applies them.

        Raises:
            CheckpointError: the file is damaged.
            ConfigurationError: the masks are of another model. Nothing was changed.
        """
        masks = load_masks(path)
        check_masks(masks, {name: target.parameter.shape for name, target in self.targets.items()})
        with torch.no_grad():
            for name, mask in masks.items():
                parameter = self.targets[name].parameter
                self.masks[name] = mask.to(parameter.device)
                parameter.mul_(self.masks[name])
        self._reached = self.sparsity

    @property
    def in_blocks(self) -> bool:
        """Whether blocks are pruned one after the other, each on what those before it give."""
        return self.blocks is not None and self.curvature.source == "inputs"

    @property
    def competes_globally(self) -> bool:
        """Whether which weights of a layer go depends on other layers."""
        return isinstance(self.pattern, Block) and self.pattern.scope == "global"

    def reached(self, seen: Mapping[str, Seen]) -> dict[str, Seen]:
        """Weights that were used. Experts that no token was sent to are left as they are."""
        left = [name for name in seen if name in self._of_experts and not (seen[name].count and seen[name].scale > 0)]
        for name in left:
            parameter = self.targets[name].parameter
            self.masks.setdefault(name, torch.ones(parameter.shape, dtype=torch.bool, device=parameter.device))
        return {name: each for name, each in seen.items() if name not in left}

    def prune_together(self, inside: Mapping[str, Target], forms: Mapping[str, Quadratic], job: Job) -> None:
        """Chooses masks for some targets, and applies them."""
        keep = {}
        if self.competes_globally:
            keep = self.pattern.keep(self.costs(inside, forms, job), job.sparsity)
        self.apply_together(inside, keep, forms, job)

    def costs(self, inside: Mapping[str, Target], forms: Mapping[str, Quadratic], job: Job) -> dict[str, Tensor]:
        """For each target, of each subset that the pattern knows; see :func:`~.patterns.subset_costs`."""
        found: dict[str, Tensor] = {}
        with together(self.ranks, "computing costs"):
            for name, target in inside.items():
                if self.owners.mine(name):
                    found[name] = subset_costs(
                        target.read(), forms[name].inverse_blocks(self.pattern.size), self.pattern
                    )
        if self.ranks.size == 1:
            return found
        own = {name: {"costs": costs} for name, costs in found.items()}
        return {name: self.ranks.share(own.get(name), self.owners[name])["costs"] for name in inside}

    def apply_together(
        self, inside: Mapping[str, Target], keep: Mapping[str, Tensor], forms: Mapping[str, Quadratic], job: Job
    ) -> None:
        """Prunes targets by their masks, each by its owner; all processes have the outcome.

        Args:
            inside: targets by name.
            keep: masks (N, K); a target without one chooses by its form.
            forms: by name; without one weights that are kept stay as they are.
            job: of it.
        """
        with together(self.ranks, "pruning"):
            for done, (name, target) in enumerate(inside.items(), 1):
                if self.owners.mine(name):
                    form = forms.get(name)
                    mask = keep.get(name)
                    if mask is None:
                        assert form is not None
                        mask = form.choose(target.read(), self.pattern, job.sparsity)
                    self.apply(target, mask, form, job)
                    job.progress("pruning", done, len(inside))
        if self.ranks.size > 1:
            for target in inside.values():
                self._share(target, job)

    def _share(self, target: Target, job: Job) -> None:
        """What the owner of a target made of it is so in all processes."""
        name, own = target.name, None
        if self.owners.mine(name):
            cost = torch.tensor(job.predicted.get(name, 0.0), dtype=torch.float64)
            own = {"weight": target.parameter.detach(), "mask": self.masks[name], "cost": cost}
        found = self.ranks.share(own, self.owners[name])
        with torch.no_grad():
            target.parameter.copy_(found["weight"])
        self.masks[name] = found["mask"].to(target.parameter.device)
        job.predicted[name] = float(found["cost"])

    def apply(self, target: Target, keep: Tensor, form: Quadratic | None, job: Job) -> None:
        """Prunes a target by a mask (N, K), and updates what is kept."""
        weight = target.read()
        if target.name in self.masks:
            keep = keep & target.to_matrix(self.masks[target.name]).cpu()
        if form is None or self.update == "none":
            new = weight * keep
        else:
            new = form.joint(weight, keep) if self.update == "joint" else form.independent(weight, keep)
        if not bool(new.isfinite().all()):
            raise ConfigurationError(f"the update of {target.name} is not finite: use more damping")
        if form is not None:
            job.predicted[target.name] = job.predicted.get(target.name, 0.0) + form.cost(new - weight)
        target.write(new)
        self.masks[target.name] = target.from_matrix(keep).contiguous().to(target.parameter.device)

    def _check_blocks(self) -> None:
        inside = {id(parameter) for block in self.blocks or () for parameter in block.parameters()}
        if outside := [name for name, target in self.targets.items() if id(target.parameter) not in inside]:
            raise ConfigurationError(
                f"{outside[0]} lies in none of the blocks, and {self.curvature} sees the inputs of theirs only: "
                "exclude it, or pass all blocks"
            )

    def _loss(self, job: Job) -> float | None:
        if job.loss_fn is None or not job.batches:
            return None
        with job.report.timed("measuring"):
            return mean_loss(self.model, job.own_batches, job.loss_fn, job.ranks)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Original]:
        """The weights as they are now; they and the masks are so again if the body fails."""
        masks = dict(self.masks)
        changed = [target.parameter for target in self.targets.values()]
        if self.reconstruction and self.blocks is not None:
            changed += [parameter for block in self.blocks for parameter in block.parameters()]
        try:
            with Original(changed, self.scratch) as original:
                yield original
        except BaseException:
            self.masks = masks
            raise
