"""Prunes the weights of a model: which go is told by a curvature, how many and in which sets by a pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.errors import ConfigurationError
from gossamer.nn.quantize import SKIP
from gossamer.pruning.blocks import BlockRun
from gossamer.pruning.curvature import Curvature, Statistic
from gossamer.pruning.masks import Hold, check_masks, load_masks, save_masks
from gossamer.pruning.original import Original
from gossamer.pruning.patterns import Block, Pattern, Unstructured, subset_costs
from gossamer.pruning.quadratic import Quadratic
from gossamer.pruning.reconstruction import Reconstruction, reconstruct
from gossamer.pruning.report import PrunedLayer, PruneReport
from gossamer.pruning.schedule import geometric
from gossamer.pruning.statistics import (
    LossFn,
    begin,
    count_samples,
    evaluating,
    mean_loss,
    see_gradients,
    see_inputs,
    watching,
)
from gossamer.pruning.targets import Target, find_targets
from gossamer.pruning.unfinished import Unfinished
from gossamer.system import available_memory, peak_memory

Update = Literal["none", "independent", "joint"]
OnProgress = Callable[[str, int, int], None]
_SHARE_OF_MEMORY = 0.6  # of what is available, for statistics


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
    ) -> None:
        if update not in ("none", "independent", "joint"):
            raise ConfigurationError(f"update is 'none', 'independent' or 'joint', got {update!r}")
        if recompute < 1:
            raise ConfigurationError(f"recompute counts stages, at least 1, got {recompute}")
        if reconstruction and blocks is None:
            raise ConfigurationError("a reconstruction goes block by block: pass the model's `blocks`")
        self.model, self.curvature, self.update, self.recompute = model, curvature, update, recompute
        self.pattern = pattern or Unstructured("global" if curvature.source == "gradients" else "layer")
        self.blocks, self.reconstruction, self.memory = blocks, reconstruction, memory
        self._in_blocks = blocks is not None and curvature.source == "inputs"
        if self._in_blocks and (recompute > 1 or self._competes_globally):
            raise ConfigurationError(
                "blocks that are pruned one after the other do it in one stage, and their weights cannot compete with "
                "those of others: recompute=1, and a pattern with the scope 'layer' or 'row'"
            )
        self.targets = find_targets(model, params, exclude)
        for name, target in self.targets.items():
            self.pattern.check(name, target.shape[1])
        self.masks: dict[str, Tensor] = {}

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
        """Prune to a share of zeros. What is zero stays zero: sparsities of later calls are of the same weights.

        Args:
            sparsity: between 0 and 1; for N:M, what it makes.
            loader: calibration data, as for :func:`~gossamer.operators.fisher_gradients.gradients_of`; ``Magnitude``
                needs none.
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
        if self.masks and sparsity < self.sparsity - 1e-9:
            raise ConfigurationError(
                f"{self.sparsity:.1%} is pruned already; pruning to {sparsity:.1%} would undo some"
            )
        if self.curvature.source != "nothing" and loader is None:
            raise ConfigurationError(f"{self.curvature} needs calibration data: pass a loader")
        if self.curvature.source == "gradients" and loss_fn is None:
            raise ConfigurationError(f"{self.curvature} needs the loss of a batch: pass loss_fn")
        batches = list(loader) if loader is not None else []
        report = PruneReport(str(self.curvature), str(self.pattern), self.update)
        with evaluating(self.model), self._all_or_nothing() as original:
            if loss_fn and batches:
                with report.timed("measuring"):
                    report.loss_before = mean_loss(self.model, batches, loss_fn)
            predicted: dict[str, float] = {}
            see = partial(
                self._see, batches=batches, loss_fn=loss_fn, samples=samples, vectorize=vectorize, progress=progress
            )
            if not self._in_blocks and not self._take_over("whole", unfinished, predicted, report):
                for stage in geometric(self.sparsity, sparsity, self.recompute):
                    self._stage(stage, see, predicted, report, progress)
                self._keep("whole", self.targets, [], unfinished, predicted)
            if self.blocks is not None and (self._in_blocks or self.reconstruction):
                self._walk(sparsity, batches, original, predicted, report, unfinished, progress)
            if loss_fn and batches:
                with report.timed("measuring"):
                    report.loss_after = mean_loss(self.model, batches, loss_fn)
        for name, target in self.targets.items():
            share = float((target.read() == 0).float().mean(dtype=torch.float64))
            report.layers.append(PrunedLayer(name, target.shape, share, predicted.get(name, 0.0)))
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
        self.masks = masks
        with torch.no_grad():
            for name, mask in masks.items():
                self.targets[name].parameter.mul_(mask)

    @property
    def _competes_globally(self) -> bool:
        return isinstance(self.pattern, Block) and self.pattern.scope == "global"

    # --- one stage over the whole model ------------------------------------------------------------------------------

    def _stage(
        self,
        sparsity: float,
        see_group: Callable[[Mapping[str, Target]], Mapping[str, Quadratic]],
        predicted: dict[str, float],
        report: PruneReport,
        progress: OnProgress,
    ) -> None:
        groups = self._groups()

        def see(group: Mapping[str, Target]) -> Mapping[str, Quadratic]:
            with report.timed("statistics"):
                return see_group(group)

        if not self._competes_globally or len(groups) == 1:
            for group in groups:
                seen = see(group)
                with report.timed("pruning"):
                    self._prune(group, seen, sparsity, predicted, progress)
            return
        # What is pruned in one group depends on the others: all costs first, and statistics again for the update.
        costs: dict[str, Tensor] = {}
        for group in groups:
            seen = see(group)
            costs |= {name: self._costs(target, seen[name]) for name, target in group.items()}
        keep = self.pattern.keep(costs, sparsity)
        costs.clear()
        for group in groups:
            forms: Mapping[str, Quadratic] = {} if self.update == "none" else see(group)
            for name, target in group.items():
                self._apply(target, keep[name], forms.get(name), predicted)

    def _groups(self) -> list[dict[str, Target]]:
        """Targets whose statistics fit into memory together."""
        available = available_memory()
        budget = self.memory or (int(available * _SHARE_OF_MEMORY) if available else None)
        groups: list[dict[str, Target]] = [{}]
        used = 0
        for name, target in self.targets.items():
            size = self.curvature.bytes(target.shape)
            if budget is not None and size > budget:
                raise ConfigurationError(
                    f"{self.curvature} takes {size / 1e9:,.2f} GB for {name} {list(target.shape)} alone, and "
                    f"{budget / 1e9:,.2f} GB may be used: smaller blocks, fewer gradients, or more memory"
                )
            if budget is not None and used + size > budget:
                groups.append({})
                used = 0
            groups[-1][name] = target
            used += size
        return groups

    def _see(
        self,
        group: Mapping[str, Target],
        batches: list[Any],
        loss_fn: LossFn | None,
        samples: int | None,
        vectorize: bool,
        progress: OnProgress,
    ) -> Mapping[str, Quadratic]:
        statistics = begin(group, self.curvature)
        if self.curvature.source == "inputs":
            see_inputs(self.model, group, statistics, batches)
        elif self.curvature.source == "gradients":
            assert loss_fn is not None
            count = samples or count_samples(batches)
            advance = partial(progress, "gradients")
            see_gradients(self.model, group, statistics, batches, loss_fn, count, advance, vectorize=vectorize)
        return _Forms(statistics, self.curvature.relative_damping)

    def _prune(
        self,
        group: Mapping[str, Target],
        forms: Mapping[str, Quadratic],
        sparsity: float,
        predicted: dict[str, float],
        progress: OnProgress,
    ) -> None:
        keep = {}
        if self._competes_globally:
            costs = {name: self._costs(target, forms[name]) for name, target in group.items()}
            keep = self.pattern.keep(costs, sparsity)
            costs.clear()
        for done, (name, target) in enumerate(group.items(), 1):
            form = forms[name]
            mask = keep[name] if keep else form.choose(target.read(), self.pattern, sparsity)
            self._apply(target, mask, form, predicted)
            progress("pruning", done, len(group))

    def _costs(self, target: Target, form: Quadratic) -> Tensor:
        return subset_costs(target.read(), form.inverse_blocks(self.pattern.size), self.pattern)

    def _apply(self, target: Target, keep: Tensor, form: Quadratic | None, predicted: dict[str, float]) -> None:
        weight = target.read()
        if form is None or self.update == "none":
            new = weight * keep
        else:
            new = form.joint(weight, keep) if self.update == "joint" else form.independent(weight, keep)
        if not bool(new.isfinite().all()):
            raise ConfigurationError(f"the update of {target.name} is not finite: use more damping")
        if form is not None:
            predicted[target.name] = predicted.get(target.name, 0.0) + form.cost(new - weight)
        target.write(new)
        self.masks[target.name] = target.from_matrix(keep).contiguous()

    # --- block by block ----------------------------------------------------------------------------------------------

    def _walk(
        self,
        sparsity: float,
        batches: list[Any],
        original: Original,
        predicted: dict[str, float],
        report: PruneReport,
        unfinished: Unfinished | None,
        progress: OnProgress,
    ) -> None:
        """Prunes and reconstructs each block on what the blocks before it give."""
        assert self.blocks is not None
        run = BlockRun(self.model, self.blocks, batches)
        reference = run.hidden  # what the dense model has at the same place
        names = {id(target.parameter): name for name, target in self.targets.items()}
        for index, block in enumerate(self.blocks):
            found = [names[id(parameter)] for parameter in block.parameters() if id(parameter) in names]
            inside = {name: self.targets[name] for name in found}
            if self.reconstruction:
                with report.timed("propagating"), original.in_place(block.parameters()):
                    wanted = run.outputs(index, reference)
            part = f"block-{index:03}"
            if not self._take_over(part, unfinished, predicted, report):
                if self._in_blocks:
                    self._prune_block(run, index, inside, sparsity, predicted, report)
                errors = []
                if self.reconstruction:
                    masks = [(target.parameter, self.masks[name]) for name, target in inside.items()]
                    with report.timed("reconstruction"):
                        forward = partial(run.forward, index)
                        errors.append(reconstruct(block, forward, run.hidden, wanted, masks, self.reconstruction))
                report.reconstruction += errors
                self._keep(part, inside, errors, unfinished, predicted, block)
            if self.reconstruction:
                reference = wanted
            with report.timed("propagating"):
                run.hidden = run.outputs(index, run.hidden)
            progress("blocks", index + 1, len(self.blocks))

    def _prune_block(
        self,
        run: BlockRun,
        index: int,
        inside: dict[str, Target],
        sparsity: float,
        predicted: dict[str, float],
        report: PruneReport,
    ) -> None:
        statistics = begin(inside, self.curvature)
        with report.timed("statistics"), watching(inside, statistics):
            run.outputs(index, run.hidden)
        forms = _Forms(statistics, self.curvature.relative_damping)
        with report.timed("pruning"):
            self._prune(inside, forms, sparsity, predicted, lambda *_: None)

    # --- going on, and going back ------------------------------------------------------------------------------------

    def _keep(
        self,
        part: str,
        inside: Mapping[str, Target],
        errors: list[tuple[float, float]],
        unfinished: Unfinished | None,
        predicted: Mapping[str, float],
        block: nn.Module | None = None,
    ) -> None:
        """Saves what was done to some targets, and to all parameters of a block if it was reconstructed."""
        if unfinished is None:
            return
        parameters = {name: target.parameter for name, target in inside.items()}
        if block is not None and self.reconstruction:
            known = {id(parameter) for parameter in block.parameters()}
            parameters |= {name: p for name, p in self.model.named_parameters() if id(p) in known}
        tensors = {f"value:{name}": parameter.detach() for name, parameter in parameters.items()}
        tensors |= {f"mask:{name}": self.masks[name] for name in inside}
        tensors |= {f"cost:{name}": torch.tensor(predicted.get(name, 0.0), dtype=torch.float64) for name in inside}
        unfinished.save(part, tensors | {"errors": torch.tensor(errors, dtype=torch.float64)})

    @torch.no_grad()
    def _take_over(
        self, part: str, unfinished: Unfinished | None, predicted: dict[str, float], report: PruneReport
    ) -> bool:
        """Applies what was saved; false if there is nothing."""
        tensors = None if unfinished is None else unfinished.load(part)
        if tensors is None:
            return False
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind == "value":
                self.model.get_parameter(name).copy_(value)
            elif kind == "mask":
                self.masks[name] = value
            elif kind == "cost":
                predicted[name] = float(value)
        report.reconstruction += [(float(before), float(after)) for before, after in tensors["errors"].reshape(-1, 2)]
        return True

    @contextmanager
    def _all_or_nothing(self) -> Iterator[Original]:
        """The weights as they are now; they and the masks are so again if the body fails."""
        masks = dict(self.masks)
        changed = [target.parameter for target in self.targets.values()]
        if self.reconstruction and self.blocks is not None:
            changed += [parameter for block in self.blocks for parameter in block.parameters()]
        try:
            with Original(changed) as original:
                yield original
        except BaseException:
            self.masks = masks
            raise


class _Forms(Mapping[str, Quadratic]):
    """Quadratic forms of statistics, each made when it is asked for: factors take as much memory as statistics do."""

    def __init__(self, statistics: Mapping[str, Statistic], relative_damping: float) -> None:
        scales = {name: statistic.scale for name, statistic in statistics.items()}
        mean = sum(scales.values()) / max(len(scales), 1)
        if not mean > 0:
            raise ConfigurationError(
                "all inputs or gradients of the weights that are pruned are zero: nothing tells them apart"
            )
        self._statistics = statistics
        # a layer that saw only zeros is damped as the others are
        self._damping = {name: relative_damping * (scale or mean) for name, scale in scales.items()}

    def __getitem__(self, name: str) -> Quadratic:
        return self._statistics[name].quadratic(self._damping[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._statistics)

    def __len__(self) -> int:
        return len(self._statistics)
