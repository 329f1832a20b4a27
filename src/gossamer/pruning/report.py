"""What pruning did."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from gossamer.timing import timed


@dataclass(frozen=True)
class PrunedLayer:
    """One weight.

    Attributes:
        name: of the parameter.
        shape: (N, K).
        sparsity: share of its entries that are zero.
        predicted_loss: how much its quadratic form expects the loss to have grown, ``1/2 s^T F s``. For curvatures of
            gradients that is the loss of the model; for those of inputs, half the squared error of the layer's output
            per token.
    """

    name: str
    shape: tuple[int, int]
    sparsity: float
    predicted_loss: float


@dataclass
class PruneReport:
    """What :meth:`~gossamer.pruning.pruner.Pruner.prune_to` did. ``print(report)`` shows it.

    Attributes:
        curvature, pattern, update: how.
        layers: weight by weight.
        loss_before, loss_after: mean loss of the calibration data, where there was a loss to measure.
        seconds: by phase.
        peak_bytes: most memory that the process has held at any time so far; ``None`` where the system does not tell.
        unreached: weights of experts that no token of the calibration data was sent to; they are as they were.
        reconstruction: mean squared error of each block's output before and after its reconstruction, relative to
            the output's own mean square.
    """

    curvature: str
    pattern: str
    update: str
    layers: list[PrunedLayer] = field(default_factory=list)
    loss_before: float | None = None
    loss_after: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    peak_bytes: int | None = None
    unreached: list[str] = field(default_factory=list)
    reconstruction: list[tuple[float, float]] = field(default_factory=list)

    def timed(self, phase: str) -> AbstractContextManager[None]:
        """Adds what the body takes to the seconds of a phase."""
        return timed(self.seconds, phase)

    @property
    def sparsity(self) -> float:
        """Share of zeros among all pruned weights' entries."""
        entries = sum(layer.shape[0] * layer.shape[1] for layer in self.layers)
        return sum(layer.sparsity * layer.shape[0] * layer.shape[1] for layer in self.layers) / max(entries, 1)

    @property
    def predicted_loss(self) -> float:
        """Sum over the layers."""
        return sum(layer.predicted_loss for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {"sparsity": self.sparsity, "predicted_loss": self.predicted_loss}

    def __str__(self) -> str:
        shares = [layer.sparsity for layer in self.layers]
        lines = [
            f"{len(self.layers)} weights, {self.sparsity:.2%} of their entries zero (from {min(shares):.1%} to "
            f"{max(shares):.1%}): {self.curvature}, {self.pattern}, update {self.update}"
        ]
        if self.loss_before is not None and self.loss_after is not None:
            lines.append(f"loss of the calibration data: {self.loss_before:.4f} became {self.loss_after:.4f}")
        if self.unreached:
            lines.append(
                f"left as they were, since no token reached their experts: {len(self.unreached)} weights, such as "
                f"{self.unreached[0]}; more calibration data may"
            )
        if self.reconstruction:
            before, after = (sum(values) / len(values) for values in zip(*self.reconstruction, strict=True))
            lines.append(f"error of a block's output: {before:.2%} became {after:.2%} by reconstruction (mean)")
        spent = ", ".join(f"{name} {seconds:,.1f} s" for name, seconds in self.seconds.items())
        peak = "" if self.peak_bytes is None else f"; at most {self.peak_bytes / 1e9:,.1f} GB of memory"
        lines.append(f"{spent}{peak}")
        return "\n".join(lines)
