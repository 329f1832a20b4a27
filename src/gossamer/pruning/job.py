"""One call of the pruner: what it was asked, and what it finds out on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.operators.ranks import Ranks, together
from gossamer.pruning.owners import Owners
from gossamer.pruning.report import PruneReport
from gossamer.pruning.statistics import LossFn
from gossamer.pruning.unfinished import Unfinished

OnProgress = Callable[[str, int, int], None]


@dataclass
class Job:
    """See :meth:`~.pruner.Pruner.prune_to` for the first seven.

    Attributes:
        owners: which process solves for which weight; parts are the first one's to keep.
        report: is filled.
        predicted: cost of what was done to each target so far.
    """

    sparsity: float
    batches: list[Any]
    loss_fn: LossFn | None
    samples: int | None
    vectorize: bool
    unfinished: Unfinished | None
    progress: OnProgress
    report: PruneReport
    owners: Owners
    predicted: dict[str, float] = field(default_factory=dict)

    @property
    def ranks(self) -> Ranks:
        """The processes that do it together."""
        return self.owners.ranks

    @property
    def own_batches(self) -> list[Any]:
        """Those that this process runs."""
        return self.batches[self.ranks.rank :: self.ranks.size]

    def keep_part(self, part: str, parameters: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
        """Saves what was done to some parameters, if parts are kept.

        Args:
            part: name of the part.
            parameters: all that were changed, by name.
            masks: of those that were pruned.
        """
        if self.unfinished is None:
            return
        tensors = {f"value:{name}": parameter.detach() for name, parameter in parameters.items()}
        tensors |= {f"mask:{name}": mask for name, mask in masks.items()}
        costs = {name: self.predicted.get(name, 0.0) for name in masks}
        tensors |= {f"cost:{name}": torch.tensor(cost, dtype=torch.float64) for name, cost in costs.items()}
        errors = torch.tensor(self.report.reconstruction, dtype=torch.float64)
        with together(self.ranks, "keeping what is done"):
            if self.ranks.rank == 0:
                self.unfinished.save(part, tensors | {"errors": errors})

    @torch.no_grad()
    def take_over(self, part: str, model: nn.Module, masks: dict[str, Tensor]) -> bool:
        """Applies a part that was saved to the model, and adds its masks; false if there is none."""
        if self.unfinished is None:
            return False
        with together(self.ranks, "looking for what is done"):
            found = self.unfinished.load(part) if self.ranks.rank == 0 else None
        tensors = self.ranks.share(found, 0)
        if not tensors:
            return False
        for key, value in tensors.items():
            kind, _, name = key.partition(":")
            if kind == "value":
                model.get_parameter(name).copy_(value)
            elif kind == "mask":
                masks[name] = value.to(model.get_parameter(name).device)
            elif kind == "cost":
                self.predicted[name] = float(value)
        self.report.reconstruction = [(float(a), float(b)) for a, b in tensors["errors"].reshape(-1, 2)]
        return True
